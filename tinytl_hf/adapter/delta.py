"""The delta in memory: which tensors of a backbone it is, and how it is copied in."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

import torch
from torch import Tensor, nn

from tinytl_hf.errors import TinyTLError
from tinytl_hf.network.lite_residual import LiteResidual
from tinytl_hf.network.methods import changing_buffers, trained_names
from tinytl_hf.words import counted


def adapter_tensors(backbone: nn.Module) -> dict[str, Tensor]:
    """The tensors that make up the delta: parameters that the method trains and buffers that training can change."""
    buffers, trained = changing_buffers(backbone), trained_names(backbone)
    tensors = {name: p.detach() for name, p in backbone.named_parameters() if name in trained}
    tensors.update({name: buffer for name, buffer in backbone.named_buffers() if name in buffers})
    return tensors


def remember_complete(backbone: nn.Module) -> None:
    """Note what a new network's delta consists of, for :func:`check_complete`; copies of the network have it too."""
    vars(backbone)["delta_shapes"] = {name: tensor.shape for name, tensor in adapter_tensors(backbone).items()}


def check_complete(backbone: nn.Module) -> None:
    """Raise unless the delta still has all its tensors: an adapter without one could not be loaded.

    Raises:
        TinyTLError: A layer was replaced or parametrized; with the name of a tensor.
    """
    shapes, own = vars(backbone)["delta_shapes"], adapter_tensors(backbone)
    for name, shape in shapes.items():
        if name not in own or own[name].shape != shape:
            raise TinyTLError(
                f"{name} {'is not in the network any more' if name not in own else 'has another shape'}, as a layer "
                "was replaced or parametrized, and an adapter without it could not be loaded; undo that before saving "
                "(torch.nn.utils.parametrize.remove_parametrizations, prune.remove)"
            )


def frozen_tensors(backbone: nn.Module) -> dict[str, Tensor]:
    """The tensors that come with the backbone and never change, as they are in its modules."""
    delta = adapter_tensors(backbone)
    lite = tuple(f"{name}." for name, module in backbone.named_modules() if isinstance(module, LiteResidual))
    tensors = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name not in delta and not name.startswith(lite) and not name.endswith("num_batches_tracked")
    }


def check_values(tensors: Mapping[str, Tensor]) -> None:
    """Raise unless tensors hold values: those of the meta device are read as nothing, and written to in silence.

    Raises:
        TinyTLError: One does not, with the fix.
    """
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise TinyTLError(
                f"{name} is on the meta device, and holds no values; build the model on another, or, where weights "
                "are offloaded, call accelerate.hooks.remove_hook_from_module(model, recurse=True) first"
            )


def load_tensors(backbone: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy a delta into ``backbone``, after checking all of it.

    Raises:
        TinyTLError: Missing, unexpected or misshapen tensors, or no memory to copy them to; nothing was copied.
    """
    check_values(own := adapter_tensors(backbone))
    check_tensors(backbone, tensors, source)
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def check_tensors(backbone: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise unless ``tensors`` are a delta of ``backbone``, which may be on the meta device.

    Raises:
        TinyTLError: Missing, unexpected, misshapen or damaged tensors.
    """
    own = adapter_tensors(backbone)
    shared = own.keys() & tensors.keys()
    of_own_type = {name for name in shared if own[name].dtype == tensors[name].dtype}
    problems = {
        "missing": sorted(own.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - own.keys()),
        "of another shape": sorted(n for n in shared if own[n].shape != tensors[n].shape),
        "of another type": sorted(shared - of_own_type),
        "not finite": sorted(n for n in of_own_type if not is_finite(tensors[n])),
    }
    for what, names in problems.items():
        if names:
            raise TinyTLError(
                f"{source}: {counted(len(names), 'tensor is', 'tensors are')} {what}, such as {names[0]}; the "
                "file does not belong to this adapter_config.json"
            )


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither infinities nor NaN, which comes out of the least and the largest value too."""
    return tensor.numel() == 0 or all(map(isfinite, torch.stack(tensor.aminmax()).tolist()))
