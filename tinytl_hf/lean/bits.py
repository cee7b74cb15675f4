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


def unpack(bits: Tensor, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The mask as zeros and ones of ``dtype`` in ``shape``; in the memory of ``out``, if that is given."""
    values = torch.Size(shape).numel()
    table = _table(dtype, bits.device)
    if out is None:
        return F.embedding(bits.int(), table).view(-1)[:values].view(shape)
    padded = out.view(-1)[: 8 * bits.numel()].view(-1, 8)
    torch.index_select(table, 0, bits.int(), out=padded)
    return out.view(-1)[:values].view(shape)


def _pack_float32(flat: Tensor, upper: float) -> Tensor:
    """NumPy compares and packs several times as fast as PyTorch does; the memory is PyTorch's, and counted."""
    values = flat.numpy()
    inside = torch.empty(flat.numel(), dtype=torch.bool)
    np.greater(values, 0, out=inside.numpy())
    if upper != float("inf"):
        below = torch.empty(flat.numel(), dtype=torch.bool)
        np.less(values, np.float32(upper), out=below.numpy())
        np.logical_and(inside.numpy(), below.numpy(), out=inside.numpy())
    packed = torch.empty(-(-flat.numel() // 8), dtype=torch.uint8)
    packed.numpy()[:] = np.packbits(inside.numpy(), bitorder="little")
    return packed


@functools.cache
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The eight values of each byte."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return bits.to(dtype)
