"""Slices of a batch: how many images at a time, and how their maps come together again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type in which layers compute with ``x``: that of autocast, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def without_autocast(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Compute in the types of its tensors, whatever the caller's mixed precision is."""

    @wraps(function)
    def run(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        device = next(each.device.type for each in (*arguments, *named.values()) if isinstance(each, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*arguments, **named)

    return run


def slice_mb_on(device: torch.device, slice_mb: float | None) -> float:
    """``slice_mb``, or the device's default: what stays in a CPU's cache from layer to layer, and much on a GPU."""
    return slice_mb or (5.0 if device.type == "cpu" else 200.0)


def even_slices(images: int, image_bytes: int, slice_mb: float) -> Iterator[slice]:
    """Cut ``images`` into ranges of equal size (the last may be smaller), each of at most about ``slice_mb``.

    Without images there is one empty range.
    """
    if images == 0:
        yield slice(0, 0)
        return
    count = max(1, int(slice_mb * 1e6) // image_bytes)
    count = -(-images // -(-images // count))
    for start in range(0, images, count):
        yield slice(start, min(start + count, images))


def empty_maps(like: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Channels-last maps of ``shape``, on the device of ``like``."""
    return torch.empty(tuple(shape), dtype=dtype, device=like.device, memory_format=torch.channels_last)


class Gathered:
    """A channels-last tensor of the whole batch that is filled slice by slice, and made when its first slice comes."""

    def __init__(self, images: int) -> None:
        self.images = images
        self.whole: Tensor | None = None

    def put(self, part: slice, maps: Tensor) -> None:
        """Take in the maps of a slice of the batch."""
        if len(maps) == self.images:
            self.whole = maps
            return
        if self.whole is None:
            self.whole = empty_maps(maps, maps.dtype, (self.images, *maps.shape[1:]))
        self.whole[part] = maps
