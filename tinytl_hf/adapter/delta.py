"""The delta in memory: which tensors of a backbone it is, and how it is copied in."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tinytl_hf.errors import TinyTLError
from tinytl_hf.network.head import Head, head_of
from tinytl_hf.network.lite_residual import LiteResidual
from tinytl_hf.network.methods import changing_buffers, check_trained, trained_names
from tinytl_hf.words import counted


def adapter_tensors(backbone: nn.Module) -> dict[str, Tensor]:
    """The tensors that make up the delta: parameters that the method trains and buffers that training can change."""
    buffers, trained = changing_buffers(backbone), trained_names(backbone)
    tensors = {name: p.detach() for name, p in backbone.named_parameters() if name in trained}
    tensors.update({name: buffer for name, buffer in backbone.named_buffers() if name in buffers})
    return tensors


class Complete(NamedTuple):
    """What a network is made of whose adapter can be loaded.

    Attributes:
        shapes: Those of the delta's tensors.
        names: All its parameters and buffers.
        head: Name of its head.
    """

    shapes: dict[str, torch.Size]
    names: frozenset[str]
    head: str


def remember_complete(backbone: nn.Module) -> None:
    """Note what a new network is made of, for :func:`check_complete`; copies of the network have it too."""
    shapes = {name: tensor.shape for name, tensor in adapter_tensors(backbone).items()}
    vars(backbone)["complete"] = Complete(shapes, _names(backbone), head_of(backbone)[0])


def check_complete(backbone: nn.Module) -> None:
    """Raise unless a network has the tensors that it was built with: another one's adapter could not be loaded.

    Raises:
        TinyTLError: A layer was added, replaced, tied or parametrized; with the name of a tensor.
    """
    complete: Complete = vars(backbone)["complete"]
    own, names = adapter_tensors(backbone), _names(backbone)
    for name, shape in complete.shapes.items():
        if name not in own or own[name].shape != shape:
            raise _not_loadable(name, "is not in the network any more" if name not in own else "has another shape")
    for name in sorted(complete.names - names):
        raise _not_loadable(name, "is not in the network any more")
    for name in sorted(names - complete.names):
        raise _not_loadable(name, "came into the network")


def check_trains(backbone: nn.Module, method: str, whole: bool = True) -> None:
    """Raise if what trains could not be saved.

    What is parametrized for a while can be put back before saving, and is no matter here.

    Args:
        backbone: The network.
        method: Its method, for the message.
        whole: Look for another head, for other norms and for added parameters too, which takes longer.

    Raises:
        TinyTLError: With the name of a parameter or a layer.
    """
    if whole:
        _check_head_and_norms(backbone)
    check_trained(backbone, method, whole)


def _check_head_and_norms(backbone: nn.Module) -> None:
    for name, module in backbone.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise TinyTLError(
                f"{name} is a SyncBatchNorm, and the norm that the method has there is not in the network any more; "
                "leave convert_sync_batchnorm out: norms that use statistics of the batch take them over all processes"
            )
    complete: Complete = vars(backbone)["complete"]
    trains = {name: parameter.shape for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    beside_head = {name for name in complete.shapes if not name.startswith(f"{complete.head}.")}
    if not any(isinstance(module, Head) for module in backbone.modules()) and trains.keys() - beside_head:
        head_of(backbone)  # raises; a network without any head may train, for its features
    for name, shape in trains.items():
        if complete.shapes.get(name, shape) != shape:
            raise _not_loadable(name, "has another shape")


def _names(backbone: nn.Module) -> frozenset[str]:
    return frozenset([*dict(backbone.named_parameters()), *dict(backbone.named_buffers())])


def _not_loadable(name: str, what: str) -> TinyTLError:
    return TinyTLError(
        f"{name} {what}, as a layer was added, replaced, tied or parametrized, and an adapter of such a network could "
        "not be loaded; undo that before saving (torch.nn.utils.parametrize.remove_parametrizations, prune.remove)"
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
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise TinyTLError(f"{source}: use tensors by name, as adapter_tensors() gives them")
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
