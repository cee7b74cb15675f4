"""The parts of a network whose training pass was worked out ahead, and what would make it another network's."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torchvision.ops import StochasticDepth

from tinytl_hf.errors import TinyTLError
from tinytl_hf.network.head import Head
from tinytl_hf.network.kinds import class_name, has_own_forward

DROP_PATH = "timm.layers.drop.DropPath"
FIX = "build the model with lean=False for that"


@dataclass(frozen=True)
class Parts:
    """What a network was made of when its training pass was worked out.

    Attributes:
        places: Each module with the one that holds it, and its name there; without those that hold the head.
        orders: Sequences, and the names of what they run.
        again: Modules that the backward pass runs a second time.
        bypassed: Modules whose own forward pass is not called, and what class each was of.
        geometries: Convolutions whose geometry was worked with, and what it was.
    """

    places: tuple[tuple[nn.Module, str, nn.Module], ...]
    orders: tuple[tuple[nn.Sequential, tuple[str, ...]], ...]
    again: frozenset[nn.Module]
    bypassed: tuple[tuple[nn.Module, type[nn.Module]], ...]
    geometries: tuple[tuple[nn.Conv2d, tuple[Any, ...]], ...]


def remember_parts(
    backbone: nn.Module,
    again: Collection[nn.Module],
    bypassed: Iterable[nn.Module],
    convolutions: Iterable[nn.Conv2d],
) -> None:
    """Note what a network is made of, for :func:`check_parts`; copies of the network have it too.

    Args:
        backbone: The network.
        again: Modules that the backward pass runs a second time.
        bypassed: Modules whose work another one does in training, which does not call them.
        convolutions: Those that train by chains, whose geometry is worked out once.
    """
    with_head = {module for module in backbone.modules() if any(isinstance(part, Head) for part in module.modules())}
    places = tuple(
        (module, name, child)
        for module in backbone.modules()
        for name, child in module._modules.items()
        if child is not None and child not in with_head
    )
    orders = tuple(
        (module, tuple(module._modules))
        for module in backbone.modules()
        if isinstance(module, nn.Sequential) and module not in with_head
    )
    geometries = tuple((conv, _geometry(conv)) for conv in convolutions)
    kinds = tuple((module, type(module)) for module in bypassed)
    vars(backbone)["lean_parts"] = Parts(places, orders, frozenset(again), kinds, geometries)


def check_parts(backbone: nn.Module) -> None:
    """Raise if a network is not made of what its training pass was worked out for.

    Raises:
        TinyTLError: A layer was replaced, added or taken out, has another forward pass by now, or draws random numbers
            where it runs twice.
    """
    parts: Parts | None = vars(backbone).get("lean_parts")
    if parts is None:
        return
    for holder, name, child in parts.places:
        if holder._modules.get(name) is not child:
            raise TinyTLError(
                f"{_name_of(backbone, holder)}{name} ({type(child).__name__}) is not in the network any more, whose "
                f"lean training pass would still run it; {FIX}"
            )
    for sequence, names in parts.orders:
        if tuple(sequence._modules) != names:
            raise TinyTLError(
                f"{_name_of(backbone, sequence).rstrip('.')}: layers were added or taken out, which the lean training "
                f"pass does not know; {FIX}"
            )
    for module, kind in parts.bypassed:
        if has_own_forward(module) or type(module).forward is not kind.forward:
            raise TinyTLError(
                f"{_name_of(backbone, module).rstrip('.')} ({kind.__name__}): its forward pass was replaced, and the "
                "lean training pass would not call it; other forward passes and weights that are offloaded take "
                "model.eval() or lean=False"
            )
    for conv, geometry in parts.geometries:
        if _geometry(conv) != geometry:
            raise TinyTLError(
                f"{_name_of(backbone, conv).rstrip('.')} (stride, padding, dilation, padding_mode): was "
                f"{geometry} and is {_geometry(conv)}, which the lean training pass does not know; {FIX}"
            )
    for name, module in backbone.named_modules():
        if module in parts.again and module.training and (share := _dropped(module)):
            raise TinyTLError(
                f"{name} ({type(module).__name__}) drops at random (p={share:g}), "
                f"and the backward pass would run it again with other numbers; {FIX}, or set it to 0"
            )


def _geometry(conv: nn.Conv2d) -> tuple[Any, ...]:
    return conv.stride, conv.padding, conv.dilation, conv.padding_mode


def _dropped(module: nn.Module) -> float:
    """The share that a module drops at random."""
    if isinstance(module, (_DropoutNd, StochasticDepth)):
        return float(module.p)
    return float(module.drop_prob) if class_name(type(module)) == DROP_PATH else 0.0  # type: ignore[arg-type]


def _name_of(backbone: nn.Module, module: nn.Module) -> str:
    return next((f"{name}." if name else "" for name, other in backbone.named_modules() if other is module), "")
