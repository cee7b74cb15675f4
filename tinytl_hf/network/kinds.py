"""Classes by their full name, so that a table can name those of a package that is an extra without importing it."""

from __future__ import annotations

from types import MethodType

from torch import nn


def class_name(kind: type) -> str:
    """A class's module and name: ``torchvision.models.resnet.BasicBlock``. Subclasses have one of their own."""
    return f"{kind.__module__}.{kind.__qualname__}"


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody gave a module another forward pass than its class has; one that was put back is none."""
    own = vars(module).get("forward")
    return own is not None and own != MethodType(type(module).forward, module)  # a compiled graph asks the first alone
