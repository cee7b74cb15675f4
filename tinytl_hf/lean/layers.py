"""Single lean layers: stock modules whose pass in training mode keeps less; in evaluation mode they are stock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.misc import Conv2dNormActivation

from tinytl_hf.config.engine import BackendName
from tinytl_hf.lean import backend, bits, operators
from tinytl_hf.lean.again import is_computed_again
from tinytl_hf.lean.function import LeanFunction, once_differentiable
from tinytl_hf.lean.int8 import Int8Conv2d, Int8SameConv2d
from tinytl_hf.lean.slices import compute_dtype
from tinytl_hf.lean.stage import UPPER
from tinytl_hf.network.norms import FrozenBatchNorm2d, FrozenBatchNormAct2d
from tinytl_hf.network.same_padding import SameConv2d


class LeanConv2d(nn.Conv2d):
    """A convolution with a frozen weight: keeps nothing.

    Attributes:
        chain: Its training pass.
    """

    chain: Callable[[Tensor], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Conv2d``."""
        if not self.training:
            return super().forward(input)
        return self.chain(input)


class LeanInt8Conv2d(LeanConv2d, Int8Conv2d):
    """A lean convolution whose weight is stored as int8."""


class LeanSameConv2d(LeanConv2d, SameConv2d):
    """A lean convolution with SAME padding."""


class LeanInt8SameConv2d(LeanConv2d, Int8SameConv2d):
    """A lean convolution with SAME padding whose weight is stored as int8."""


class LeanFrozenBatchNorm2d(FrozenBatchNorm2d):
    """A norm with frozen statistics and scale: keeps nothing of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """As :class:`~tinytl_hf.network.norms.FrozenBatchNorm2d`."""
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        shift = self.bias - self.running_mean * scale
        return (input * scale[:, None, None] + shift[:, None, None]).to(input.dtype)


class LeanFrozenBatchNormAct2d(LeanFrozenBatchNorm2d, FrozenBatchNormAct2d):
    """A frozen norm that holds its activation: keeps nothing of its input itself."""

    def forward(self, input: Tensor) -> Tensor:
        """As :class:`~tinytl_hf.network.norms.FrozenBatchNormAct2d`."""
        return self.act(LeanFrozenBatchNorm2d.forward(self, input)) if self.training else super().forward(input)


class NormOfConvolution(FrozenBatchNormAct2d):
    """A frozen norm and its activation that train as a part of the convolution before them, which does their work.

    Attributes:
        of: That convolution. It is in a tuple, as a module that is an attribute would become a child. Its mode counts,
            not the norm's.
    """

    of: tuple[LeanConv2d]

    def forward(self, input: Tensor) -> Tensor:
        """As :class:`~tinytl_hf.network.norms.FrozenBatchNormAct2d`; what it is given, where its work is done."""
        return input if self.of[0].training else super().forward(input)


class UnreadLinear(nn.Linear):
    """A frozen last layer of a block that is computed again: then, only its gradient is.

    Attributes:
        block: That block. It is in a tuple, as a module that is an attribute would become a child.
    """

    block: tuple[nn.Module]

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear``; while it is computed again, room for its output, which holds anything."""
        if not is_computed_again() or self.weight.requires_grad or scales_output(self.block[0]):
            return super().forward(input)
        return _UnreadLinear.apply(input, self.weight, self.bias)


class LeanReLU(nn.ReLU):
    """ReLU that keeps one bit a value."""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.ReLU``."""
        if not self.training:
            return super().forward(input)
        return masked_relu(input, UPPER["relu"])


class LeanReLU6(nn.ReLU6):
    """ReLU6 that keeps one bit a value."""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.ReLU6``."""
        if not self.training:
            return super().forward(input)
        return masked_relu(input, UPPER["relu6"])


class LeanConvNormActivation(Conv2dNormActivation):
    """torchvision's convolution, norm and activation as one lean function.

    Attributes:
        chain: Its training pass.
    """

    chain: Callable[[Tensor], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """As ``Conv2dNormActivation``."""
        if not self.training:
            return super().forward(input)
        return self.chain(input)


def scales_output(block: nn.Module) -> bool:
    """Whether a factor trains that a block multiplies its last layer's output by, whose gradient needs that output."""
    return any(parameter.requires_grad for parameter in block.parameters(recurse=False))


def masked_relu(input: Tensor, upper: float) -> Tensor:
    """``clamp(input, 0, upper)``; keeps one bit a value."""
    return _MaskedReLU.apply(input, upper)


def upsample_add(maps: Tensor, small: Tensor, backend_name: BackendName = "auto") -> Tensor:
    """Add ``small``, bilinearly resized, to ``maps``, in place except in a compiled graph; keeps nothing."""
    if torch.compiler.is_compiling():
        return operators.upsample_add(maps, small, backend_name)
    return _UpsampleAdd.apply(maps, small, backend_name)


def upsample_gradient(grad: Tensor, small: Tensor, backend_name: BackendName) -> Tensor:
    """The gradient of ``small``, which has been resized and added to maps whose gradient is ``grad``."""
    chosen = backend.named(backend.of_upsampling(backend_name, grad, small))
    return chosen.upsample_backward(grad, small.shape, small.dtype)


def average_pool(input: Tensor) -> Tensor:
    """Mean of 2x2 px; keeps nothing."""
    return _AveragePool.apply(input)


class _UnreadLinear(LeanFunction):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype, ctx.of_bias = input.dtype, None if bias is None else bias.dtype
        return input.new_empty((*input.shape[:-1], len(weight)), dtype=compute_dtype(input))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (weight,) = ctx.saved_tensors
        of_input = (grad @ weight.to(grad.dtype)).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        of_bias = grad.flatten(0, -2).sum(0).to(ctx.of_bias) if ctx.needs_input_grad[2] else None
        return of_input, None, of_bias


class _MaskedReLU(LeanFunction):
    @staticmethod
    def forward(ctx: Any, input: Tensor, upper: float) -> Tensor:
        output = input.clamp(0, upper)
        if not ctx.needs_input_grad[0]:
            return output
        ctx.channels_last = output.is_contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(bits.pack(_flat(output, ctx.channels_last), upper))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        layout = torch.channels_last if ctx.channels_last else torch.contiguous_format
        flat = _flat(grad.clone(memory_format=layout), ctx.channels_last)
        masked = bits.mask_(flat, mask)
        return masked.permute(0, 3, 1, 2) if ctx.channels_last else masked, None


class _UpsampleAdd(LeanFunction):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, small: Tensor, backend_name: BackendName) -> Tensor:
        ctx.mark_dirty(maps)
        ctx.shape, ctx.dtype = small.shape, small.dtype
        ctx.backend = backend.named(backend.of_upsampling(backend_name, maps, small))
        ctx.backend.upsample_add(maps, small)
        return maps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, ctx.backend.upsample_backward(grad, ctx.shape, ctx.dtype), None


class _AveragePool(LeanFunction):
    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.size = input.shape[-2:]
        return F.avg_pool2d(input, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        height, width = ctx.size
        spread = F.interpolate(grad / 4, scale_factor=2, mode="nearest")
        return F.pad(spread, (0, width % 2, 0, height % 2))


def _flat(maps: Tensor, channels_last: bool) -> Tensor:
    """The values in the order of their memory."""
    return maps.permute(0, 2, 3, 1) if channels_last else maps.contiguous()
