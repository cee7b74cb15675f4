"""Classes by their full name, so that a table can name those of a package that is an extra without importing it."""

from __future__ import annotations


def class_name(kind: type) -> str:
    """A class's module and name: ``torchvision.models.resnet.BasicBlock``. Subclasses have one of their own."""
    return f"{kind.__module__}.{kind.__qualname__}"
