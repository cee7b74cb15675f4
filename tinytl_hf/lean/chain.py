"""A chain of frozen convolutions, each with its norm and activation, as one autograd function over slices.

With frozen weights, the gradient of a chain's input and of its biases needs the weights and, of each
activation, one bit a value (ReLU, ReLU6) or its input (hardswish, SiLU). The norm is folded into the
convolution on the fly. The batch is worked through in slices, forward and backward, so that the wide maps
inside an inverted residual exist for one slice at a time (TinyTL, section 3.1, applied to whole blocks).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tinytl_hf.lean import bits

UPPER = {"relu": float("inf"), "relu6": 6.0}  # activations whose gradient is a mask
SMOOTH = {"hardswish": F.hardswish, "silu": F.silu}  # those that need their input
SMOOTH_BACKWARD = {"hardswish": torch.ops.aten.hardswish_backward, "silu": torch.ops.aten.silu_backward}
SLICE_MB = 3.0  # about what stays in the cache between one stage and the next


@dataclass(frozen=True)
class Stage:
    """A frozen convolution with what follows it.

    Attributes:
        conv: The convolution.
        norm: Its frozen norm, if any.
        activation: ``relu``, ``relu6``, ``hardswish``, ``silu`` or null.
    """

    conv: nn.Conv2d
    norm: nn.BatchNorm2d | None = None
    activation: str | None = None

    @property
    def bias(self) -> Tensor | None:
        """The bias that may train: the norm's, or the convolution's where there is no norm."""
        return self.conv.bias if self.norm is None else self.norm.bias

    @property
    def is_pointwise(self) -> bool:
        """Whether it is a matrix product of rows of channels."""
        conv = self.conv
        return conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1 and conv.padding == (0, 0)

    def folded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the convolution that does the norm's work too."""
        weight, bias = self.conv.weight, self.bias
        if self.norm is not None:
            assert self.norm.running_mean is not None and self.norm.running_var is not None and bias is not None
            scale = self.norm.weight * torch.rsqrt(self.norm.running_var + self.norm.eps)
            weight = weight * scale[:, None, None, None]
            bias = bias - self.norm.running_mean * scale
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output for an input of this size."""
        conv = self.conv
        padding = conv.padding
        assert isinstance(padding, tuple)
        sizes = [
            (size + 2 * padding[i] - conv.dilation[i] * (conv.kernel_size[i] - 1) - 1) // conv.stride[i] + 1
            for i, size in enumerate((height, width))
        ]
        return sizes[0], sizes[1]


@dataclass(frozen=True)
class Chain:
    """Stages that run one after the other, with the input added at the end if ``residual``."""

    stages: tuple[Stage, ...]
    residual: bool = False
    slice_mb: float = SLICE_MB

    def __call__(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the last stage's output, keeping only what the gradients need."""
        return _ChainFunction.apply(x, self, False, *self._biases())[0]

    def with_pooled_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the mean of 2x2 px of ``x``, whose gradient then needs no tensor of its own."""
        return _ChainFunction.apply(x, self, True, *self._biases())

    def needs_gradient(self, x: Tensor) -> bool:
        """Whether anything is to be kept for a backward pass."""
        trains = any(bias is not None and bias.requires_grad for bias in self._biases())
        return torch.is_grad_enabled() and (x.requires_grad or trains)

    def slices(self, shape: torch.Size, itemsize: int) -> Iterator[slice]:
        """Ranges of the batch whose widest map takes about ``slice_mb``."""
        images, _, height, width = shape
        widest = 1
        for stage in self.stages:
            height, width = stage.output_size(height, width)
            widest = max(widest, stage.conv.out_channels * height * width * itemsize)
        count = max(1, int(self.slice_mb * 1e6) // widest)
        count = -(-images // -(-images // count))  # of one size, as far as it goes
        for start in range(0, images, count):
            yield slice(start, min(start + count, images))

    def input_sizes(self, shape: torch.Size) -> list[tuple[int, int, int]]:
        """Channels, height and width of each stage's input."""
        height, width = shape[2:]
        sizes = []
        for stage in self.stages:
            sizes.append((stage.conv.in_channels, height, width))
            height, width = stage.output_size(height, width)
        return sizes

    def _biases(self) -> list[Tensor | None]:
        return [stage.bias for stage in self.stages]


class _ChainFunction(Function):
    """The chain's output; keeps masks and pre-activations only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, chain: Chain, pools: bool, *biases: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        folded = [stage.folded(dtype) for stage in chain.stages]
        kept: list[Tensor] = []
        outputs, pooled = _Gathered(x.shape[0]), _Gathered(x.shape[0])
        scratch = _Scratch()
        with torch.autocast(device, enabled=False):
            for part in chain.slices(x.shape, dtype.itemsize):
                maps = inputs = x[part].to(dtype)
                for i, (stage, (weight, bias)) in enumerate(zip(chain.stages, folded, strict=True)):
                    # What a smooth activation keeps must not be overwritten by the next slice.
                    reused = None if stage.activation in SMOOTH else scratch
                    maps = _activate(stage, _convolve(stage, maps, weight, bias, reused, i), kept)
                if chain.residual:
                    maps += inputs
                outputs.put(part, maps)
                if pools:
                    pooled.put(part, F.avg_pool2d(inputs, 2))
        ctx.save_for_backward(*kept)
        ctx.chain, ctx.shape, ctx.dtype, ctx.compute_dtype = chain, x.shape, x.dtype, dtype
        return outputs.whole, pooled.whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_pooled: Tensor | None) -> tuple[Tensor | None, ...]:
        chain: Chain = ctx.chain
        needs_input, _, _, *needs_bias = ctx.needs_input_grad
        dtype = ctx.compute_dtype
        weights = [stage.folded(dtype)[0] for stage in chain.stages]
        sums: list[Tensor | None] = [None] * len(chain.stages)
        kept = iter(ctx.saved_tensors)
        grad_input = _Gathered(ctx.shape[0])
        scratch = _Scratch()
        for part in chain.slices(ctx.shape, dtype.itemsize):
            outer = grad[part].contiguous(memory_format=torch.channels_last)
            masks = [next(kept) if stage.activation is not None else None for stage in chain.stages]
            flowing = _slice_backward(chain, outer, weights, masks, sums, needs_bias, needs_input, ctx.shape, scratch)
            if needs_input:
                if chain.residual:
                    flowing.add_(outer)
                if grad_pooled is not None:
                    _add_spread(flowing, grad_pooled[part])
                grad_input.put(part, flowing.to(ctx.dtype))
        bias_grads = [
            None if total is None or stage.bias is None else total.to(stage.bias.dtype)
            for stage, total in zip(chain.stages, sums, strict=True)
        ]
        return grad_input.whole, None, None, *bias_grads


class _Gathered:
    """A channels-last tensor that is filled slice by slice, and made when its first slice comes."""

    def __init__(self, images: int) -> None:
        self.images = images
        self.whole: Tensor | None = None

    def put(self, part: slice, maps: Tensor) -> None:
        if self.whole is None:
            shape = (self.images, *maps.shape[1:])
            self.whole = torch.empty(shape, dtype=maps.dtype, device=maps.device, memory_format=torch.channels_last)
        self.whole[part] = maps


class _Scratch:
    """Memory that the slices of one pass use in turn: fresh memory costs a page fault every 4 kB."""

    def __init__(self) -> None:
        self.buffers: dict[int, Tensor] = {}

    def take(self, key: int, values: int, like: Tensor) -> Tensor:
        """At least ``values`` values; the first slice is the largest."""
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < values:
            buffer = self.buffers[key] = torch.empty(values, dtype=like.dtype, device=like.device)
        return buffer[:values]


def _slice_backward(
    chain: Chain,
    outer: Tensor,
    weights: list[Tensor],
    kept: list[Tensor | None],
    sums: list[Tensor | None],
    needs_bias: list[bool],
    needs_input: bool,
    shape: torch.Size,
    scratch: _Scratch,
) -> Tensor:
    """The gradient of a slice's input; adds the gradients of the biases to ``sums``."""
    sizes = chain.input_sizes(shape)
    last_needed = 0 if needs_input else needs_bias.index(True)
    flowing, mask = outer, _mask(chain.stages[-1], kept[-1], outer, len(kept), scratch)
    for i in reversed(range(last_needed, len(chain.stages))):
        stage, saved = chain.stages[i], kept[i]
        if mask is not None:
            flowing = flowing * mask if flowing is outer else flowing.mul_(mask)
        elif saved is not None:
            flowing = SMOOTH_BACKWARD[str(stage.activation)](flowing, saved)
        if needs_bias[i]:
            total = _rows(flowing).sum(0, dtype=torch.promote_types(flowing.dtype, torch.float32))
            before = sums[i]
            sums[i] = total if before is None else before + total
        if i > last_needed or needs_input:
            maps = (flowing.shape[0], *sizes[i])
            before_stage = None if i == 0 else chain.stages[i - 1]
            mask = None if before_stage is None else _mask(before_stage, kept[i - 1], flowing, i, scratch, maps)
            flowing = _convolve_backward(stage, flowing, weights[i], maps, mask)
    return flowing


def _mask(
    stage: Stage, kept: Tensor | None, like: Tensor, key: int, scratch: _Scratch, shape: tuple[int, ...] | None = None
) -> Tensor | None:
    """The mask of a stage's activation as a channels-last tensor; null if its gradient is no mask."""
    if kept is None or stage.activation not in UPPER:
        return None
    images, channels, height, width = like.shape if shape is None else shape
    memory = scratch.take(-1 - key % 2, 8 * kept.numel(), like)
    rows = bits.unpack(kept, (images * height * width, channels), like.dtype, out=memory)
    return _images(rows, images, height, width)


def _add_spread(maps: Tensor, grad_pooled: Tensor) -> None:
    """Add to ``maps`` the gradient of their 2x2 means."""
    quarter = grad_pooled.to(maps.dtype) / 4
    height, width = 2 * quarter.shape[2], 2 * quarter.shape[3]
    for top in (0, 1):
        for left in (0, 1):
            maps[:, :, top:height:2, left:width:2] += quarter


def _rows(maps: Tensor) -> Tensor:
    """``[N, C, H, W]`` as ``[N * H * W, C]``: a view of channels-last memory."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def _images(rows: Tensor, images: int, height: int, width: int) -> Tensor:
    return rows.view(images, height, width, rows.shape[1]).permute(0, 3, 1, 2)


def _convolve(
    stage: Stage, maps: Tensor, weight: Tensor, bias: Tensor | None, scratch: _Scratch | None, key: int
) -> Tensor:
    images, _, height, width = maps.shape
    if stage.is_pointwise:
        matrix, rows = weight.flatten(1).t(), _rows(maps)
        out = None
        if scratch is not None:
            out = scratch.take(key, rows.shape[0] * matrix.shape[1], rows).view(-1, matrix.shape[1])
        rows = torch.mm(rows, matrix, out=out) if bias is None else torch.addmm(bias, rows, matrix, out=out)
        return _images(rows, images, height, width)
    conv = stage.conv
    maps = F.conv2d(maps, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return maps.contiguous(memory_format=torch.channels_last)


def _convolve_backward(
    stage: Stage, grad: Tensor, weight: Tensor, input_shape: tuple[int, ...], unread: Tensor | None
) -> Tensor:
    """The gradient of the input, for which the convolution's input itself is not needed."""
    images, _, height, width = input_shape
    conv = stage.conv
    if stage.is_pointwise:
        return _images(_rows(grad) @ weight.flatten(1), images, height, width)
    padding = tuple(size // 2 for size in conv.kernel_size)
    keeps_size = conv.stride == (1, 1) and conv.dilation == (1, 1) and conv.padding == padding
    if keeps_size and conv.groups == conv.in_channels == conv.out_channels and conv.kernel_size[0] % 2 == 1:
        grad_input = F.conv2d(grad, weight.flip(2, 3), None, 1, conv.padding, 1, conv.groups)
    else:
        # The kernel wants a tensor of the input's shape and layout, and does not read it.
        if unread is None:
            layout = torch.channels_last
            unread = torch.empty(input_shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
        geometry = (conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups)
        mask = [True, False, False]
        grad_input = torch.ops.aten.convolution_backward(grad, unread, weight, None, *geometry, mask)[0]
    return grad_input.contiguous(memory_format=torch.channels_last)


def _activate(stage: Stage, maps: Tensor, kept: list[Tensor]) -> Tensor:
    """Apply the activation, in place if it can be, and keep what its gradient needs."""
    if stage.activation is None:
        return maps
    if stage.activation in SMOOTH:
        kept.append(maps)
        return SMOOTH[stage.activation](maps)
    upper = UPPER[stage.activation]
    maps.clamp_(0, upper)
    kept.append(bits.pack(_rows(maps), upper))
    return maps
