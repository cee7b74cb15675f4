"""Masks of one bit a value, on any device."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

PACK_EIGHT = 0x0102040810204080  # gathers the lowest bits of eight bytes in the highest byte
CHUNK = 1 << 18  # values that a CPU compares or multiplies at a time: few enough to stay in the cache


def pack(activated: Tensor, upper: float) -> Tensor:
    """One bit for each value: whether it lies strictly between 0 and ``upper``.

    Args:
        activated: ReLU's (``upper`` infinite) or ReLU6's output, contiguous.
        upper: Where the activation saturates.

    Returns:
        ``uint8`` ``[ceil(values / 8)]``, in the order of the values.
    """
    flat = activated.reshape(-1)
    if flat.device.type == "cpu" and flat.dtype in {torch.float32, torch.bfloat16} and not is_compiling():
        return _pack_on_cpu(flat, upper)
    inside = (flat > 0) & (flat < upper)
    padded = F.pad(inside.view(torch.uint8), (0, -flat.numel() % 8))
    return ((padded.view(torch.int64) * PACK_EIGHT) >> 56).to(torch.uint8)


def unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The mask that :func:`pack` gave as zeros and ones, ``uint8`` in ``shape``."""
    if is_compiling():  # which fuses this, and would take no table from outside
        of_bits = bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1
        return of_bits.view(-1)[: torch.Size(shape).numel()].view(shape)
    eights = torch.index_select(_table(bits.device), 0, bits.int())
    return eights.view(torch.uint8)[: torch.Size(shape).numel()].view(shape)


def mask_(values: Tensor, bits: Tensor) -> Tensor:
    """Multiply ``values``, contiguous, by the mask that :func:`pack` gave, in place."""
    flat = values.view(-1)
    if flat.device.type != "cpu" or is_compiling():  # where each launch costs more than a cache saves
        flat.mul_(unpack(bits, flat.shape))
        return values
    factors = torch.empty(min(CHUNK, flat.numel()), dtype=flat.dtype, device=flat.device)
    for start in range(0, flat.numel(), CHUNK):
        chunk = flat[start : start + CHUNK]
        chunk.mul_(factors[: len(chunk)].copy_(unpack(bits[start // 8 : (start + CHUNK) // 8], chunk.shape)))
    return values


def pack_images(activated: Tensor, upper: float) -> Tensor:
    """As :func:`pack`, of ``[N, ...]``: ``uint8 [N, bytes]``, where each image begins with a byte."""
    images = activated.flatten(1)
    if rest := -images.shape[1] % 8:
        images = F.pad(images, (0, rest))
    return pack(images, upper).view(len(images), images.shape[1] // 8)


def mask_images_(values: Tensor, bits: Tensor) -> Tensor:
    """As :func:`mask_`, by the mask that :func:`pack_images` gave."""
    if values[:1].numel() % 8 == 0:
        return mask_(values, bits.view(-1))
    images = values.view(len(values), -1)
    images.mul_(unpack(bits.reshape(-1), (len(bits), 8 * bits.shape[1]))[:, : images.shape[1]])
    return values


def _pack_on_cpu(flat: Tensor, upper: float) -> Tensor:
    """NumPy compares and packs several times as fast as PyTorch does; the memory is PyTorch's, and counted."""
    comparable, bound = flat, torch.tensor(upper, dtype=flat.dtype)
    if flat.dtype == torch.bfloat16:  # NumPy has none; as integers, those above 0 are in the same order
        comparable, bound = flat.view(torch.int16), bound.view(torch.int16)
    packed = torch.empty(-(-flat.numel() // 8), dtype=torch.uint8)
    scratch = torch.empty(2, min(CHUNK, flat.numel()), dtype=torch.bool).numpy()
    for start in range(0, flat.numel(), CHUNK):
        values = comparable[start : start + CHUNK].numpy()
        inside, below = scratch[:, : len(values)]
        np.greater(values, 0, out=inside)
        if upper != float("inf"):
            np.logical_and(inside, np.less(values, bound.numpy(), out=below), out=inside)
        packed.numpy()[start // 8 : (start + CHUNK) // 8] = np.packbits(inside, bitorder="little")
    return packed


@functools.cache
def _table(device: torch.device) -> Tensor:
    """The eight values of each byte, as the bytes of an ``int64``."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return bits.to(torch.uint8).view(torch.int64).view(-1)
