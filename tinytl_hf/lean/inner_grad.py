"""Gradients of a part of the work, inside a backward pass: they are added up before autograd hands them on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def inner_grad(
    outputs: Sequence[Tensor], wanted: Sequence[Any], grads: Sequence[Tensor | None], **options: Any
) -> list[Tensor]:
    """As ``torch.autograd.grad``, without the hooks of the tensors: a user's hook on a parameter is for the sum."""
    hooked = [(tensor, tensor._backward_hooks) for tensor in wanted if isinstance(tensor, Tensor)]
    hooked = [(tensor, hooks) for tensor, hooks in hooked if hooks]
    for tensor, _ in hooked:
        tensor._backward_hooks = None
    try:
        return list(torch.autograd.grad(outputs, wanted, grads, **options))
    finally:
        for tensor, hooks in hooked:
            tensor._backward_hooks = hooks
