"""Maps as the Triton kernels take them: ``[N, C, H, W]`` outside, contiguous ``[N, H, W, C]`` inside."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def as_given(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Run on the device of its tensors, in the types that they have, without autograd."""

    @wraps(function)
    def run(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        tensor = next(each for each in (*arguments, *named.values()) if isinstance(each, Tensor))
        with torch.no_grad(), torch.autocast(tensor.device.type, enabled=False), torch.cuda.device_of(tensor):
            return function(*arguments, **named)

    return run


def rows_of(maps: Tensor, dtype: torch.dtype) -> Tensor:
    """``[N, C, H, W]`` of any layout as contiguous ``[N, H, W, C]``."""
    return nhwc(maps.to(dtype).contiguous(memory_format=torch.channels_last))


def nhwc(maps: Tensor) -> Tensor:
    """A view from outside in."""
    return maps.permute(0, 2, 3, 1)


def nchw(maps: Tensor) -> Tensor:
    """A view from inside out."""
    return maps.permute(0, 3, 1, 2)


def matrix(maps: Tensor) -> Tensor:
    """``[N, H, W, C]`` as ``[N * H * W, C]``."""
    return maps.view(-1, maps.shape[-1])
