"""A training step for a device: loss and gradients of what the method trains, as one ExecuTorch program.

The graph of both passes comes from PyTorch's own exporter. Before ExecuTorch plans its memory, it is changed so that
less has to stay from the forward pass to the backward pass: see :mod:`~tinytl_hf.deploy.device_graph`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export.experimental import _export_forward_backward

from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.engine import Engine
from tinytl_hf.config.export import ExportConfig
from tinytl_hf.config.run import Config
from tinytl_hf.deploy.check import evaluation_images
from tinytl_hf.deploy.device_graph import keep_less
from tinytl_hf.deploy.executorch import EXTRA, lacking
from tinytl_hf.deploy.exported import (
    check_output,
    described_by,
    description,
    require,
    stock_backbone,
    write_with_description,
)
from tinytl_hf.deploy.gradient_check import GradientsBeside
from tinytl_hf.errors import TinyTLError
from tinytl_hf.measure.measured_step import random_batch
from tinytl_hf.measure.paper_rule import paper_rule
from tinytl_hf.measure.peak import measure_peak
from tinytl_hf.model import TinyTLModel
from tinytl_hf.network.lite_residual import LiteResidual
from tinytl_hf.network.methods import changing_buffers
from tinytl_hf.words import counted

LEAST_IMAGES = 16  # to look for one on which no activation lies at a ReLU's edge


class TrainingStep(nn.Module):
    """Images and labels to the loss and the predicted classes.

    Args:
        model: Where network and method come from; it stays as it is.
    """

    def __init__(self, model: TinyTLModel) -> None:
        super().__init__()
        self.backbone = stock_backbone(model)
        for module in self.backbone.modules():
            if isinstance(module, LiteResidual):
                module.__class__ = _PoolsByMean
        self.train()

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images ``[N, 3, S, S]`` and class numbers ``[N]`` to the mean loss and classes ``[N]``."""
        logits = self.backbone(images)
        return F.cross_entropy(logits, labels), logits.detach().argmax(1)


class _PoolsByMean(LiteResidual):
    """A lite residual whose pooling has a backward pass in ExecuTorch, which lacks that of ``avg_pool2d``."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """As :class:`LiteResidual`."""
        if self.pools_maps_of(tuple(x.shape[-2:])):
            n, c, height, width = x.shape
            even = x[:, :, : height // 2 * 2, : width // 2 * 2]
            x = even.reshape(n, c, height // 2, 2, width // 2, 2).mean((3, 5))
        return F.interpolate(self.before_upsampling(x), size=size, mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Built:
    """A step as a program.

    Attributes:
        content: The .pte file.
        planned: Memory that ExecuTorch plans for both passes, in bytes: maps, temporaries, gradients and outputs.
    """

    content: bytes
    planned: int


def export_device_step(model: TinyTLModel, config: ExportConfig, data: DataConfig) -> str:
    """Write the step and its description once its gradients are those of PyTorch.

    Returns:
        What was written, and what was measured.

    Raises:
        TinyTLError: The method or an operator does not fit, the package is missing, gradients differ, or a file cannot
            be written.
    """
    check_method(model)
    require("executorch.exir", EXTRA)
    path = check_output(config)
    wanted = max(config.batch_size, LEAST_IMAGES)
    images = evaluation_images(model, data, wanted)
    size = model.config.preprocessing.train_size
    views = F.interpolate(images.first(wanted), (size, size), mode="bilinear", antialias=True)
    views = views[torch.arange(max(config.batch_size, len(views))) % len(views)]
    labels = torch.arange(config.batch_size) % len(model.label_names)
    with torch.enable_grad():
        step = TrainingStep(model)
        built = build(step, views[: config.batch_size], labels)
        check = GradientsBeside(built.content, step, labels).compare(views)
        check.check()
        beside = _in_pytorch(model, config.batch_size)
    about = describe(model, step, config.batch_size)
    write_with_description(path, built.content, about)
    return "\n".join(
        [
            f"{path}: {len(built.content) / 1e6:.2f} MB, a training step of {model.config.backbone.name} by "
            f"{model.config.method} for {counted(config.batch_size, 'image')} of {size} px; what it needs to know is "
            f"in {described_by(path).name}",
            f"checked in ExecuTorch on {images.source}: {check}",
            f"memory of a step: ExecuTorch plans {built.planned / 1e6:.1f} MB for maps and gradients; {beside}",
            "it keeps a ReLU's mask in one byte a value, where the lean engine keeps one bit",
        ]
    )


def check_method(model: TinyTLModel) -> None:
    """Raise unless a device can train by the model's method.

    Raises:
        TinyTLError: A norm learns from its batch, or there is dropout.
    """
    config = model.config
    if changing_buffers(model.backbone):
        lite = config.method in ("TinyTL-L", "TinyTL-L+B")
        fix = (
            "train it with --lite.norm group" if lite else "use FT-Last, TinyTL-B or TinyTL-L+B with --lite.norm group"
        )
        raise TinyTLError(
            f"train=True: norms of {config.method} learn from their batch, which a device cannot do; {fix}"
        )
    if config.head.dropout:
        raise TinyTLError(f"train=True: the adapter has head.dropout={config.head.dropout}; a device step needs 0")


def describe(model: TinyTLModel, step: TrainingStep, batch_size: int) -> dict[str, Any]:
    """What a device needs to know to train, and to write an adapter in the end."""
    about = description(model, "float", "NCHW")
    size = model.config.preprocessing.train_size
    about["input"]["shape"] = [batch_size, 3, size, size]
    names = [name for name, parameter in step.named_parameters() if parameter.requires_grad]
    return {**about, "gradients": {name: name.removeprefix("backbone.") for name in names}}


def build(step: TrainingStep, images: Tensor, labels: Tensor) -> Built:
    """Both passes as a program of ExecuTorch's portable kernels.

    Args:
        step: The step.
        images: An example of its batch.
        labels: Its labels.

    Raises:
        TinyTLError: There is no kernel for an operator.
    """
    exir = require("executorch.exir", EXTRA)
    exported = torch.export.export(step, (images, labels), strict=False)
    try:
        both = _export_forward_backward(exported)
        keep_less(both.graph)
        both.graph_module.recompile()
        edge = exir.to_edge(both, compile_config=exir.EdgeCompileConfig(_check_ir_validity=False))
        program = edge.to_executorch()
    except Exception as error:  # it raises whatever a pass of it raises
        raise lacking(exported, error) from error
    (plan,) = (plan for plan in program.executorch_program.execution_plan if plan.name == "forward")
    return Built(bytes(program.buffer), sum(plan.non_const_buffer_sizes))


def _in_pytorch(model: TinyTLModel, batch_size: int) -> str:
    """What the same step takes in PyTorch by our two engines, and by the paper's rule."""
    figures = []
    for lean in (True, False):
        record = replace(model.config.backbone, weights="none")  # of any values: memory does not depend on them
        again = TinyTLModel(replace(model.config, backbone=record), Engine(lean=lean))
        pixels, labels = random_batch(again, batch_size)
        peak = measure_peak(again.train(), pixels, labels, Config(method=model.config.method))
        figures.append((peak.dynamic + peak.gradients) / 1e6)
    rule = paper_rule(model, batch_size) / 1e6
    lean_mb, stock_mb = figures
    return (
        f"PyTorch takes {lean_mb:.1f} MB lean and {stock_mb:.1f} MB stock for those (measured); the paper's rule "
        f"gives {rule:.1f} MB, with 8-bit weights (analytic)"
    )
