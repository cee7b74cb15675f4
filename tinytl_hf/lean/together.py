"""Modules that train as one, as long as all of them are in training mode; else each does its own work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Together:
    """The training pass of one of several modules that train as one.

    A user can put some of them in evaluation mode, a stem say, and those then do their own work.

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
        return self.as_one(x) if all(member.training for member in self.members) else self.alone(x)


@dataclass(frozen=True)
class DoneByAnother:
    """What a module does whose work another one does."""

    def __call__(self, x: Tensor) -> Tensor:
        """What it is given."""
        return x
