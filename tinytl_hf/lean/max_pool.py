"""Max pooling that keeps one byte a value: which place of its window was the largest.

Stock PyTorch keeps the input and an index of eight bytes for each value of the output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tinytl_hf.lean.function import LeanFunction, once_differentiable
from tinytl_hf.lean.slices import Gathered, even_slices, slice_mb_on

LARGEST_WINDOW = 256  # places that a byte can tell apart


class LeanMaxPool2d(nn.MaxPool2d):
    """Max pooling that keeps one byte a value.

    Attributes:
        slice_mb: The engine's slices: about how much of the indices of eight bytes exists at a time on a CPU, in MB.
    """

    slice_mb: float | None = None

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.MaxPool2d``."""
        if not self.training:
            return super().forward(input)
        return _MaxPool.apply(input, self)


def is_plain(pool: nn.MaxPool2d) -> bool:
    """Whether the lean layer can take its place."""
    height, width = _both(pool.kernel_size)
    return _both(pool.dilation) == (1, 1) and not pool.return_indices and height * width <= LARGEST_WINDOW


def _both(size: int | Sequence[int]) -> tuple[int, int]:
    """A size of a window for rows and columns, which PyTorch takes as one number, too."""
    rows, columns = (size, size) if isinstance(size, int) else size
    return rows, columns


class _MaxPool(LeanFunction):
    @staticmethod
    def forward(ctx: Any, input: Tensor, pool: LeanMaxPool2d) -> Tensor | None:
        geometry = (_both(pool.kernel_size), _both(pool.stride), _both(pool.padding), (1, 1), pool.ceil_mode)
        ctx.geometry, ctx.shape = geometry, input.shape
        outputs, places = Gathered(len(input)), []
        for part in _slices(input, pool.slice_mb):
            output, indices = torch.ops.aten.max_pool2d_with_indices(input[part], *geometry)
            outputs.put(part, output)
            if ctx.needs_input_grad[0]:
                rows, columns = _corners(indices, geometry)
                in_window = (indices // input.shape[3] - rows) * geometry[0][1] + indices % input.shape[3] - columns
                places.append(in_window.to(torch.uint8))
        ctx.save_for_backward(*places)
        return outputs.whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        width, kernel_width = ctx.shape[3], ctx.geometry[0][1]
        grads, start = Gathered(len(grad)), 0
        for places in ctx.saved_tensors:
            part = slice(start, start + len(places))
            rows, columns = _corners(places, ctx.geometry)
            in_window = places.to(torch.int64)
            indices = (in_window // kernel_width + rows) * width + in_window % kernel_width + columns
            unread = grad.new_empty((len(places), *ctx.shape[1:]))  # the kernel wants its shape
            backward = torch.ops.aten.max_pool2d_with_indices_backward
            grads.put(part, backward(grad[part].contiguous(), unread, *ctx.geometry, indices))
            start = part.stop
        return grads.whole, None


def _slices(input: Tensor, slice_mb: float | None) -> Iterator[slice]:
    if input.device.type != "cpu":
        return iter([slice(0, len(input))])
    a_quarter_of_eight_bytes = 2 * input[:1].numel()
    return even_slices(len(input), a_quarter_of_eight_bytes, slice_mb_on(input.device, slice_mb))


def _corners(maps: Tensor, geometry: Any) -> tuple[Tensor, Tensor]:
    """Row and column of the input where each window of ``maps`` begins."""
    _, (down, right), (above, before), _, _ = geometry
    rows = torch.arange(maps.shape[2], device=maps.device)[:, None] * down - above
    columns = torch.arange(maps.shape[3], device=maps.device) * right - before
    return rows, columns
