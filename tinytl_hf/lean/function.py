"""What all autograd functions of the engine share: they say where PyTorch cannot rewrite them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.fx import Proxy
from torch.jit import is_tracing  # type: ignore[attr-defined]

from tinytl_hf.errors import TinyTLError

FIX = "call model.eval() first, or build the model with lean=False"


class LeanFunction(Function):
    """An autograd function that runs, or is refused, with the fix."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """As of any autograd function.

        Raises:
            TinyTLError: As of :func:`check_runs`; or ``torch.func`` transforms the pass.
        """
        check_runs(args[0])
        try:
            return super().apply(*args)
        except RuntimeError as error:
            if _is_transformed():
                raise TinyTLError(f"torch.func: it cannot transform a lean model in training mode; {FIX}") from error
            raise


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """As PyTorch's decorator of that name, whose error does not say what to do."""

    @wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return found
        of_inputs = found if isinstance(found, tuple) else (found,)
        return _NotTwice.apply(torch.zeros((), requires_grad=True), *of_inputs)

    return run


class _NotTwice(Function):
    """What it is given, of which there is no gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *of_inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        return of_inputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise TinyTLError(
            "create_graph=True: a lean model has no gradients of gradients; build the model with lean=False for that"
        )


def check_runs(x: object) -> None:
    """Raise where a training pass is written down, not run.

    Args:
        x: Its input, or the shape of that.

    Raises:
        TinyTLError: ``torch.jit.trace`` or ``torch.fx`` is at work.
    """
    is_symbol = isinstance(x, Proxy)
    if is_symbol or is_tracing():
        name = "torch.fx" if is_symbol else "torch.jit.trace"
        raise TinyTLError(f"{name}: a lean model in training mode is no graph that it can write down; {FIX}")


class _Untransformed(Function):
    """A function without what ``torch.func`` asks for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()


def _is_transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work, which alone refuses such a function."""
    try:
        _Untransformed.apply(torch.empty(0))
    except RuntimeError:
        return True
    return False
