"""What all formats share: the plain network that is exported, what a file says of itself, and how it is written."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tinytl_hf.adapter.build import build_network
from tinytl_hf.config.export import ExportConfig
from tinytl_hf.disk import check_ours, check_writable, expanded, write_together, writing
from tinytl_hf.errors import TinyTLError
from tinytl_hf.hub.transfer import without_paths
from tinytl_hf.lean.int8 import dequantise
from tinytl_hf.model import TinyTLModel
from tinytl_hf.version import __version__

INPUT, OUTPUT = "images", "logits"
ANOTHER = "name another path"  # where nothing can be written


class Deployed(nn.Module):
    """A model in use: the stock network, with the normalisation inside where pixels come in.

    Args:
        model: Where the weights come from; it stays as it is.
        input: ``float`` for normalised images, ``uint8`` for pixels.
        layout: ``NCHW`` or ``NHWC``.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: TinyTLModel, input: str = "float", layout: str = "NCHW") -> None:
        super().__init__()
        self.input, self.layout = input, layout
        self.backbone = stock_backbone(model)
        options = model.config.preprocessing
        mean, std = (torch.tensor(values)[:, None, None] for values in (options.mean, options.std))
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Images in the chosen type and layout to logits ``[N, classes]``."""
        return self.backbone(self.normalised(images))

    def normalised(self, images: Tensor) -> Tensor:
        """What this model gets, as normalised images ``[N, 3, S, S]``."""
        if self.layout == "NHWC":
            images = images.permute(0, 3, 1, 2)
        return images.float() * self.scale + self.shift if self.input == "uint8" else images

    def inputs_of(self, images: Tensor) -> Tensor:
        """Normalised images ``[N, 3, S, S]`` as this model gets them; pixels are rounded to whole values."""
        if self.input == "uint8":
            images = ((images - self.shift) / self.scale).round().clamp(0, 255).to(torch.uint8)
        return (images.permute(0, 2, 3, 1) if self.layout == "NHWC" else images).contiguous()


def stock_backbone(model: TinyTLModel) -> nn.Module:
    """The model's network with layers of PyTorch and torchvision or timm only, in fp32 on the CPU, as a copy.

    Raises:
        TinyTLError: It has other tensors by now than it was built with.
    """
    backbone, _ = build_network(model.config, "none")
    filled = model.backbone
    if model.config.backbone.frozen_weights == "int8":
        filled = copy.deepcopy(filled)
        dequantise(filled)
    try:
        backbone.load_state_dict(filled.state_dict())
    except RuntimeError as error:
        built, found = ({name: t.shape for name, t in net.state_dict().items()} for net in (backbone, filled))
        names = sorted(name for name in built.keys() | found.keys() if built.get(name) != found.get(name))
        raise TinyTLError(
            f"the network is not the {model.config.backbone.name} that it was built as ({', '.join(names[:2])}): undo "
            "what replaced or parametrized its layers before it is exported (parametrize.remove_parametrizations)"
        ) from error
    return backbone


def description(model: TinyTLModel, input: str, layout: str) -> dict[str, Any]:
    """What an exported file says of itself: labels, preprocessing, input and provenance."""
    config = without_paths(model.config)
    size = config.preprocessing.eval_size
    shape = [3, size, size] if layout == "NCHW" else [size, size, 3]
    return {
        "labels": config.label_names,
        "preprocessing": asdict(config.preprocessing),
        "input": {"name": INPUT, "type": input, "layout": layout, "shape": shape},
        "backbone": config.backbone.name,
        "method": config.method,
        "adapter_config": json.loads(config.to_json()),
        "tinytl_hf_version": __version__,
        "torch_version": torch.__version__,
    }


def require(module: str, extra: str) -> ModuleType:
    """Import a module of an optional package.

    Raises:
        TinyTLError: It is not installed; names the extra that brings it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise TinyTLError(
            f"format={extra}: the package {package} is not installed ({error}); run pip install 'tinytl-hf[{extra}]'"
        ) from error


def check_output(config: ExportConfig) -> Path:
    """The path to write to, once it is known that something can be written there.

    Raises:
        TinyTLError: There is something already that is not to be replaced or is no export, or the folder around it
            cannot be made or written.
    """
    path = expanded(config.output)
    for target in (path, described_by(path)) if config.format == "executorch" else (path,):
        if not os.path.lexists(target):  # a link that leads nowhere is somebody's all the same
            continue
        is_other = target.is_dir() != (config.format == "timm")
        if is_other and target.exists():
            kind = "a folder" if target.is_dir() else "no folder"
            raise TinyTLError(f"output={target}: exists and is {kind}, so no {config.format} export; name another")
        if is_other or not config.overwrite:
            raise TinyTLError(f"output={target}: exists; name another, or replace an export with --overwrite true")
    if config.format == "executorch":
        check_ours("output", described_by(path), '"adapter_config"')  # nobody named that file
    with writing(f"output={path}", ANOTHER):
        check_writable(path)
    return path


def no_room(what: str, error: Exception) -> TinyTLError:
    """That nothing can be tried out before it is written, as there is no room where files go that nobody keeps."""
    place = tempfile.tempdir or "any folder for temporary files"  # None where none could be written
    return TinyTLError(
        f"{what}: there is no room in {place} to try it out ({error}); name a folder with more in TMPDIR"
    )


def described_by(path: Path) -> Path:
    """The .json file beside a .pte file."""
    return path.with_suffix(".json")


def write_with_description(path: Path, content: bytes, about: Mapping[str, Any]) -> None:
    """Write a .pte file and the .json file beside it, as of :func:`write_files`."""
    write_files(path, {described_by(path): (json.dumps(about, indent=2) + "\n").encode(), path: content})


def write_files(output: Path, files: Mapping[Path, bytes]) -> None:
    """Write the files of an export: all of them or, where one cannot be written, none.

    Args:
        output: The file or the folder that was asked for.
        files: What goes where.

    Raises:
        TinyTLError: One cannot be written.
    """
    with writing(f"output={output}", ANOTHER):
        write_together(files)


def layer_of(node: torch.fx.Node) -> str:
    """The layer that an operator of an exported graph belongs to, by its name in the network."""
    stack = node.meta.get("nn_module_stack") or {}
    name = list(stack.values())[-1][0] if stack else ""
    return name.removeprefix("L['self'].").removeprefix("backbone.") or "the network"
