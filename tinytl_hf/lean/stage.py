"""A frozen convolution with its norm and activation: what it computes forward and backward, on some images.

With a frozen weight, the gradient of the input needs the weight alone and, of ReLU and ReLU6, one bit a value.
Hardswish and SiLU need the value before them: a stage that has one is for a slice that is computed again. The norm is
folded into the convolution on the fly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinytl_hf.lean import bits
from tinytl_hf.lean.int8 import Int8Conv2d, weight_of
from tinytl_hf.network.same_padding import SameConv2d, same_padding

UPPER = {"relu": float("inf"), "relu6": 6.0}  # activations whose gradient is a mask
SMOOTH = ("hardswish", "silu")  # those whose gradient needs the value before them


@dataclass(frozen=True)
class Stage:
    """A frozen convolution with what follows it.

    Attributes:
        conv: The convolution.
        norm: Its frozen norm, if any.
        activation: A key of :data:`UPPER`, one of :data:`SMOOTH`, which is for what is computed again, or None.
    """

    conv: nn.Conv2d
    norm: nn.BatchNorm2d | None = None
    activation: str | None = None

    @property
    def bias(self) -> Tensor | None:
        """The bias that may train: the norm's, or the convolution's where there is no norm."""
        return self.conv.bias if self.norm is None else self.norm.bias

    @property
    def read_backward(self) -> list[Tensor]:
        """The tensors of its layers that its gradient depends on."""
        found = [self.conv.weight]
        if isinstance(self.conv, Int8Conv2d):
            found.append(self.conv.weight_scale)
        if self.norm is not None:
            assert self.norm.running_var is not None
            found += [self.norm.weight, self.norm.running_var]
        return found

    @property
    def tensors(self) -> list[Tensor | None]:
        """All that it computes with; those of a model that was cast can be of several types."""
        return [*self.read_backward, self.bias, None if self.norm is None else self.norm.running_mean]

    def folded_weight(self, dtype: torch.dtype) -> Tensor:
        """Weight of the convolution that does the norm's work too."""
        weight = weight_of(self.conv)
        scale = self._scale()
        return (weight if scale is None else weight * scale[:, None, None, None]).to(dtype)

    def folded_bias(self, dtype: torch.dtype) -> Tensor | None:
        """Its bias, if any."""
        bias, scale = self.bias, self._scale()
        if scale is not None:
            assert self.norm is not None and self.norm.running_mean is not None and bias is not None
            bias = torch.addcmul(bias, self.norm.running_mean, scale, value=-1)
        return None if bias is None else bias.to(dtype)

    def _scale(self) -> Tensor | None:
        if self.norm is None:
            return None
        assert self.norm.running_var is not None
        return self.norm.weight * torch.rsqrt(self.norm.running_var + self.norm.eps)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output for an input of this size."""
        conv = self.conv
        if isinstance(conv, SameConv2d):
            return -(-height // conv.stride[0]), -(-width // conv.stride[1])
        padding = conv.padding
        assert isinstance(padding, tuple)
        sizes = [
            (size + 2 * padding[i] - conv.dilation[i] * (conv.kernel_size[i] - 1) - 1) // conv.stride[i] + 1
            for i, size in enumerate((height, width))
        ]
        return sizes[0], sizes[1]

    def activate(self, maps: Tensor, kept: Tensor | None) -> Tensor:
        """The activation's output, over ``maps``; what its gradient needs is written to ``kept``, if given."""
        if self.activation is None:
            return maps
        if self.activation in SMOOTH:
            if kept is not None:
                kept.copy_(maps)
            return F.silu(maps, inplace=True) if self.activation == "silu" else F.hardswish(maps, inplace=True)
        upper = UPPER[self.activation]
        maps.clamp_(0, upper)
        if kept is not None:
            kept.copy_(bits.pack_images(maps.permute(0, 2, 3, 1), upper))
        return maps

    def activate_backward(self, grad: Tensor, kept: Tensor | None, in_place: bool) -> Tensor:
        """The gradient before the activation, of the one after it; ``grad`` is written over if ``in_place``."""
        if kept is None:
            return grad
        if self.activation in SMOOTH:
            backward = torch.ops.aten.silu_backward if self.activation == "silu" else torch.ops.aten.hardswish_backward
            return backward(grad, kept.to(grad.dtype))
        rows = (grad if in_place else grad.clone()).permute(0, 2, 3, 1)
        return bits.mask_images_(rows, kept).permute(0, 3, 1, 2)

    def convolve_backward(self, grad: Tensor, weight: Tensor, input_shape: tuple[int, ...]) -> Tensor:
        """The gradient of the convolution's input, for which that input itself is not needed."""
        conv = self.conv
        stays = tuple(size // 2 for size in conv.kernel_size)
        same = isinstance(conv, SameConv2d)
        keeps_size = conv.stride == (1, 1) and conv.dilation == (1, 1) and conv.padding == stays and not same
        depthwise = conv.groups == conv.in_channels == conv.out_channels and conv.kernel_size[0] % 2 == 1
        if keeps_size and conv.kernel_size == (1, 1) and conv.groups == 1:
            grad_input = F.conv2d(grad, weight.transpose(0, 1))
        elif keeps_size and depthwise:
            grad_input = F.conv2d(grad, weight.flip(2, 3), None, 1, conv.padding, 1, conv.groups)
        else:
            # On a CPU, bf16 takes 30 to 100 times as long as fp32 for depthwise convolutions with a stride, and
            # without AVX-512 it also rounds each partial sum.
            in_fp32 = grad.device.type == "cpu" and (depthwise or torch.backends.cpu.get_cpu_capability() != "AVX512")
            dtype = torch.promote_types(grad.dtype, torch.float32) if in_fp32 else grad.dtype
            left, right, top, bottom = same_padding(conv, *input_shape[2:]) if same else (0, 0, 0, 0)
            images, channels, height, width = input_shape
            padded_shape = (images, channels, height + top + bottom, width + left + right)
            # The kernel wants a tensor of the input's shape and layout, and does not read it.
            unread = torch.empty(padded_shape, dtype=dtype, device=grad.device, memory_format=torch.channels_last)
            grad_input = convolution_backward(conv, grad.to(dtype), unread, weight.to(dtype), [True, False])[0]
            grad_input = grad_input[:, :, top : top + height, left : left + width].to(grad.dtype)
        return grad_input.contiguous(memory_format=torch.channels_last)


def convolve(conv: nn.Conv2d, maps: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What ``conv`` computes with another weight and bias, channels-last."""
    if isinstance(conv, SameConv2d):
        maps = F.pad(maps, same_padding(conv, *maps.shape[-2:]))
    maps = F.conv2d(maps, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return maps.contiguous(memory_format=torch.channels_last)


def convolution_backward(
    conv: nn.Conv2d, grad: Tensor, input: Tensor, weight: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of the weight, where ``wanted``."""
    geometry = (conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups)
    return torch.ops.aten.convolution_backward(grad, input, weight, None, *geometry, [*wanted, False])[:2]
