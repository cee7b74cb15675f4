"""A training step for a device: loss and gradients of what the method trains, as one ExecuTorch program.

The graph of both passes comes from PyTorch's own exporter. Before ExecuTorch plans its memory, it is changed so that
less has to stay from the forward pass to the backward pass: see :func:`keep_less`.
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export.experimental import _export_forward_backward
from torch.fx import Graph, Node

from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.engine import Engine
from tinytl_hf.config.export import ExportConfig
from tinytl_hf.config.run import Config
from tinytl_hf.deploy.check import evaluation_images
from tinytl_hf.deploy.executorch import EXTRA, lacking
from tinytl_hf.deploy.exported import check_output, described_by, description, require, stock_backbone, write_files
from tinytl_hf.errors import TinyTLError
from tinytl_hf.measure.measured_step import random_batch
from tinytl_hf.measure.paper_rule import paper_rule
from tinytl_hf.measure.peak import measure_peak
from tinytl_hf.model import TinyTLModel
from tinytl_hf.network.lite_residual import LiteResidual
from tinytl_hf.network.methods import changing_buffers

aten = torch.ops.aten
TOLERANCE = 1e-5  # of a gradient, relative to its norm
COMPARISONS = (aten.le.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.gt.Scalar, aten.bitwise_or.Tensor)


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
    images = evaluation_images(model, data, config.batch_size)
    count = len(images.views)
    size = model.config.preprocessing.train_size
    views = F.interpolate(images.views, (size, size), mode="bilinear", antialias=True)
    views = views[torch.arange(config.batch_size) % count]
    labels = torch.arange(config.batch_size) % len(model.label_names)
    with torch.enable_grad():
        step = TrainingStep(model)
        built = build(step, views, labels)
        worst, rounding = gradient_difference(built.content, step, views, labels)
        if not worst <= max(TOLERANCE, 2 * rounding):
            raise TinyTLError(
                f"ExecuTorch's gradients differ by {worst:.1e} from PyTorch's, those by {rounding:.1e} from "
                "float64's; nothing was written"
            )
        beside = _in_pytorch(model, config.batch_size)
    about = describe(model, step, config.batch_size)
    write_files({described_by(path): (json.dumps(about, indent=2) + "\n").encode(), path: built.content})
    return "\n".join(
        [
            f"{path}: {len(built.content) / 1e6:.2f} MB, a training step of {model.config.backbone.name} by "
            f"{model.config.method} for {config.batch_size} images of {size} px; what it needs to know is in "
            f"{described_by(path).name}",
            f"checked in ExecuTorch on {images.source}: {len(about['gradients'])} gradients, largest relative "
            f"difference {worst:.1e} (of PyTorch's own from those in float64: {rounding:.1e})",
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


def build(step: TrainingStep, images: Tensor, labels: Tensor, lean: bool = True) -> Built:
    """Both passes as a program of ExecuTorch's portable kernels.

    Args:
        step: The step.
        images: An example of its batch.
        labels: Its labels.
        lean: Whether less is kept between the passes than PyTorch's graph keeps.

    Raises:
        TinyTLError: There is no kernel for an operator.
    """
    exir = require("executorch.exir", EXTRA)
    exported = torch.export.export(step, (images, labels), strict=False)
    try:
        both = _export_forward_backward(exported)
        if lean:
            keep_less(both.graph)
            both.graph_module.recompile()
        edge = exir.to_edge(both, compile_config=exir.EdgeCompileConfig(_check_ir_validity=False))
        program = edge.to_executorch()
    except Exception as error:  # it raises whatever a pass of it raises
        raise lacking(exported, error) from error
    (plan,) = (plan for plan in program.executorch_program.execution_plan if plan.name == "forward")
    return Built(bytes(program.buffer), sum(plan.non_const_buffer_sizes))


def keep_less(graph: Graph) -> None:
    """Change the graph of both passes, in place, so that fewer and smaller maps live until the backward pass.

    The gradient of a frozen convolution's input needs its weight only: it becomes a transposed convolution, which does
    not name the input as ``convolution_backward`` does. And which side of a threshold a value is on is noted in the
    forward pass, in a byte, so that the value itself is free.
    """
    for node in list(graph.nodes):
        arguments: Any = node.args
        if node.target is aten.convolution_backward.default and not arguments[-1][1]:
            _backward_without_input(graph, node)
        elif node.target is aten.max_pool2d_with_indices_backward.default:
            _scatter(graph, node)
        elif node.target is aten.alias.default:  # it would have the next step read the value in the backward pass
            node.replace_all_uses_with(arguments[0], lambda user: user.op != "output")
    position: dict[Node, float] = {node: i for i, node in enumerate(graph.nodes)}
    moved_behind: dict[Node, Node] = {}
    for node in list(graph.nodes):
        if node.target in COMPARISONS:
            last = max(node.all_input_nodes, key=position.__getitem__)
            if last.op != "placeholder":
                before = moved_behind.get(last, last)
                before.append(node)
                moved_behind[last] = node
                position[node] = position[before] + 1e-6
    graph.eliminate_dead_code()
    graph.lint()


def _backward_without_input(graph: Graph, node: Node) -> None:
    """Replace a backward convolution of which only the gradients of input and bias are used."""
    arguments: Any = node.args
    grad, input, weight, _, stride, padding, dilation, transposed, _, groups, _ = arguments
    if transposed:
        return
    sizes = (input.meta["val"].shape[2:], grad.meta["val"].shape[2:], weight.meta["val"].shape[2:])
    left_over = [
        n - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
        for n, out, k, s, p, d in zip(*sizes, stride, padding, dilation, strict=True)
    ]
    for item in list(node.users):
        with graph.inserting_before(item):
            if item.args[1] == 0:
                options = (grad, weight, None, stride, padding, dilation, True, left_over, groups)
                new = graph.call_function(aten.convolution.default, options)
            else:
                new = graph.call_function(aten.sum.dim_IntList, (grad, [0, 2, 3]))
        new.meta = {**item.meta}
        name = item.name
        item.replace_all_uses_with(new)
        graph.erase_node(item)
        new.name = name  # the program's signature names its outputs
    graph.erase_node(node)


def _scatter(graph: Graph, node: Node) -> None:
    """Replace the backward pass of max pooling: ExecuTorch's kernel adds to memory that it has not cleared.

    (Seen in 1.5.1.) It needs the indices of the largest values alone, not the values.
    """
    arguments: Any = node.args
    grad, input, *_, indices = arguments
    n, c, height, width = input.meta["val"].shape
    with graph.inserting_before(node):
        zeros = _call(graph, aten.full.default, [n, c, height * width], 0.0)
        flat = [_call(graph, aten.view.default, part, [n, c, -1]) for part in (indices, grad)]
        added = _call(graph, aten.scatter_add.default, zeros, 2, *flat)
        new = _call(graph, aten.view.default, added, [n, c, height, width])
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _call(graph: Graph, target: Any, *args: Any) -> Node:
    """A new node, with the shape and type of what it gives."""
    node = graph.call_function(target, args)
    mode = next(n.meta["val"].fake_mode for n in graph.nodes if n.op == "placeholder")
    with mode:
        node.meta["val"] = target(*(arg.meta["val"] if isinstance(arg, Node) else arg for arg in args))
    return node


def gradient_difference(content: bytes, step: TrainingStep, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """The largest relative difference of a gradient in ExecuTorch from PyTorch's, and of PyTorch's from float64.

    Of millions of activations some are within rounding of a ReLU's edge. On which side they fall makes more than the
    tolerance, in PyTorch's own gradients as well.
    """
    training = require("executorch.extension.training", EXTRA)
    ours, exact = _gradients(step, images, labels), _gradients(deepcopy(step).double(), images.double(), labels)
    module = training._load_for_executorch_for_training_from_buffer(content)
    module.forward_backward("forward", [images, labels])
    theirs = module.named_gradients()
    if theirs.keys() != ours.keys():
        raise TinyTLError(f"ExecuTorch gives {len(theirs)} gradients in place of {len(ours)}; nothing was written")
    scale = max(float(gradient.norm()) for gradient in ours.values())
    # One that is zero but for rounding is compared with the largest.
    floors = {name: max(float(gradient.norm()), 1e-3 * scale) for name, gradient in ours.items()}
    worst, rounding = (
        max(float((other[name] - gradient).norm()) / floors[name] for name, gradient in ours.items())
        for other in (theirs, exact)
    )
    return worst, rounding


def _gradients(step: TrainingStep, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """PyTorch's gradients of what trains, by name."""
    wanted = {name: p for name, p in step.named_parameters() if p.requires_grad}
    loss, _ = step(images, labels)
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))


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
