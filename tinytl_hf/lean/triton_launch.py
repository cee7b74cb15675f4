"""Launches the Triton kernels: maps are contiguous ``[N, H, W, C]``.

What an activation's gradient needs (``kept``) is a mask ``uint8 [N, H, W, C / 8]`` or, of smooth ones, a map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from tinytl_hf.lean import triton_kernels as kernels
from tinytl_hf.lean import triton_norms as norms
from tinytl_hf.lean.int8 import weight_of
from tinytl_hf.lean.stage import UPPER, Stage
from tinytl_hf.network.norms import GlobalBatchNorm2d

TILE = 2048  # values that a program holds at a time
WIDEST_BLOCK = 64  # channels that a program works on
MOST_PROGRAMS = 1024  # for a block of channels
MERGED_VALUES = 8192  # of partial results, that each program of the next kernel reads at most
MERGED_AT_ONCE = 16


def programs_of(pixels: int) -> int:
    """How many programs share that many pixels, where sums are wanted."""
    return min(MOST_PROGRAMS, triton.cdiv(pixels, TILE // WIDEST_BLOCK))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type of sums of ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def epilogue(stage: Stage, x: Tensor, y: Tensor, residual: Tensor | None, kept: Tensor | None) -> None:
    """What follows a stage's convolution, with a residual to add or ``kept`` to write; ``y`` may be ``x``."""
    vectors, eps = _vectors(stage)
    _launch(
        kernels.epilogue_kernel, y, None, x, y, residual, kept, *vectors, _upper(stage),
        EPS=eps, ACTIVATION=_activation(stage),
    )  # fmt: skip


def epilogue_backward(stage: Stage, g: Tensor, out: Tensor | None, kept: Tensor | None, sums: Tensor | None) -> None:
    """The gradient of the convolution's output into ``out``, and its parts of the bias's, ``sums [programs, C]``."""
    (weight, _, _, var), eps = _vectors(stage)
    programs, stride = _of_sums(sums)
    _launch(
        kernels.epilogue_backward_kernel, g, programs, g, out, kept, weight, var, sums, stride,
        EPS=eps, ACTIVATION=_activation(stage),
    )  # fmt: skip


def depthwise(stage: Stage, x: Tensor, y: Tensor, residual: Tensor | None, kept: Tensor | None) -> None:
    """A depthwise stage, whole."""
    vectors, eps = _vectors(stage)
    _launch(
        kernels.depthwise_kernel, y, None, x, _taps(stage.conv), y, residual, kept, *vectors, _upper(stage),
        *x.shape[1:3], *y.shape[1:3], **_geometry(stage.conv), EPS=eps, ACTIVATION=_activation(stage),
    )  # fmt: skip


def depthwise_backward(
    conv: nn.Conv2d,
    g: Tensor,
    shape: Sequence[int],
    out: Tensor | None,
    before: Stage | None = None,
    kept: Tensor | None = None,
    sums: Tensor | None = None,
) -> None:
    """The gradient of the input, of ``shape``; with the stage ``before``, that of its convolution's output.

    ``kept`` and ``sums`` are that stage's, as in :func:`epilogue_backward`.
    """
    (weight, _, _, var), eps = ((None,) * 4, 0.0) if before is None else _vectors(before)
    programs, stride = _of_sums(sums)
    _launch(
        kernels.depthwise_backward_kernel, g.new_empty(()).expand(*shape) if out is None else out, programs,
        g, _taps(conv), out, kept, weight, var, sums, stride, *shape[1:3], *g.shape[1:3], **_geometry(conv),
        EPS=eps, ACTIVATION=None if before is None else _activation(before),
    )  # fmt: skip


def pool(x: Tensor, y: Tensor) -> None:
    """Means of 2x2 px into ``y``."""
    _launch(kernels.pool_kernel, y, None, x, y, *x.shape[1:3])


def spread(g: Tensor, pooled: Tensor | None, outer: Tensor | None) -> None:
    """Add the gradients of the means and of the residual to ``g``."""
    _launch(kernels.spread_kernel, g, None, g, pooled, outer, *g.shape[1:3])


def upsample_add(maps: Tensor, small: Tensor) -> None:
    """Add the resized ``small`` to ``maps``."""
    _launch(kernels.upsample_add_kernel, maps, None, maps, small, *maps.shape[1:3], *small.shape[1:3])


def upsample_backward(g: Tensor, out: Tensor) -> None:
    """The gradient of what was resized, into ``out``."""
    spans = (triton.cdiv(2 * large, small) + 3 for large, small in zip(g.shape[1:3], out.shape[1:3], strict=True))
    _launch(kernels.upsample_backward_kernel, out, None, g, out, *g.shape[1:3], *out.shape[1:3], *spans)


@dataclass(frozen=True)
class Parts:
    """Partial results, ``[parts, 2, C]``, each of ``rows`` pixels but for the last."""

    partial: Tensor
    rows: int

    @classmethod
    def of(cls, x: Tensor) -> Parts:
        """Room for those of a map."""
        pixels, channels = x.numel() // x.shape[-1], x.shape[-1]
        rows = _chunk(pixels, channels, min(programs_of(pixels), MERGED_VALUES // _block(channels)))
        size = (triton.cdiv(pixels, rows), 2, channels)
        return cls(torch.empty(size, dtype=accumulator(x.dtype), device=x.device), rows)


def statistics(x: Tensor) -> Parts:
    """Mean and sum of squared differences from it, in parts."""
    parts = Parts.of(x)
    _launch(norms.statistics_kernel, x, len(parts.partial), x, parts.partial)
    return parts


def normalise(norm: GlobalBatchNorm2d, parts: Parts, values: int, maps: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    """Normalise ``maps`` in place, perhaps with ReLU; returns the mean and the inverse deviation of the batch.

    The norm counts the batch, and its running statistics take in those of the batch.
    """
    mean, inverse = parts.partial.new_empty(2, maps.shape[-1])
    _launch(
        norms.normalise_kernel, maps, None, maps, maps, parts.partial, mean, inverse, norm.running_mean,
        norm.running_var, norm.num_batches_tracked, norm.weight, norm.bias, len(parts.partial), parts.rows, values,
        EPS=norm.eps, RATE=norm.share_of_a_batch, RELU=relu, AT_ONCE=MERGED_AT_ONCE,
    )  # fmt: skip
    return mean, inverse


@dataclass(frozen=True)
class Affine:
    """A norm's statistics and parameters, ``[C]`` each."""

    mean: Tensor
    inverse: Tensor
    weight: Tensor
    bias: Tensor


def normalise_again(affine: Affine, x: Tensor, y: Tensor) -> None:
    """The norm and ReLU of ``x`` into ``y``."""
    _launch(norms.normalise_again_kernel, x, None, x, y, *vars(affine).values())


def norm_sums(affine: Affine, x: Tensor, g: Tensor, relu: bool) -> Tensor:
    """Gradients of a norm's bias and weight in parts, ``[parts, 2, C]``; ``g`` is that after the ReLU, if any."""
    parts = Parts.of(x)
    _launch(norms.norm_sums_kernel, x, len(parts.partial), x, g, parts.partial, *vars(affine).values(), RELU=relu)
    return parts.partial


def norm_backward(affine: Affine, partial: Tensor, values: int, x: Tensor, g: Tensor, relu: bool) -> Tensor:
    """The gradient of a norm's input, written over ``x``; returns the sum of ``partial``, ``[2, C]``."""
    sums = partial.new_empty(2, x.shape[-1])
    _launch(
        norms.norm_backward_kernel, x, None, x, g, x, partial, sums, *vars(affine).values(), len(partial), values,
        RELU=relu, AT_ONCE=MERGED_AT_ONCE,
    )  # fmt: skip
    return sums


def _launch(kernel: Any, like: Tensor, programs: int | None, *arguments: Any, **constants: Any) -> None:
    """Run a kernel over the pixels and channels of a map like ``like``."""
    channels = like.shape[-1]
    rows, block, unit = math.prod(like.shape[:-1]), _block(channels), math.gcd(channels, 16)
    chunk = _chunk(rows, channels, programs or MOST_PROGRAMS)
    grid = (programs or triton.cdiv(rows, chunk), triton.cdiv(channels, block))
    wide = tl.float64 if like.dtype == torch.float64 else tl.float32
    constants |= {"UNIT": unit, "ACC": wide, "BLOCK_R": TILE // block, "BLOCK_C": block}
    kernel[grid](*arguments, rows, channels // unit, chunk, **constants)


def _chunk(rows: int, channels: int, programs: int) -> int:
    """Rows of a program: whole tiles."""
    tile = TILE // _block(channels)
    return triton.cdiv(triton.cdiv(rows, programs), tile) * tile


def _block(channels: int) -> int:
    """Channels of a block: all if they are few, else the most of which at most an eighth is wasted."""
    if channels <= WIDEST_BLOCK // 2:
        return max(8, triton.next_power_of_2(channels))
    return next((size for size in (WIDEST_BLOCK, WIDEST_BLOCK // 2) if 8 * (-channels % size) <= channels), 16)


def _vectors(stage: Stage) -> tuple[tuple[Tensor | None, ...], float]:
    """Weight, bias, mean and variance of what follows the convolution, as far as they exist, and the norm's eps."""
    norm = stage.norm
    if norm is None:
        return (None, stage.bias, None, None), 0.0
    return (norm.weight, norm.bias, norm.running_mean, norm.running_var), norm.eps


def _activation(stage: Stage) -> str | None:
    return "clamp" if stage.activation in UPPER else stage.activation


def _upper(stage: Stage) -> float:
    return UPPER.get(stage.activation or "", 0.0)


def _of_sums(sums: Tensor | None) -> tuple[int | None, int]:
    """Programs and the distance between their rows."""
    return (None, 0) if sums is None else (len(sums), sums.stride(0))


def _taps(conv: nn.Conv2d) -> Tensor:
    return weight_of(conv).contiguous()


def _geometry(conv: nn.Conv2d) -> dict[str, int]:
    padding = conv.padding
    assert isinstance(padding, tuple)
    return {"K": conv.kernel_size[0], "STEP": conv.stride[0], "PAD": padding[0], "DILATION": conv.dilation[0]}
