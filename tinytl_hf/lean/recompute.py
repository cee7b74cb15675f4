"""A frozen block of any kind, slice by slice: it keeps its input alone, and is computed again for the backward pass.

Where statistics are frozen, the images of a batch do not depend on one another. So a block whose activations need
their input for the gradient (hardswish, SiLU, squeeze-and-excitation) can keep nothing but its own, narrow input:
the backward pass runs the block again for a few images, with autograd, and goes back through it. Its wide maps
exist for those images only. The gradients are exact; the price is one more forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tinytl_hf.lean.again import autocast_on, computed_again
from tinytl_hf.lean.chain import Chain
from tinytl_hf.lean.function import LeanFunction, once_differentiable
from tinytl_hf.lean.inner_grad import inner_grad
from tinytl_hf.lean.layers import LeanConv2d, LeanConvNormActivation
from tinytl_hf.lean.operators import check_own, versions_of
from tinytl_hf.lean.slices import Gathered, even_slices, slice_mb_on
from tinytl_hf.lean.together import Together
from tinytl_hf.network.blocks import own_modules, own_parameters

# Of the slices of a chain, as autograd keeps several maps of a slice at a time; a run of blocks keeps so little of the
# batch that it can afford more of a slice.
SHARE_OF_CHAIN = 0.8
SHARE_FOR_RUNS = 1.2


@dataclass(frozen=True, eq=False)
class Recomputed:
    """The training pass of a module whose images do not depend on one another.

    Attributes:
        module: The module.
        run: Its stock forward pass, ``[N, C, H, W]`` to ``[N, C', H', W']``.
        slice_mb: The engine's slices: about how much of the widest map of a chain exists at a time, in MB.
        share: The share of ``slice_mb`` that the widest map of a slice takes here.
        widest: Values of the largest map inside the module for one image, by the shape of its input.
    """

    module: nn.Module
    run: Callable[[Tensor], Tensor]
    slice_mb: float | None
    share: float = SHARE_OF_CHAIN
    widest: dict[torch.Size, int] = field(default_factory=dict)

    @torch.compiler.disable  # no graph can hold a second pass, slice by slice: one ends before it, and another follows
    def __call__(self, x: Tensor) -> Tensor:
        """As the module."""
        held = own_parameters(self.module)
        return _RecomputeFunction.apply(x, self, held, *(parameter for parameter in held if parameter.requires_grad))

    def slices(self, x: Tensor) -> Iterator[slice]:
        """Ranges of the batch whose widest map takes a share of ``slice_mb``."""
        if len(x) == 0:
            yield slice(0, 0)
            return
        if x.shape[1:] not in self.widest:
            self.widest[x.shape[1:]] = self._measure_widest(x[:1])
        image_bytes = self.widest[x.shape[1:]] * x.element_size()
        yield from even_slices(len(x), image_bytes, self.share * slice_mb_on(x.device, self.slice_mb))

    @torch.no_grad()
    def _measure_widest(self, image: Tensor) -> int:
        """Values of the largest map inside the module, for one image."""
        found = [image.numel()]

        def look(part: nn.Module, inputs: tuple[Any, ...], maps: Any) -> None:
            found.append(maps.numel() if isinstance(maps, Tensor) else 0)
            path = part.chain if isinstance(part, (LeanConv2d, LeanConvNormActivation)) else None
            path = path.as_one if isinstance(path, Together) else path
            if isinstance(path, Chain):
                found.extend(map(math.prod, path.map_sizes(inputs[0].shape)))

        hooks = [part.register_forward_hook(look) for part in own_modules(self.module)]
        try:
            found.append(self.run(image).numel())
        finally:
            for hook in hooks:
                hook.remove()
        return max(found)


class _RecomputeFunction(LeanFunction):
    """The module's output; keeps its input only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, path: Recomputed, held: list[nn.Parameter], *trained: nn.Parameter) -> Tensor:
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x)
        ctx.path, ctx.held, ctx.autocast = path, held, autocast_on(x.device)
        ctx.versions, ctx.trains = versions_of(held), [parameter.requires_grad for parameter in held]
        output = Gathered(len(x))
        for part in path.slices(x):
            output.put(part, path.run(x[part]).contiguous(memory_format=torch.channels_last))
        assert output.whole is not None
        # A view that is made here, of a layer norm say, would keep what follows from writing over it.
        return output.whole.clone() if output.whole._is_view() else output.whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        needs_input, own = ctx.needs_input_grad[0], own_parameters(ctx.path.module)
        check_own(ctx.held, own, ctx.versions)
        trained = [parameter for parameter, trains in zip(own, ctx.trains, strict=True) if trains]
        ctx.trained = [parameter for parameter in trained if parameter.requires_grad]  # not what was frozen since then
        grad_input, totals = Gathered(len(x)), [torch.zeros_like(parameter) for parameter in ctx.trained]
        for part in ctx.path.slices(x):
            of_input = _slice_backward(ctx, x[part], grad[part], needs_input, totals)
            if of_input is not None:
                grad_input.put(part, of_input)
            del of_input  # so that it is gone while the next slice runs
        of_trained = dict(zip(ctx.trained, totals, strict=True))
        return grad_input.whole, None, None, *(of_trained.get(parameter) for parameter in trained)


def _slice_backward(ctx: Any, x: Tensor, grad: Tensor, needs_input: bool, totals: Sequence[Tensor]) -> Tensor | None:
    """The gradient of a slice's input, if needed; those of the trained parameters are added to ``totals``."""
    with computed_again(x.device, ctx.autocast):
        inputs = x.detach().requires_grad_(needs_input)
        maps = ctx.path.run(inputs)
    wanted = [*([inputs] if needs_input else []), *ctx.trained]
    found = inner_grad([maps], wanted, [grad])
    of_input = found.pop(0).contiguous(memory_format=torch.channels_last) if needs_input else None
    for total, gradient in zip(totals, found, strict=True):
        total += gradient
    return of_input
