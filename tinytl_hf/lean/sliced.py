"""A training pass that goes through the batch slice by slice, forward and backward, with a graph for each slice.

A graph of the whole batch would hold several maps of it at a time (the parts of a sum, say) and, in the backward pass,
their gradients. Here such maps exist for one slice only, and the batch has one output and one gradient. Nothing is
computed again: what the slices' graphs keep is saved by this function, so that autograd frees it as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from tinytl_hf.lean.function import LeanFunction, once_differentiable
from tinytl_hf.lean.inner_grad import inner_grad
from tinytl_hf.lean.slices import Gathered


def in_slices(
    run: Callable[[Tensor], Tensor], x: Tensor, slices: Sequence[slice], trained: Sequence[Tensor]
) -> Tensor:
    """``run(x)``, for a ``run`` in which images do not depend on one another.

    Args:
        run: A function of maps ``[N, C, H, W]``, which keeps little.
        x: The whole batch.
        slices: Ranges of it, which make it up.
        trained: The parameters in ``run`` that train.
    """
    if torch.is_grad_enabled():
        return _SlicedFunction.apply(x, run, slices, *trained)
    output = Gathered(len(x))
    for part in slices:
        output.put(part, run(x[part]))
    assert output.whole is not None
    return output.whole


class _SlicedFunction(LeanFunction):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], slices: Sequence[slice], *trained: Tensor
    ) -> Tensor | None:
        kept: list[Tensor] = []
        unpacked: list[Tensor] = []  # what ``kept`` was, while the backward pass runs

        def pack(tensor: Tensor) -> int:
            kept.append(tensor)
            return len(kept) - 1

        needs_input, whole, output, edges = ctx.needs_input_grad[0], x.detach(), Gathered(len(x)), []
        for part in slices:
            with torch.enable_grad(), saved_tensors_hooks(pack, lambda number: unpacked[number]):
                inputs = _Entry.apply(torch.zeros((), requires_grad=True), whole[part]) if needs_input else whole[part]
                maps = run(inputs)
            ends = [get_gradient_edge(inputs)] if needs_input else []
            edges.append((get_gradient_edge(maps) if maps.requires_grad else None, ends))
            output.put(part, maps.detach())
        ctx.save_for_backward(*kept)
        ctx.slices, ctx.edges, ctx.trained, ctx.unpacked = slices, edges, trained, unpacked
        return output.whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        trained = [parameter for parameter in ctx.trained if parameter.requires_grad]  # not what was frozen since then
        grad_input, totals = Gathered(len(grad)), [torch.zeros_like(parameter) for parameter in trained]
        ctx.unpacked.extend(ctx.saved_tensors)
        for part, (start, ends) in zip(ctx.slices, ctx.edges, strict=True):
            # The graph itself is small. What it keeps goes when this function's own saved tensors do.
            found = inner_grad([start], [*ends, *trained], [grad[part]], retain_graph=True)
            if ends:
                grad_input.put(part, found[0])
            for total, gradient in zip(totals, found[len(ends) :], strict=True):
                total += gradient
        ctx.unpacked.clear()
        of_trained = dict(zip(trained, totals, strict=True))
        return grad_input.whole, None, None, *(of_trained.get(parameter) for parameter in ctx.trained)


class _Entry(LeanFunction):
    """Where a slice's graph begins: a node that does not hold the slice, as a leaf of the graph would."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, maps: Tensor) -> Tensor:
        return maps.view_as(maps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None
