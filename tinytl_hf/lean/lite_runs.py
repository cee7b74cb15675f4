"""One or two wide blocks with lite residuals, of which one input is kept, and which are computed again as one.

A lite residual normalises over the batch, so its backward pass takes the whole batch at once. The blocks themselves
go back slice by slice. A run has two of them at most: then the blocks are computed again once. The last lite residual
goes back before that pass, which needs its gradient, from its pooled input, which is kept. The first one goes back
after the pass, from a gradient that the pass collects; what that gives goes back through the layers before the block
alone. Of the first one the output is kept, which the pass needs: its input is no smaller, and takes less to compute
again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from tinytl_hf.errors import TinyTLError
from tinytl_hf.lean.again import autocast_on, computed_again
from tinytl_hf.lean.function import LeanFunction, once_differentiable
from tinytl_hf.lean.inner_grad import inner_grad
from tinytl_hf.lean.layers import upsample_add, upsample_gradient
from tinytl_hf.lean.operators import check_own, versions_of
from tinytl_hf.lean.paths import LeanBlockPath
from tinytl_hf.lean.recompute import SHARE_FOR_RUNS, Recomputed
from tinytl_hf.lean.slices import Gathered
from tinytl_hf.network.blocks import TinyTLBlock, own_parameters
from tinytl_hf.network.norms import keep_running_statistics


@dataclass(frozen=True, eq=False)
class Part:
    """A block with a lite residual, and the layers between it and the block before it.

    Attributes:
        head: These layers.
        block: The block.
        path: Its training pass.
    """

    head: nn.Sequential
    block: TinyTLBlock
    path: LeanBlockPath

    def main(self, maps: Tensor) -> Tensor:
        """The layers and the block, without its lite residual."""
        return self.block.stock_forward(self.head(maps))


@dataclass(frozen=True, eq=False)
class Mains:
    """Blocks and layers one after the other, without lite residuals."""

    parts: Sequence[Part]

    def __call__(self, maps: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the last block's output."""
        for part in self.parts:
            maps = part.main(maps)
        return maps


@dataclass(frozen=True, eq=False)
class LiteRun:
    """The training pass of one or two blocks with lite residuals and what stands before them.

    Attributes:
        parts: The blocks.
        mains: All of the run but for the lite residuals; gives the slices.
    """

    parts: Sequence[Part]
    mains: Recomputed

    @classmethod
    def of(cls, units: list[nn.Module], slice_mb: float | None) -> LiteRun:
        """A run of ``units``: layers and, at the end and at most at one other place, blocks with lite residuals."""
        parts: list[Part] = []
        head: list[nn.Module] = []
        for unit in units:
            if isinstance(unit, TinyTLBlock):
                assert isinstance(unit.lean_path, LeanBlockPath)
                parts.append(Part(nn.Sequential(*head), unit, unit.lean_path))
                head = []
            else:
                head.append(unit)
        return cls(parts, Recomputed(nn.Sequential(*units), Mains(parts), slice_mb, SHARE_FOR_RUNS))

    @torch.compiler.disable  # as :class:`~tinytl_hf.lean.recompute.Recomputed` is
    def __call__(self, x: Tensor) -> Tensor:
        """As the blocks and layers."""
        return _LiteRunFunction.apply(x, self, *self.all_trained())

    def norms(self) -> list[nn.Module]:
        """The norms of the lite residuals."""
        return [norm for part in self.parts for norm in (part.path.branch.lite.norm1, part.path.branch.lite.norm2)]

    def trained(self) -> list[nn.Parameter]:
        """The trained parameters of all but the lite residuals."""
        return [p for unit in self.mains.module.children() for p in own_parameters(unit) if p.requires_grad]

    def all_trained(self) -> list[nn.Parameter]:
        """The same, then those of the lite residuals."""
        return [*self.trained(), *(parameter for part in self.parts for parameter in _of_lite(part))]


@contextmanager
def _in_modes(norms: Sequence[nn.Module], modes: Sequence[bool]) -> Iterator[None]:
    """Within it, norms are in the modes that they were in forward: a user may have called ``eval()`` since then."""
    now = [norm.training for norm in norms]
    for norm, mode in zip(norms, modes, strict=True):
        norm.training = mode
    try:
        yield
    finally:
        for norm, mode in zip(norms, now, strict=True):
            norm.training = mode


def _of_lite(part: Part) -> list[nn.Parameter]:
    return [parameter for parameter in part.path.branch.lite.parameters() if parameter.requires_grad]


class _LiteRunFunction(LeanFunction):
    """The run's output; keeps its input, the output of the first of two lite residuals and the input of the last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: LiteRun, *trained: nn.Parameter) -> Tensor:
        ctx.run, ctx.held, ctx.autocast = run, list(run.mains.module.parameters()), autocast_on(x.device)
        ctx.versions, ctx.modes = versions_of(ctx.held), [norm.training for norm in run.norms()]
        maps, small, statistics = x, [], []
        for part in run.parts:
            into = part.head(maps)
            pooled = part.path.pooled(into)
            maps = part.path.main(into)
            del into
            output, of_batch = part.path.branch.with_statistics(pooled)
            small.append(output)
            statistics.append(of_batch)
            maps = upsample_add(maps, output, part.path.branch.backend)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, pooled, *small[:-1], *(vector for of_batch in statistics for vector in of_batch))
            ctx.vectors = [len(of_batch) for of_batch in statistics]
        return maps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, pooled, *kept = ctx.saved_tensors
        *before, last = ctx.run.parts
        small, vectors = kept[: len(before)], iter(kept[len(before) :])
        *of_before, of_last = [list(islice(vectors, count)) for count in ctx.vectors]
        if len(ctx.needs_input_grad) != 2 + len(ctx.run.all_trained()):
            raise TinyTLError(
                "parameters were frozen or set to train between the forward and the backward pass; do so before both"
            )
        check_own(ctx.held, list(ctx.run.mains.module.parameters()), ctx.versions)
        back = _Backward(ctx, x, grad.contiguous(memory_format=torch.channels_last))
        inputs, output = back.lite_again(last, pooled, of_last)
        of_output = upsample_gradient(back.grad, output, last.path.branch.backend)
        of_pooled, *of_lite = inner_grad([output], [inputs, *_of_lite(last)], [of_output])
        del output, of_output
        of_small = back.through_mains(small, of_pooled)
        for part, statistics in zip(before, of_before, strict=True):
            inputs, output = back.lite_again(part, back.first_input(), statistics)
            of_pooled, *of_first = inner_grad([output], [inputs, *_of_lite(part)], [of_small])
            back.through_head(of_pooled)
            of_lite = [*of_first, *of_lite]
        return back.grad_input, None, *back.totals, *of_lite


class _Backward:
    """One backward pass, slice by slice.

    Attributes:
        grad: The gradient of the run's output.
        grad_input: That of its input, if needed.
        trained: The trained parameters, but for the lite residuals'.
        totals: Their gradients, but for the lite residuals', as far as they have been added up.
    """

    def __init__(self, ctx: Any, x: Tensor, grad: Tensor) -> None:
        self.ctx, self.x, self.grad = ctx, x, grad
        self.run: LiteRun = ctx.run
        self.trained = ctx.run.trained()
        self.needs_input: bool = ctx.needs_input_grad[0]
        self.grad_input: Tensor | None = None
        self.totals = [torch.zeros_like(parameter) for parameter in self.trained]
        with computed_again(x.device, ctx.autocast):  # it can take a forward pass of an image to measure them
            self._slices = list(self.run.mains.slices(x))

    def lite_again(self, part: Part, pooled: Tensor, statistics: list[Tensor]) -> tuple[Tensor, Tensor]:
        """A lite residual's input, and maps of its output's shape, from which gradients go back to the input."""
        norms = self.run.norms()
        again = computed_again(self.x.device, self.ctx.autocast)
        with again, keep_running_statistics(), _in_modes(norms, self.ctx.modes):
            inputs = pooled.detach().requires_grad_()
            return inputs, part.path.branch.unread(inputs, statistics)

    def first_input(self) -> Tensor:
        """The input of the first lite residual, computed again."""
        first, pooled = self.run.parts[0], Gathered(len(self.x))
        with computed_again(self.x.device, self.ctx.autocast), torch.no_grad():
            for part in self._slices:
                pooled.put(part, first.path.pooled(first.head(self.x[part])))
        assert pooled.whole is not None
        return pooled.whole

    def through_mains(self, small: list[Tensor], of_pooled: Tensor) -> Tensor | None:
        """Back through the blocks; ``of_pooled``: the gradient of the last lite residual's input.

        Returns:
            The gradient of ``small``, the output of the first lite residual, if there are two.
        """
        grad_input, of_small = Gathered(len(self.x)), Gathered(len(self.x))
        for part in self._slices:
            *before, last = self.run.parts
            with computed_again(self.x.device, self.ctx.autocast):
                inputs = maps = self.x[part].detach().requires_grad_(self.needs_input)
                added = [each.detach()[part].requires_grad_() for each in small]
                for first, each in zip(before, added, strict=True):
                    maps = upsample_add(first.main(maps).clone(), each, first.path.branch.backend)
                into = last.head(maps)
                outputs = [last.block.stock_forward(into), last.path.pooled(into)]
            del maps, into
            wanted = [*([inputs] if self.needs_input else []), *added, *self.trained]
            found = inner_grad(outputs, wanted, [self.grad[part], of_pooled[part]])
            del outputs
            if self.needs_input:
                grad_input.put(part, found.pop(0).contiguous(memory_format=torch.channels_last))
            if small:
                of_small.put(part, found.pop(0).contiguous(memory_format=torch.channels_last))
            self._add(self.trained, found)
        self.grad_input = grad_input.whole
        return of_small.whole

    def through_head(self, of_pooled: Tensor) -> None:
        """Back from the input of the first lite residual, of which ``of_pooled`` is the gradient."""
        first = self.run.parts[0]
        trained = [p for unit in first.head for p in own_parameters(unit) if p.requires_grad]
        if not self.needs_input and not trained:
            return
        for part in self._slices:
            with computed_again(self.x.device, self.ctx.autocast):
                inputs = self.x[part].detach().requires_grad_(self.needs_input)
                pooled = first.path.pooled(first.head(inputs))
            wanted = [*([inputs] if self.needs_input else []), *trained]
            found = inner_grad([pooled], wanted, [of_pooled[part]])
            if self.grad_input is not None:
                self.grad_input[part] += found.pop(0)
            self._add(trained, found)

    def _add(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        totals = dict(zip(self.trained, self.totals, strict=True))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            totals[parameter] += gradient
