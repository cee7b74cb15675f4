"""TensorFlow's SAME padding, which depends on the size of the maps and can be wider at the bottom right."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SameConv2d(nn.Conv2d):
    """A convolution whose output has ``ceil(size / stride)`` px; timm's ``Conv2dSame`` under our own name."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padded = F.pad(input, same_padding(self, *input.shape[-2:]))
        return F.conv2d(padded, weight, bias, self.stride, 0, self.dilation, self.groups)


def same_padding(conv: nn.Conv2d, height: int, width: int) -> tuple[int, int, int, int]:
    """Zeros that a :class:`SameConv2d` adds to maps of this size: left, right, top, bottom (px)."""
    top, bottom = _both_sides(height, conv.kernel_size[0], conv.stride[0], conv.dilation[0])
    left, right = _both_sides(width, conv.kernel_size[1], conv.stride[1], conv.dilation[1])
    return left, right, top, bottom


def _both_sides(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    reach = (-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1
    total = max(reach - size, 0)
    return total // 2, total - total // 2
