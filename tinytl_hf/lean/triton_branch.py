"""A lite branch on the Triton back-end: cuBLAS and cuDNN for the convolutions, kernels for the norms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tinytl_hf.lean import triton_launch as launch
from tinytl_hf.lean.slices import empty_maps
from tinytl_hf.lean.stage import convolution_backward, convolve
from tinytl_hf.lean.triton_launch import Affine, Parts
from tinytl_hf.lean.triton_maps import DTYPES, as_given, matrix, nchw, nhwc, rows_of
from tinytl_hf.network.norms import GlobalBatchNorm2d, sum_over_processes

if TYPE_CHECKING:
    from tinytl_hf.lean.lite_branch import Branch


def branch_fits(branch: Branch, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run a branch with maps of ``dtype``; None if they can."""
    return None if dtype in DTYPES else f"{dtype} maps"


@as_given
def branch_forward(branch: Branch, pooled: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """See :class:`~tinytl_hf.lean.backend.Backend`."""
    weight1, weight2 = branch.conv1.weight.to(dtype), branch.conv2.weight.flatten(1).to(dtype)
    maps = nhwc(convolve(branch.conv1, pooled.to(dtype), weight1))
    first = _normalise(branch.norm1, maps, relu=True)
    output = empty_maps(maps, dtype, (len(maps), len(weight2), *maps.shape[1:3]))
    torch.mm(matrix(maps), weight2.t(), out=matrix(nhwc(output)))
    second = _normalise(branch.norm2, nhwc(output), relu=False)
    return output, [*first, *second]


@as_given
def branch_backward(
    branch: Branch, pooled: Tensor, statistics: list[Tensor], dtype: torch.dtype, grad: Tensor, needs_input: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """See :class:`~tinytl_hf.lean.backend.Backend`; maps are computed again from the statistics."""
    weight1, scale1, shift1, weight2, scale2, shift2 = branch.parameters
    mean1, inverse1, mean2, inverse2 = statistics
    first, second = Affine(mean1, inverse1, scale1, shift1), Affine(mean2, inverse2, scale2, shift2)
    conv1, kernel1, kernel2 = branch.conv1, weight1.to(dtype), weight2.flatten(1).to(dtype)
    pooled = pooled.to(dtype)
    maps = nhwc(convolve(conv1, pooled, kernel1))
    activated = torch.empty_like(maps)
    launch.normalise_again(first, maps, activated)
    outer = maps.new_empty((*maps.shape[:3], len(kernel2)))
    torch.mm(matrix(activated), kernel2.t(), out=matrix(outer))
    sums2 = _norm_backward(branch.norm2, second, outer, rows_of(grad, dtype), relu=False)
    grad_weight2 = torch.mm(matrix(outer).t(), matrix(activated))
    flowing = torch.mm(matrix(outer), kernel2, out=matrix(activated)).view(maps.shape)
    sums1 = _norm_backward(branch.norm1, first, maps, flowing, relu=True)
    del activated, outer, flowing
    grad_pooled, grad_weight1 = convolution_backward(conv1, nchw(maps), pooled, kernel1, [needs_input, True])
    grads = [grad_weight1, sums1[1], sums1[0], grad_weight2.view(weight2.shape), sums2[1], sums2[0]]
    return grad_pooled if needs_input else None, grads


def _normalise(norm: GlobalBatchNorm2d, maps: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    """The norm, in place, and its statistics: those of all processes."""
    values = norm.values_of_a_channel(nchw(maps).shape)
    parts = launch.statistics(maps)
    if norm.spans_processes:
        parts = _over_processes(parts, maps.numel() // maps.shape[-1], values)
    return launch.normalise(norm, parts, values, maps, relu)


def _over_processes(parts: Parts, pixels: int, values: int) -> Parts:
    """The statistics of all processes as one part; in float64, as squares are taken from squares."""
    starts = torch.arange(0, pixels, parts.rows, device=parts.partial.device)
    counts = (pixels - starts).clamp(max=parts.rows).double()[:, None]
    mean, squares = parts.partial.double().unbind(1)
    moments = torch.stack([(counts * mean).sum(0), (squares + counts * mean.square()).sum(0)])
    total, total_squares = sum_over_processes(moments)
    mean = total / values
    merged = torch.stack([mean, (total_squares - values * mean.square()).clamp(min=0)])
    return Parts(merged.to(parts.partial.dtype)[None], values)


def _norm_backward(norm: GlobalBatchNorm2d, affine: Affine, x: Tensor, grad: Tensor, relu: bool) -> Tensor:
    """The gradient of a norm's input, written over that input ``x``.

    Returns:
        The gradients of its bias and weight by this process's images, ``[2, C]``.
    """
    values = norm.values_of_a_channel(nchw(x).shape)
    partial = launch.norm_sums(affine, x, grad, relu)
    if not norm.spans_processes:
        return launch.norm_backward(affine, partial, values, x, grad, relu)
    own = partial.sum(0)
    launch.norm_backward(affine, sum_over_processes(own)[None], values, x, grad, relu)
    return own
