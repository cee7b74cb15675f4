# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of batch norms that use batch statistics, laid out as in :mod:`tinytl_hf.lean.triton_kernels`.

A first kernel leaves a row of partial results for each of its programs; every program of the next one merges those of
its channels itself, in order, so that no kernel is needed in between.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tinytl_hf.lean.triton_kernels import SIZES, pixels


@triton.jit
def affine_of(mean, inverse, weight, bias, c, valid, ACC: tl.constexpr):
    """Scale and shift of a norm with these statistics."""
    scale = tl.load(weight + c, valid, other=0.0).to(ACC) * inverse
    return scale, tl.load(bias + c, valid, other=0.0).to(ACC) - mean * scale


@triton.jit(do_not_specialize=SIZES)
def statistics_kernel(
    x, partial, rows, units, chunk,
    UNIT: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared differences from it, ``[programs, 2, C]``.

    Values are taken relative to the mean of the first ones, so that squares do not cancel.
    """
    channels = units * UNIT
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = tl.program_id(0) * chunk
    end = tl.minimum(start + chunk, rows)
    _, at, inside = pixels(start, end, c, channels, BLOCK_R)
    near = tl.sum(tl.load(x + at, inside, other=0.0).to(ACC), 0) / tl.minimum(end - start, BLOCK_R)
    total = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    squares = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    for first in range(start, end, BLOCK_R):
        _, at, inside = pixels(first, end, c, channels, BLOCK_R)
        difference = tl.where(inside, tl.load(x + at, inside, other=0.0).to(ACC) - near[None, :], 0.0)
        total += difference
        squares += difference * difference
    off = tl.sum(total, 0) / (end - start)
    of_mean = tl.maximum(tl.sum(squares, 0) - (end - start) * off * off, 0.0)
    out = partial + tl.program_id(0) * 2 * channels + c
    tl.store(out, near + off, c < channels)
    tl.store(out + channels, of_mean, c < channels)


@triton.jit
def merge_statistics(
    partial, parts, part_rows, values, c, channels,
    ACC: tl.constexpr, BLOCK_C: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Mean and variance of all ``values``, of which each part has ``part_rows`` but for the last."""
    mean = tl.zeros([BLOCK_C], ACC)
    squares = tl.zeros([BLOCK_C], ACC)
    for first in range(0, parts, AT_ONCE):
        p = first + tl.arange(0, AT_ONCE)
        count = tl.maximum(tl.minimum(values - p * part_rows, part_rows), 0).to(ACC)[:, None]
        inside = (p < parts)[:, None] & (c < channels)[None, :]
        mean += tl.sum(count * tl.load(partial + p[:, None] * 2 * channels + c[None, :], inside, other=0.0), 0)
    mean = mean / values
    for first in range(0, parts, AT_ONCE):
        p = first + tl.arange(0, AT_ONCE)
        count = tl.maximum(tl.minimum(values - p * part_rows, part_rows), 0).to(ACC)[:, None]
        inside = (p < parts)[:, None] & (c < channels)[None, :]
        at = p[:, None] * 2 * channels + c[None, :]
        off = tl.load(partial + at, inside, other=0.0) - mean[None, :]
        squares += tl.sum(tl.load(partial + at + channels, inside, other=0.0) + count * off * off, 0)
    return mean, squares / values


@triton.jit(do_not_specialize=SIZES)
def normalise_kernel(
    x, y, partial, mean_out, inverse_out, running_mean, running_var, batches, weight, bias,
    parts, part_rows, values, rows, units, chunk,
    EPS: tl.constexpr, RATE: tl.constexpr, RELU: tl.constexpr, AT_ONCE: tl.constexpr,
    UNIT: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Normalise by the statistics of ``partial``, which are kept and which the running ones take in; perhaps ReLU.

    A batch is counted unless it is computed for a second time, whose ``RATE`` is 0.
    """
    channels = units * UNIT
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = tl.program_id(0) * chunk
    end = tl.minimum(start + chunk, rows)
    mean, var = merge_statistics(partial, parts, part_rows, values, c, channels, ACC, BLOCK_C, AT_ONCE)
    inverse = 1.0 / tl.sqrt(var + EPS)
    scale, shift = affine_of(mean, inverse, weight, bias, c, c < channels, ACC)
    if tl.program_id(0) == 0:
        tl.store(mean_out + c, mean, c < channels)
        tl.store(inverse_out + c, inverse, c < channels)
        if batches is not None and RATE > 0:
            tl.store(batches + c, tl.load(batches + c, c == 0, other=0) + 1, c == 0)
        if running_mean is not None:
            old = tl.load(running_mean + c, c < channels, other=0.0).to(ACC)
            tl.store(running_mean + c, old + RATE * (mean - old), c < channels)
            old = tl.load(running_var + c, c < channels, other=0.0).to(ACC)
            unbiased = var * (values.to(ACC) / (values - 1))
            tl.store(running_var + c, old + RATE * (unbiased - old), c < channels)
    for first in range(start, end, BLOCK_R):
        _, at, inside = pixels(first, end, c, channels, BLOCK_R)
        value = tl.load(x + at, inside, other=0.0).to(ACC) * scale[None, :] + shift[None, :]
        if RELU:
            value = tl.where(value < 0, 0.0, value)
        tl.store(y + at, value.to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=SIZES)
def normalise_again_kernel(
    x, y, mean, inverse, weight, bias, rows, units, chunk,
    UNIT: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Normalise by known statistics, then ReLU."""
    channels = units * UNIT
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = c < channels
    start = tl.program_id(0) * chunk
    end = tl.minimum(start + chunk, rows)
    mean = tl.load(mean + c, valid, other=0.0)
    inverse = tl.load(inverse + c, valid, other=0.0)
    scale, shift = affine_of(mean, inverse, weight, bias, c, valid, ACC)
    for first in range(start, end, BLOCK_R):
        _, at, inside = pixels(first, end, c, channels, BLOCK_R)
        value = tl.load(x + at, inside, other=0.0).to(ACC) * scale[None, :] + shift[None, :]
        tl.store(y + at, tl.where(value < 0, 0.0, value).to(y.dtype.element_ty), inside)


@triton.jit
def gradient_at(x, g, at, inside, scale, shift, RELU: tl.constexpr, ACC: tl.constexpr):
    """A norm's input, and the gradient of its output (before the ReLU that may follow)."""
    value = tl.load(x + at, inside, other=0.0).to(ACC)
    grad = tl.load(g + at, inside, other=0.0).to(ACC)
    if RELU:
        grad = tl.where(value * scale[None, :] + shift[None, :] > 0, grad, 0.0)
    return value, grad


@triton.jit(do_not_specialize=SIZES)
def norm_sums_kernel(
    x, g, partial, mean, inverse, weight, bias, rows, units, chunk,
    RELU: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of a norm's bias and weight in parts, ``[programs, 2, C]``."""
    channels = units * UNIT
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = c < channels
    start = tl.program_id(0) * chunk
    end = tl.minimum(start + chunk, rows)
    mean = tl.load(mean + c, valid, other=0.0)
    inverse = tl.load(inverse + c, valid, other=0.0)
    scale, shift = affine_of(mean, inverse, weight, bias, c, valid, ACC)
    of_bias = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    of_weight = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    for first in range(start, end, BLOCK_R):
        _, at, inside = pixels(first, end, c, channels, BLOCK_R)
        value, grad = gradient_at(x, g, at, inside, scale, shift, RELU, ACC)
        of_bias += grad
        of_weight += grad * (value - mean[None, :])
    out = partial + tl.program_id(0) * 2 * channels + c
    tl.store(out, tl.sum(of_bias, 0), valid)
    tl.store(out + channels, tl.sum(of_weight, 0) * inverse, valid)


@triton.jit(do_not_specialize=SIZES)
def norm_backward_kernel(
    x, g, out, partial, sums, mean, inverse, weight, bias, parts, values, rows, units, chunk,
    RELU: tl.constexpr, AT_ONCE: tl.constexpr,
    UNIT: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of a norm's input; ``sums`` takes what ``partial`` adds up to."""
    channels = units * UNIT
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = c < channels
    start = tl.program_id(0) * chunk
    end = tl.minimum(start + chunk, rows)
    of_bias = tl.zeros([BLOCK_C], ACC)
    of_weight = tl.zeros([BLOCK_C], ACC)
    for first in range(0, parts, AT_ONCE):
        p = first + tl.arange(0, AT_ONCE)
        inside = (p < parts)[:, None] & valid[None, :]
        at = p[:, None] * 2 * channels + c[None, :]
        of_bias += tl.sum(tl.load(partial + at, inside, other=0.0), 0)
        of_weight += tl.sum(tl.load(partial + at + channels, inside, other=0.0), 0)
    if tl.program_id(0) == 0:
        tl.store(sums + c, of_bias, valid)
        tl.store(sums + channels + c, of_weight, valid)
    mean = tl.load(mean + c, valid, other=0.0)
    inverse = tl.load(inverse + c, valid, other=0.0)
    scale, shift = affine_of(mean, inverse, weight, bias, c, valid, ACC)
    off = of_bias / values
    slope = of_weight * inverse / values
    for first in range(start, end, BLOCK_R):
        _, at, inside = pixels(first, end, c, channels, BLOCK_R)
        value, grad = gradient_at(x, g, at, inside, scale, shift, RELU, ACC)
        grad = scale[None, :] * (grad - off[None, :] - (value - mean[None, :]) * slope[None, :])
        tl.store(out + at, grad.to(out.dtype.element_ty), inside)
