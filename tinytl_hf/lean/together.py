"""Modules that train as one, as long as all of them are in training mode; else each does its own work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from tinytl_hf.network.blocks import TinyTLBlock
from tinytl_hf.network.kinds import has_own_forward


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at what a module is given or gives, or at its gradients, or replaced its forward pass."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(hooks) or has_own_forward(module)


def is_watched(unit: nn.Module) -> bool:
    """Whether somebody looks at a block or layer, or at a block's lite residual."""
    lite = unit.lite_residual if isinstance(unit, TinyTLBlock) else None
    return has_hooks(unit) or (lite is not None and has_hooks(lite))


@dataclass(frozen=True, eq=False)
class Together:
    """The training pass of one of several modules that train as one.

    A user can put some of them in evaluation mode, a stem say, or hook them; they then do their own work.

    Attributes:
        members: All of them.
        as_one: What this one does while all of them train: the work of all, or nothing.
        alone: Its own work.
    """

    members: tuple[nn.Module, ...]
    as_one: Callable[[Tensor], Tensor]
    alone: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """As the module, or as all of them."""
        apart = any(not member.training or is_watched(member) for member in self.members)
        return self.alone(x) if apart else self.as_one(x)


def done_by_another(x: Tensor) -> Tensor:
    """The pass of a module whose work another one does: it gives what it gets."""
    return x
