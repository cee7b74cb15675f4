# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of frozen chains on CUDA: what surrounds the matrix products, each in one pass over a map.

Maps are channels-last, so a map is a matrix of pixels (``rows``) by channels. Every kernel runs on a grid of programs
by blocks of channels: a program works through ``chunk`` rows, and leaves a row of partial sums where sums are wanted.
These are added up in a fixed order, so results do not depend on timing. Storage is of any float type, arithmetic in
fp32 (float64 for float64).
"""

from __future__ import annotations

import triton
import triton.language as tl

# Integers that change from map to map: one compiled kernel serves them all.
SIZES = [
    *("rows", "units", "chunk", "stride", "height", "width", "out_height", "out_width", "small_height", "small_width"),
    *("span_y", "span_x", "values", "part_rows", "parts"),
]


@triton.jit
def pixels(first, end, c, channels, BLOCK_R: tl.constexpr):
    """Rows from ``first`` on, where their values lie, and which of these exist."""
    r = first + tl.arange(0, BLOCK_R)
    at = r[:, None].to(tl.int64) * channels + c[None, :]
    return r, at, (r < end)[:, None] & (c < channels)[None, :]


@triton.jit
def frozen_scale(weight, var, c, valid, EPS: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr):
    """What a frozen norm multiplies by."""
    scale = tl.full([BLOCK_C], 1.0, ACC)
    if weight is not None:
        deviation = tl.load(var + c, valid, other=1.0).to(ACC) + EPS
        scale = tl.load(weight + c, valid, other=0.0).to(ACC) / tl.sqrt(deviation)
    return scale


@triton.jit
def frozen_shift(scale, bias, mean, c, valid, ACC: tl.constexpr, BLOCK_C: tl.constexpr):
    """What a frozen norm, or a convolution's bias, adds."""
    shift = tl.zeros([BLOCK_C], ACC)
    if bias is not None:
        shift += tl.load(bias + c, valid, other=0.0).to(ACC)
    if mean is not None:
        shift -= tl.load(mean + c, valid, other=0.0).to(ACC) * scale
    return shift


@triton.jit
def activate(
    value, y, kept, residual, r, c, at, inside, channels, upper,
    ACC: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Add the residual or apply the activation (NaN stays NaN), store, and keep what its gradient needs, if wanted.

    Of a clamp that is one bit a value, the first channel's lowest; of a smooth one the value before it.
    """
    if residual is not None:
        value += tl.load(residual + at, inside, other=0.0).to(ACC)
    if ACTIVATION == "clamp":
        value = tl.where(value < 0, 0.0, value)
        value = tl.where(value > upper, upper, value)
    elif ACTIVATION is not None:
        if kept is not None:
            tl.store(kept + at, value.to(kept.dtype.element_ty), inside)
        value *= gate(value, ACTIVATION)
    stored = value.to(y.dtype.element_ty)
    tl.store(y + at, stored, inside)
    if ACTIVATION == "clamp" and kept is not None:
        rounded = stored.to(ACC)
        open_ = ((rounded > 0) & (rounded < upper) & inside).to(tl.int32)
        eights = tl.reshape(open_, [BLOCK_R, BLOCK_C // 8, 8])
        packed = tl.sum(eights << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)
        b = tl.program_id(1) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
        rows_exist = tl.max(inside.to(tl.int32), 1) > 0
        where = r[:, None].to(tl.int64) * (channels // 8) + b[None, :]
        tl.store(kept + where, packed, rows_exist[:, None] & (b < channels // 8)[None, :])


@triton.jit
def gate(value, ACTIVATION: tl.constexpr):
    """What a smooth activation multiplies its input by."""
    if ACTIVATION == "silu":
        return 1.0 / (1.0 + tl.exp(-value))
    else:
        opened = value / 6.0 + 0.5
        opened = tl.where(opened < 0, 0.0, opened)
        return tl.where(opened > 1, 1.0, opened)


@triton.jit
def through(
    value, kept, r, at, inside, end, channels, ACC: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient before an activation, of ``value`` after it: where its bit is set, or times the slope."""
    if ACTIVATION == "clamp":
        b = tl.program_id(1) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
        where = r[:, None].to(tl.int64) * (channels // 8) + b[None, :]
        packed = tl.load(kept + where, (r < end)[:, None] & (b < channels // 8)[None, :], other=0).to(tl.int32)
        open_ = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
        return tl.where(tl.reshape(open_, [BLOCK_R, BLOCK_C]) != 0, value, 0.0)
    else:
        before = tl.load(kept + at, inside, other=0.0).to(ACC)
        opened = gate(before, ACTIVATION)
        if ACTIVATION == "silu":
            return value * opened * (1.0 + before * (1.0 - opened))
        else:
            inner = (before >= -3) & (before <= 3)
            return value * tl.where(inner, before / 3.0 + 0.5, opened)


@triton.jit(do_not_specialize=SIZES)
def epilogue_kernel(
    x, y, residual, kept, weight, bias, mean, var, upper, rows, units, chunk,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Norm, then residual or activation, of a convolution's output."""
    channels = units * UNIT
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = tl.program_id(0) * chunk
    end = tl.minimum(start + chunk, rows)
    scale = frozen_scale(weight, var, c, c < channels, EPS, ACC, BLOCK_C)
    shift = frozen_shift(scale, bias, mean, c, c < channels, ACC, BLOCK_C)
    for first in range(start, end, BLOCK_R):
        r, at, inside = pixels(first, end, c, channels, BLOCK_R)
        value = tl.load(x + at, inside, other=0.0).to(ACC) * scale[None, :] + shift[None, :]
        activate(value, y, kept, residual, r, c, at, inside, channels, upper, ACC, ACTIVATION, BLOCK_R, BLOCK_C)


@triton.jit(do_not_specialize=SIZES)
def epilogue_backward_kernel(
    g, out, kept, weight, var, sums, stride, rows, units, chunk,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Back through the activation, sum over pixels (the bias's gradient), then scale."""
    channels = units * UNIT
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = tl.program_id(0) * chunk
    end = tl.minimum(start + chunk, rows)
    scale = frozen_scale(weight, var, c, c < channels, EPS, ACC, BLOCK_C)
    total = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    for first in range(start, end, BLOCK_R):
        r, at, inside = pixels(first, end, c, channels, BLOCK_R)
        value = tl.load(g + at, inside, other=0.0).to(ACC)
        if kept is not None:
            value = through(value, kept, r, at, inside, end, channels, ACC, ACTIVATION, BLOCK_R, BLOCK_C)
        total += value
        if out is not None:
            tl.store(out + at, (value * scale[None, :]).to(out.dtype.element_ty), inside)
    if sums is not None:
        tl.store(sums + tl.program_id(0) * stride + c, tl.sum(total, 0), c < channels)


@triton.jit(do_not_specialize=SIZES)
def depthwise_kernel(
    x, kernel, y, residual, kept, weight, bias, mean, var, upper, height, width, out_height, out_width,
    rows, units, chunk,
    K: tl.constexpr, STEP: tl.constexpr, PAD: tl.constexpr, DILATION: tl.constexpr,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Depthwise convolution, norm, then residual or activation; ``rows`` are those of the output."""
    channels = units * UNIT
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = tl.program_id(0) * chunk
    end = tl.minimum(start + chunk, rows)
    scale = frozen_scale(weight, var, c, c < channels, EPS, ACC, BLOCK_C)
    shift = frozen_shift(scale, bias, mean, c, c < channels, ACC, BLOCK_C)
    for first in range(start, end, BLOCK_R):
        r, at, inside = pixels(first, end, c, channels, BLOCK_R)
        image = r // (out_height * out_width)
        top = r // out_width % out_height * STEP - PAD
        left = r % out_width * STEP - PAD
        value = tl.zeros([BLOCK_R, BLOCK_C], ACC)
        for ky in tl.static_range(K):
            for kx in tl.static_range(K):
                i, j = top + ky * DILATION, left + kx * DILATION
                there = (i >= 0) & (i < height) & (j >= 0) & (j < width)
                source = ((image * height + i) * width + j)[:, None].to(tl.int64) * channels + c[None, :]
                tap = tl.load(kernel + c * (K * K) + ky * K + kx, c < channels, other=0.0).to(ACC)
                value += tl.load(x + source, inside & there[:, None], other=0.0).to(ACC) * tap[None, :]
        value = value * scale[None, :] + shift[None, :]
        activate(value, y, kept, residual, r, c, at, inside, channels, upper, ACC, ACTIVATION, BLOCK_R, BLOCK_C)


@triton.jit(do_not_specialize=SIZES)
def depthwise_backward_kernel(
    g, kernel, out, kept, weight, var, sums, stride, height, width, out_height, out_width, rows, units, chunk,
    K: tl.constexpr, STEP: tl.constexpr, PAD: tl.constexpr, DILATION: tl.constexpr,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of a depthwise convolution's input, then the activation, sum and scale of the stage before it.

    ``rows`` are those of the input; each gathers what it was part of.
    """
    channels = units * UNIT
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = tl.program_id(0) * chunk
    end = tl.minimum(start + chunk, rows)
    scale = frozen_scale(weight, var, c, c < channels, EPS, ACC, BLOCK_C)
    total = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    for first in range(start, end, BLOCK_R):
        r, at, inside = pixels(first, end, c, channels, BLOCK_R)
        image = r // (height * width)
        bottom = r // width % height + PAD
        right = r % width + PAD
        value = tl.zeros([BLOCK_R, BLOCK_C], ACC)
        for ky in tl.static_range(K):
            for kx in tl.static_range(K):
                y, x = bottom - ky * DILATION, right - kx * DILATION
                i, j = y // STEP, x // STEP
                there = (y >= 0) & (x >= 0) & (y % STEP == 0) & (x % STEP == 0) & (i < out_height) & (j < out_width)
                source = ((image * out_height + i) * out_width + j)[:, None].to(tl.int64) * channels + c[None, :]
                tap = tl.load(kernel + c * (K * K) + ky * K + kx, c < channels, other=0.0).to(ACC)
                value += tl.load(g + source, inside & there[:, None], other=0.0).to(ACC) * tap[None, :]
        if kept is not None:
            value = through(value, kept, r, at, inside, end, channels, ACC, ACTIVATION, BLOCK_R, BLOCK_C)
        total += tl.where(inside, value, 0.0)
        if out is not None:
            tl.store(out + at, (value * scale[None, :]).to(out.dtype.element_ty), inside)
    if sums is not None:
        tl.store(sums + tl.program_id(0) * stride + c, tl.sum(total, 0), c < channels)


@triton.jit(do_not_specialize=SIZES)
def pool_kernel(
    x, y, height, width, rows, units, chunk,
    UNIT: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Means of 2x2 px; ``rows`` are those of the output."""
    channels = units * UNIT
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = tl.program_id(0) * chunk
    end = tl.minimum(start + chunk, rows)
    small_width = width // 2
    small_height = height // 2
    for first in range(start, end, BLOCK_R):
        r, at, inside = pixels(first, end, c, channels, BLOCK_R)
        row = r // (small_height * small_width) * height + r // small_width % small_height * 2
        value = tl.zeros([BLOCK_R, BLOCK_C], ACC)
        for i in tl.static_range(2):
            for j in tl.static_range(2):
                pixel = (row + i) * width + r % small_width * 2 + j
                source = pixel[:, None].to(tl.int64) * channels + c[None, :]
                value += tl.load(x + source, inside, other=0.0).to(ACC)
        tl.store(y + at, (value * 0.25).to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=SIZES)
def spread_kernel(
    g, pooled, outer, height, width, rows, units, chunk,
    UNIT: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Add to ``g`` the gradient of its 2x2 means, and that of the residual."""
    channels = units * UNIT
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = tl.program_id(0) * chunk
    end = tl.minimum(start + chunk, rows)
    small_width = width // 2
    small_height = height // 2
    for first in range(start, end, BLOCK_R):
        r, at, inside = pixels(first, end, c, channels, BLOCK_R)
        value = tl.load(g + at, inside, other=0.0).to(ACC)
        if pooled is not None:
            i, j = r // width % height // 2, r % width // 2
            pixel = (r // (height * width) * small_height + i) * small_width + j
            source = pixel[:, None].to(tl.int64) * channels + c[None, :]
            there = inside & ((i < small_height) & (j < small_width))[:, None]
            value += tl.load(pooled + source, there, other=0.0).to(ACC) * 0.25
        if outer is not None:
            value += tl.load(outer + at, inside, other=0.0).to(ACC)
        tl.store(g + at, value.to(g.dtype.element_ty), inside)


@triton.jit
def source_pixel(i, size, small, ACC: tl.constexpr):
    """The two pixels that pixel ``i`` of an up-sampled axis lies between, and the second one's weight."""
    position = tl.maximum((i.to(ACC) + 0.5) * (small.to(ACC) / size.to(ACC)) - 0.5, 0.0)
    low = tl.minimum(position.to(tl.int32), small - 1)
    return low, tl.minimum(low + 1, small - 1), position - low.to(ACC)


@triton.jit(do_not_specialize=SIZES)
def upsample_add_kernel(
    maps, small, height, width, small_height, small_width, rows, units, chunk,
    UNIT: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Add ``small``, bilinearly resized, to ``maps``."""
    channels = units * UNIT
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = tl.program_id(0) * chunk
    end = tl.minimum(start + chunk, rows)
    for first in range(start, end, BLOCK_R):
        r, at, inside = pixels(first, end, c, channels, BLOCK_R)
        top, bottom, down = source_pixel(r // width % height, height, small_height, ACC)
        left, right, along = source_pixel(r % width, width, small_width, ACC)
        image = r // (height * width) * small_height
        value = tl.load(maps + at, inside, other=0.0).to(ACC)
        for k in tl.static_range(4):
            i = bottom if k // 2 else top
            j = right if k % 2 else left
            factor = (down if k // 2 else 1 - down) * (along if k % 2 else 1 - along)
            source = ((image + i) * small_width + j)[:, None].to(tl.int64) * channels + c[None, :]
            value += factor[:, None] * tl.load(small + source, inside, other=0.0).to(ACC)
        tl.store(maps + at, value.to(maps.dtype.element_ty), inside)


@triton.jit
def share(i, pixel, size, small, ACC: tl.constexpr):
    """How much of pixel ``i`` of an up-sampled axis comes from ``pixel`` of the small one."""
    low, high, second = source_pixel(i, size, small, ACC)
    taken = tl.where(low == pixel, 1 - second, 0.0) + tl.where(high == pixel, second, 0.0)
    return tl.where(i < size, taken, 0.0)


@triton.jit(do_not_specialize=SIZES)
def upsample_backward_kernel(
    g, out, height, width, small_height, small_width, span_y, span_x, rows, units, chunk,
    UNIT: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The adjoint of :func:`upsample_add_kernel`: each small pixel gathers from the ``span`` pixels near it."""
    channels = units * UNIT
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = tl.program_id(0) * chunk
    end = tl.minimum(start + chunk, rows)
    for first in range(start, end, BLOCK_R):
        r, at, inside = pixels(first, end, c, channels, BLOCK_R)
        y, x = r // small_width % small_height, r % small_width
        # The first pixel that lies beyond the small pixel before this one, or the one before.
        top = tl.maximum((2 * y - 1) * height // (2 * small_height) - 1, 0)
        left = tl.maximum((2 * x - 1) * width // (2 * small_width) - 1, 0)
        image = r // (small_height * small_width) * height
        value = tl.zeros([BLOCK_R, BLOCK_C], ACC)
        for k in range(0, span_y * span_x):
            i, j = top + k // span_x, left + k % span_x
            factor = share(i, y, height, small_height, ACC) * share(j, x, width, small_width, ACC)
            source = ((image + i) * width + j)[:, None].to(tl.int64) * channels + c[None, :]
            there = inside & (factor != 0)[:, None]
            value += factor[:, None] * tl.load(g + source, there, other=0.0).to(ACC)
        tl.store(out + at, value.to(out.dtype.element_ty), inside)
