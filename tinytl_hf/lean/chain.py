"""A chain of frozen convolutions, each with its norm and activation, as one autograd function over slices.

The batch is worked through in slices, forward and backward, so that the wide maps inside an inverted residual
exist for one slice at a time, and masks of one bit a value are all that is kept (TinyTL, section 3.1, applied to
whole blocks).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tinytl_hf.config.engine import Engine
from tinytl_hf.lean.stage import Stage, convolve


@dataclass(frozen=True)
class Chain:
    """Stages that run one after the other.

    Attributes:
        stages: The convolutions.
        residual: Whether the input of stage ``branch`` is added at the end.
        slice_mb: About how much of the widest map exists at a time, in MB.
        branch: The stage whose input is the block's; what comes before it is a stem.
    """

    stages: tuple[Stage, ...]
    residual: bool = False
    slice_mb: float = Engine.slice_mb
    branch: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the last stage's output, keeping only what the gradients need."""
        return _ChainFunction.apply(x, self, False, *self._biases())[0]

    def with_pooled_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the mean of 2x2 px of the block's input, whose gradient then needs no tensor of its own."""
        return _ChainFunction.apply(x, self, True, *self._biases())

    def block_input_size(self, shape: torch.Size) -> tuple[int, int]:
        """Height and width of the block's input for a chain's input of ``shape``."""
        return self.input_sizes(shape)[self.branch][1:]

    def slices(self, shape: torch.Size, itemsize: int) -> Iterator[slice]:
        """Ranges of the batch whose widest map takes about ``slice_mb``."""
        images, _, height, width = shape
        if len(self.stages) == 1:  # nothing between its input and its output
            yield slice(0, images)
            return
        widest = 1
        for stage in self.stages:
            height, width = stage.output_size(height, width)
            widest = max(widest, stage.conv.out_channels * height * width * itemsize)
        yield from even_slices(images, widest, self.slice_mb)

    def input_sizes(self, shape: torch.Size) -> list[tuple[int, int, int]]:
        """Channels, height and width of each stage's input."""
        height, width = shape[2:]
        sizes = []
        for stage in self.stages:
            sizes.append((stage.conv.in_channels, height, width))
            height, width = stage.output_size(height, width)
        return sizes

    def _biases(self) -> list[Tensor | None]:
        return [stage.bias for stage in self.stages]


def even_slices(images: int, image_bytes: int, slice_mb: float) -> Iterator[slice]:
    """Ranges of a batch of ``images``, of one size as far as it goes, each of about ``slice_mb``."""
    count = max(1, int(slice_mb * 1e6) // image_bytes)
    count = -(-images // -(-images // count))
    for start in range(0, images, count):
        yield slice(start, min(start + count, images))


class _ChainFunction(Function):
    """The chain's output; keeps masks only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, chain: Chain, pools: bool, *biases: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        folded = [(stage.folded_weight(dtype), stage.folded_bias(dtype)) for stage in chain.stages]
        keeps = any(ctx.needs_input_grad)
        kept: list[Tensor | None] = []
        outputs, pooled = Gathered(x.shape[0]), Gathered(x.shape[0])
        with torch.autocast(device, enabled=False):
            for part in chain.slices(x.shape, dtype.itemsize):
                maps = inputs = x[part].to(dtype)
                for i, (stage, (weight, bias)) in enumerate(zip(chain.stages, folded, strict=True)):
                    if i == chain.branch:
                        inputs = maps
                    maps, needed = stage.activate(convolve(stage.conv, maps, weight, bias), keeps)
                    kept.append(needed)
                outputs.put(part, maps.add_(inputs) if chain.residual else maps)
                if pools:
                    pooled.put(part, F.avg_pool2d(inputs, 2))
        ctx.save_for_backward(*kept)
        ctx.chain, ctx.shape, ctx.dtype, ctx.compute_dtype = chain, x.shape, x.dtype, dtype
        return outputs.whole, pooled.whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_pooled: Tensor | None) -> tuple[Tensor | None, ...]:
        chain: Chain = ctx.chain
        needs_input, _, _, *needs_bias = ctx.needs_input_grad
        run = _BackwardRun(chain, ctx.shape, ctx.compute_dtype, needs_input, needs_bias)
        kept = iter(ctx.saved_tensors)
        grad_input = Gathered(ctx.shape[0])
        for part in chain.slices(ctx.shape, ctx.compute_dtype.itemsize):
            outer = grad[part].contiguous(memory_format=torch.channels_last)
            pooled = None if grad_pooled is None else grad_pooled[part]
            flowing = run.slice_backward(outer, pooled, [next(kept) for _ in chain.stages])
            if needs_input:
                grad_input.put(part, flowing.to(ctx.dtype))
        bias_grads = [
            None if total is None or stage.bias is None else total.to(stage.bias.dtype)
            for stage, total in zip(chain.stages, run.bias_grads, strict=True)
        ]
        return grad_input.whole, None, None, *bias_grads


class Gathered:
    """A channels-last tensor that is filled slice by slice, and made when its first slice comes."""

    def __init__(self, images: int) -> None:
        self.images = images
        self.whole: Tensor | None = None

    def put(self, part: slice, maps: Tensor) -> None:
        """Take in the maps of a slice of the batch."""
        if len(maps) == self.images:
            self.whole = maps
            return
        if self.whole is None:
            shape = (self.images, *maps.shape[1:])
            self.whole = torch.empty(shape, dtype=maps.dtype, device=maps.device, memory_format=torch.channels_last)
        self.whole[part] = maps


class _BackwardRun:
    """One backward pass through a chain, slice by slice.

    Attributes:
        bias_grads: What the slices so far add up to.
    """

    def __init__(
        self, chain: Chain, shape: torch.Size, dtype: torch.dtype, needs_input: bool, needs_bias: list[bool]
    ) -> None:
        self.chain = chain
        self.needs_bias = needs_bias
        self.sizes = chain.input_sizes(shape)
        self.weights = [stage.folded_weight(dtype) for stage in chain.stages]
        self.bias_grads: list[Tensor | None] = [None] * len(chain.stages)
        self.needs_input = needs_input
        self.first = 0 if needs_input else needs_bias.index(True)

    def slice_backward(self, outer: Tensor, grad_pooled: Tensor | None, kept: list[Tensor | None]) -> Tensor:
        """The gradient of a slice's input; ``outer`` is the one of its output."""
        flowing = outer
        for i in reversed(range(self.first, len(kept))):
            stage = self.chain.stages[i]
            flowing = stage.activate_backward(flowing, kept[i], in_place=flowing is not outer)
            if self.needs_bias[i]:
                self._add_bias_grad(i, flowing)
            if i == self.first and not self.needs_input:
                break
            flowing = stage.convolve_backward(flowing, self.weights[i], (len(flowing), *self.sizes[i]))
            if i == self.chain.branch:
                if self.chain.residual:
                    flowing.add_(outer)
                if grad_pooled is not None:
                    _add_spread(flowing, grad_pooled)
        return flowing

    def _add_bias_grad(self, i: int, grad: Tensor) -> None:
        total = grad.sum((0, 2, 3), dtype=torch.promote_types(grad.dtype, torch.float32))
        before = self.bias_grads[i]
        self.bias_grads[i] = total if before is None else before + total


def _add_spread(maps: Tensor, grad_pooled: Tensor) -> None:
    """Add to ``maps`` the gradient of their 2x2 means."""
    quarter = grad_pooled.to(maps.dtype) / 4
    height, width = 2 * quarter.shape[2], 2 * quarter.shape[3]
    for top in (0, 1):
        for left in (0, 1):
            maps[:, :, top:height:2, left:width:2].add_(quarter)
