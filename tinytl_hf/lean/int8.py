"""Frozen convolution weights stored as int8 with a scale for each output channel, and dequantised on use.

The TinyTL paper's memory figures assume 8-bit frozen weights (section 4.1). Gradients and biases stay fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinytl_hf.network.same_padding import SameConv2d

LARGEST = 127  # symmetric: -128 is not used


class Int8Conv2d(nn.Conv2d):
    """A convolution whose ``weight`` is int8, and a buffer: averages of models take it over as it is.

    Attributes:
        weight_scale: fp32 ``[out_channels]``; the weight is ``weight * weight_scale``.
    """

    weight: Tensor
    weight_scale: Tensor

    def dequantised(self) -> Tensor:
        """The weight in the type of the scale."""
        return self.weight.to(self.weight_scale.dtype) * self.weight_scale[:, None, None, None]

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Conv2d``."""
        return self._conv_forward(input, self.dequantised(), self.bias)


class Int8SameConv2d(Int8Conv2d, SameConv2d):
    """A convolution with SAME padding whose ``weight`` is int8."""


STORED_AS_INT8: dict[type[nn.Conv2d], type[Int8Conv2d]] = {nn.Conv2d: Int8Conv2d, SameConv2d: Int8SameConv2d}


def weight_of(conv: nn.Conv2d) -> Tensor:
    """The weight of a convolution, however it is stored."""
    return conv.dequantised() if isinstance(conv, Int8Conv2d) else conv.weight


@torch.no_grad()
def quantise(backbone: nn.Module) -> None:
    """Store every frozen weight of a plain convolution as int8, in place: the nearest of 255 steps."""
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d) and type(module) in STORED_AS_INT8 and not module.weight.requires_grad:
            scale = module.weight.abs().amax((1, 2, 3)) / LARGEST
            scale[scale == 0] = 1.0
            steps = (module.weight / scale[:, None, None, None]).round_().to(torch.int8)
            module.__class__ = STORED_AS_INT8[type(module)]
            del module.weight
            module.register_buffer("weight", steps)
            module.register_buffer("weight_scale", scale)


@torch.no_grad()
def dequantise(backbone: nn.Module) -> None:
    """Turn what :func:`quantise` stored back into convolutions with an fp32 weight, in place."""
    for module in backbone.modules():
        if isinstance(module, Int8Conv2d):
            weight = module.dequantised()
            module.__class__ = SameConv2d if isinstance(module, SameConv2d) else nn.Conv2d  # type: ignore[assignment]
            module.weight = nn.Parameter(weight, requires_grad=False)
            del module.weight_scale
