"""Frozen chains and lite branches on CUDA: cuBLAS and cuDNN for the products, Triton kernels for all between them.

A frozen norm's scale is part of the kernel that follows the convolution, so nothing is folded and no weight is kept
twice. These kernels add up in a fixed order, so that the same input gives them the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tinytl_hf.lean import triton_launch as launch
from tinytl_hf.lean.int8 import weight_of
from tinytl_hf.lean.slices import empty_maps
from tinytl_hf.lean.stage import UPPER, Stage, convolution_backward, convolve
from tinytl_hf.lean.triton_branch import branch_backward as branch_backward
from tinytl_hf.lean.triton_branch import branch_fits as branch_fits
from tinytl_hf.lean.triton_branch import branch_forward as branch_forward
from tinytl_hf.lean.triton_maps import DTYPES, as_given, matrix, nchw, nhwc, rows_of
from tinytl_hf.network.same_padding import SameConv2d

if TYPE_CHECKING:
    from tinytl_hf.lean.chain import Chain


def fits(chain: Chain, dtype: torch.dtype, shape: torch.Size) -> str | None:
    """Why the kernels cannot run a chain; None if they can."""
    if dtype not in DTYPES:
        return f"{str(dtype).removeprefix('torch.')} maps"
    for stage in chain.stages:
        if isinstance(stage.conv, SameConv2d):
            return "a convolution whose padding depends on the size of the maps"
        if stage.activation in UPPER and stage.conv.out_channels % 8:
            return f"{stage.conv.out_channels} channels before an activation, not a multiple of 8"
    return None


@as_given
def chain_forward(
    chain: Chain, x: Tensor, dtype: torch.dtype, keeps: bool, pools: bool
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """See :class:`~tinytl_hf.lean.backend.Backend`."""
    first = chain.stages[0]
    if len(chain.stages) == 1 and _kind(first.conv) == "other" and not (pools or chain.residual or _adds(first)):
        return convolve(first.conv, x.to(dtype), weight_of(first.conv).to(dtype)), None, [None]
    sizes = chain.map_sizes(x.shape)
    output = empty_maps(x, dtype, (len(x), *sizes[-1]))
    channels, height, width = sizes[chain.branch]
    pooled = empty_maps(x, dtype, (len(x), channels, height // 2, width // 2)) if pools else None
    kept = chain.empty_kept(x, dtype, keeps)
    weights = _weights(chain, dtype)
    last = len(chain.stages) - 1
    for part in chain.slices_of(x.shape, dtype, x.device):
        maps = inputs = rows_of(x[part], dtype)
        for i, stage in enumerate(chain.stages):
            if i == chain.branch:
                inputs = maps
                if pooled is not None:
                    launch.pool(maps, nhwc(pooled)[part])
            y = nhwc(output)[part] if i == last else nhwc(empty_maps(x, dtype, (len(maps), *sizes[i + 1])))
            adds = chain.residual and i == last and stage.activation is None
            _stage(stage, weights[i], maps, y, inputs if adds else None, _part(kept[i], part))
            maps = y
        if chain.residual and chain.stages[last].activation is not None:
            maps.add_(inputs)
    return output, pooled, kept


@as_given
def chain_backward(
    chain: Chain,
    kept: list[Tensor | None],
    shape: torch.Size,
    dtype: torch.dtype,
    grad: Tensor,
    grad_pooled: Tensor | None,
    needs_input: bool,
    needs_bias: list[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """See :class:`~tinytl_hf.lean.backend.Backend`; gradients of biases are fp32, or float64 for float64."""
    sizes = chain.map_sizes(shape)
    slices = list(chain.slices_of(shape, dtype, grad.device))
    images = slices[0].stop
    programs = launch.programs_of(max(images * height * width for _, height, width in sizes[1:]))
    counts = [stage.conv.out_channels if wanted else 0 for stage, wanted in zip(chain.stages, needs_bias, strict=True)]
    sums = grad.new_empty((len(slices), programs, sum(counts)), dtype=launch.accumulator(dtype))
    # A stage whose map is small has fewer pixels than there are programs: those without pixels write zeros.
    grad_input = empty_maps(grad, dtype, shape) if needs_input else None
    weights = _weights(chain, dtype)
    for part, partial in zip(slices, sums, strict=True):
        run = _SliceBackward(
            chain,
            sizes,
            weights,
            [_part(each, part) for each in kept],
            [part if wanted else None for part, wanted in zip(partial.split(counts, 1), needs_bias, strict=True)],
            None if grad_input is None else nhwc(grad_input)[part],
        )
        run(rows_of(grad[part], dtype), None if grad_pooled is None else rows_of(grad_pooled[part], dtype))
    totals = sums.sum((0, 1)).split(counts)
    return grad_input, [total if wanted else None for total, wanted in zip(totals, needs_bias, strict=True)]


@dataclass(frozen=True)
class _SliceBackward:
    """A backward pass of a slice through a chain.

    Attributes:
        chain: The chain.
        sizes: Channels, height and width of each map.
        weights: Of each stage that is not depthwise.
        kept: What the gradient of each stage's activation needs, where there is one.
        sums: Room for partial sums of each bias's gradient, ``[programs, C]``, or None where it is not wanted.
        grad_input: Room for the input's gradient, or None.
    """

    chain: Chain
    sizes: list[tuple[int, int, int]]
    weights: list[Tensor | None]
    kept: list[Tensor | None]
    sums: list[Tensor | None]
    grad_input: Tensor | None

    def __call__(self, outer: Tensor, grad_pooled: Tensor | None) -> None:
        """Fill the room for sums and for the input's gradient, from those of the output and of the pooled input."""
        chain = self.chain
        first = 0 if self.grad_input is not None else next(i for i, s in enumerate(self.sums) if s is not None)
        flowing, is_through = outer, False  # whether what follows the convolution is done already
        for i in reversed(range(first, len(chain.stages))):
            goes_on = i > first or self.grad_input is not None
            if not is_through:
                flowing = self._epilogue(i, flowing, outer, goes_on)
            if not goes_on:
                return
            grad = self.grad_input if i == 0 else None
            joins = i == chain.branch and (chain.residual or grad_pooled is not None)
            before = i - 1 if i > first and not joins and _kind(chain.stages[i].conv) == "depthwise" else None
            stores = before is None or before > first or self.grad_input is not None
            flowing = self._convolution(i, flowing, grad, before, stores)
            is_through = before is not None
            if joins:
                launch.spread(flowing, grad_pooled, outer if chain.residual else None)

    def _epilogue(self, i: int, grad: Tensor, outer: Tensor, goes_on: bool) -> Tensor:
        stage = self.chain.stages[i]
        if self.kept[i] is None and self.sums[i] is None and stage.norm is None:
            return grad
        out = None if not goes_on else torch.empty_like(grad) if grad is outer else grad
        launch.epilogue_backward(stage, grad, out, self.kept[i], self.sums[i])
        return grad if out is None else out

    def _convolution(self, i: int, grad: Tensor, out: Tensor | None, before: int | None, stores: bool) -> Tensor:
        """The gradient of the input, into ``out`` if given; with all that follows the convolution ``before``."""
        conv, weight = self.chain.stages[i].conv, self.weights[i]
        channels, height, width = self.sizes[i]
        shape = (len(grad), height, width, channels)
        if weight is None:
            made = out if out is not None else grad.new_empty(shape) if stores else None
            if before is None:
                launch.depthwise_backward(conv, grad, shape, made)
            else:
                stage, kept, sums = self.chain.stages[before], self.kept[before], self.sums[before]
                launch.depthwise_backward(conv, grad, shape, made, stage, kept, sums)
            return grad if made is None else made
        made = grad.new_empty(shape) if out is None else out
        if _kind(conv) == "pointwise":
            torch.mm(matrix(grad), weight, out=matrix(made))
            return made
        # The kernel wants a tensor of the input's shape and layout, and does not read it.
        found = convolution_backward(conv, nchw(grad), nchw(made), weight, [True, False])[0]
        found = nhwc(found.contiguous(memory_format=torch.channels_last))
        return found if out is None else out.copy_(found)


def upsampling_fits(dtype: torch.dtype) -> bool:
    """Whether the kernels can run an up-sampling of maps of ``dtype``."""
    return dtype in DTYPES


@as_given
def upsample_add(maps: Tensor, small: Tensor) -> None:
    """See :class:`~tinytl_hf.lean.backend.Backend`."""
    launch.upsample_add(nhwc(maps), rows_of(small, small.dtype))


@as_given
def upsample_backward(grad: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """See :class:`~tinytl_hf.lean.backend.Backend`."""
    small = empty_maps(grad, dtype, shape)
    launch.upsample_backward(rows_of(grad, grad.dtype), nhwc(small))
    return small


def _stage(
    stage: Stage, weight: Tensor | None, maps: Tensor, y: Tensor, residual: Tensor | None, kept: Tensor | None
) -> None:
    """A stage's output into ``y``, with the residual where there is one to add."""
    if weight is None:
        launch.depthwise(stage, maps, y, residual, kept)
        return
    if _kind(stage.conv) == "pointwise":
        torch.mm(matrix(maps), weight.t(), out=matrix(y))
        found = y
    else:
        found = nhwc(convolve(stage.conv, nchw(maps), weight))
    if found is not y or residual is not None or _adds(stage):
        launch.epilogue(stage, found, y, residual, kept)


def _part(kept: Tensor | None, part: slice) -> Tensor | None:
    """What is kept of a slice: a row of bits for each image, or a map."""
    if kept is None:
        return None
    return kept[part] if kept.dim() == 2 else nhwc(kept)[part]


def _adds(stage: Stage) -> bool:
    """Whether anything follows the convolution."""
    return stage.bias is not None or stage.norm is not None or stage.activation is not None


def _kind(conv: nn.Conv2d) -> str:
    """``pointwise``: a matrix product; ``depthwise``: a kernel of ours; ``other``: PyTorch's."""
    square = all(len(set(pair)) == 1 for pair in (conv.kernel_size, conv.stride, conv.padding, conv.dilation))
    if conv.kernel_size == (1, 1) and conv.groups == 1 and conv.stride == (1, 1) and conv.padding == (0, 0):
        return "pointwise"
    return "depthwise" if square and conv.groups == conv.in_channels == conv.out_channels > 1 else "other"


def _weights(chain: Chain, dtype: torch.dtype) -> list[Tensor | None]:
    """Each stage's weight; None for a depthwise one, whose kernel reads it as it is."""
    weights: list[Tensor | None] = []
    for stage in chain.stages:
        kind = _kind(stage.conv)
        weight = None if kind == "depthwise" else weight_of(stage.conv).to(dtype)
        weights.append(weight.flatten(1) if weight is not None and kind == "pointwise" else weight)
    return weights
