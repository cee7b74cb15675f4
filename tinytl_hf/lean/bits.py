"""Masks of one bit a value, on any device."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

PACK_EIGHT = 0x0102040810204080  # gathers the lowest bits of eight bytes in the highest byte


def pack(activated: Tensor, upper: float) -> Tensor:
    """One bit for each value: whether it lies strictly between 0 and ``upper``.

    Args:
        activated: ReLU's (``upper`` infinite) or ReLU6's output, contiguous.
        upper: Where the activation saturates.

    Returns:
        ``uint8`` ``[ceil(values / 8)]``, in the order of the values.
    """
    flat = activated.reshape(-1)
    if flat.device.type == "cpu" and flat.dtype == torch.float32:
        return _pack_float32(flat, upper)
    inside = (flat > 0) & (flat < upper)
    padded = F.pad(inside.view(torch.uint8), (0, -flat.numel() % 8))
    return ((padded.view(torch.int64) * PACK_EIGHT) >> 56).to(torch.uint8)


def unpack(bits: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The mask as zeros and ones of ``dtype`` in ``shape``."""
    values = F.embedding(bits.int(), _table(dtype, bits.device)).reshape(-1)
    return values[: torch.Size(shape).numel()].view(shape)


def _pack_float32(flat: Tensor, upper: float) -> Tensor:
    """Positive floats compare as integers do, and one subtraction makes zero the largest of them."""
    shifted = flat.view(torch.int32) - 1
    bound = np.float32(upper).view(np.uint32) - np.uint32(1)
    inside = torch.empty(flat.numel(), dtype=torch.bool)
    np.less(shifted.numpy().view(np.uint32), bound, out=inside.numpy())
    packed = torch.empty(-(-flat.numel() // 8), dtype=torch.uint8)  # PyTorch's memory, so that it is counted
    packed.numpy()[:] = np.packbits(inside.numpy(), bitorder="little")
    return packed


@functools.cache
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The eight values of each byte."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return bits.to(dtype)
