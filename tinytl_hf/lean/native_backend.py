"""The native back-end: a chain or a lite branch is one call of a C function each way (``native/``).

A thread works through its share of the batch a few rows at a time, so that all that a chain makes in between stays in
the cache. Sums are fp32; maps may be bf16, which a processor with AVX-512 BF16 multiplies in pairs. Results depend on
the number of threads, but not on their timing.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinytl_hf.lean.int8 import Int8Conv2d
from tinytl_hf.lean.native_branch import branch_backward as branch_backward
from tinytl_hf.lean.native_branch import branch_fits as branch_fits
from tinytl_hf.lean.native_branch import branch_forward as branch_forward
from tinytl_hf.lean.native_library import (
    DTYPES,
    LARGEST_KERNEL,
    Call,
    ChainArguments,
    StageArguments,
    UpsamplingArguments,
    channels_last,
    unfit_tensors,
)
from tinytl_hf.lean.slices import empty_maps
from tinytl_hf.lean.stage import SMOOTH, UPPER, Stage
from tinytl_hf.network.same_padding import SameConv2d, same_padding

if TYPE_CHECKING:
    from tinytl_hf.lean.chain import Chain

MOST_STAGES = 16  # of native/chain.h
ACTIVATIONS = {None: 0, "relu": 1, "relu6": 1, "hardswish": 2, "silu": 3}  # of native/native.h
CACHE_SHARE = 0.6  # of a core's second-level cache, for the maps of a chain
CACHE = 512 << 10  # bytes, where the size of that cache is not known


@functools.cache
def cache_bytes() -> int:
    """What of a chain's maps a thread may hold at a time, unless the engine says."""
    known = os.sysconf("SC_LEVEL2_CACHE_SIZE") if "SC_LEVEL2_CACHE_SIZE" in os.sysconf_names else 0
    return int(CACHE_SHARE * (known if known > 0 else CACHE))


def fits(chain: Chain, dtype: torch.dtype, shape: torch.Size) -> str | None:
    """Why the kernels cannot run a chain; None if they can."""
    if (reason := unfit_tensors(dtype, (tensor for stage in chain.stages for tensor in stage.tensors))) is not None:
        return reason
    if "unfit" not in chain.facts:
        chain.facts["unfit"] = _unfit_geometry(chain)
    if chain.facts["unfit"] is not None:
        return chain.facts["unfit"]
    return "SAME padding that differs between rows and columns" if _paddings(chain, shape) is None else None


def _unfit_geometry(chain: Chain) -> str | None:
    """Why the kernels cannot run a chain of such layers, at any size; None if they can."""
    if len(chain.stages) > MOST_STAGES or (chain.residual and chain.branch):
        return "an unusual order of layers"
    for stage in chain.stages:
        conv = stage.conv
        depthwise = conv.groups == conv.in_channels == conv.out_channels > 1
        padding = (0,) if isinstance(conv, SameConv2d) else conv.padding
        one_size = len({*conv.kernel_size}) == len({*conv.stride}) == len({*padding}) == 1
        if (conv.groups > 1 and not depthwise) or conv.dilation != (1, 1) or not one_size:
            return "a grouped, dilated or oblong convolution"
        room = 1 if isinstance(conv, SameConv2d) else 0
        fits_taps = conv.stride[0] <= conv.kernel_size[0] <= LARGEST_KERNEL - room
        if not fits_taps or int(padding[0]) >= conv.kernel_size[0]:
            return "a convolution that skips pixels, or a large kernel"
        may_pad = isinstance(conv, SameConv2d) or int(padding[0]) > 0
        if may_pad and conv.stride[0] == conv.kernel_size[0] > 1:  # shares of the rows would part pairs to be pooled
            return "a padded convolution whose kernel is as large as its stride"
        if stage.activation in UPPER and conv.out_channels % 8:
            return "a number of channels that is no multiple of 8"
    return None


@dataclass(frozen=True)
class _Padding:
    """The zeros around a stage's input, as the kernels know them: equally many on all sides.

    SAME padding can have one more at the bottom right. A kernel with a row and a column of zeros before its first ones
    computes the same with as many zeros on all sides as there are there.

    Attributes:
        size: Zeros on each side, in px.
        shift: Rows and columns of zeros to put before those of the kernel, 0 or 1.
    """

    size: int
    shift: int = 0

    def weight(self, conv: nn.Conv2d) -> Tensor:
        """The convolution's weight, as it is stored, for this padding."""
        return F.pad(conv.weight.detach(), (self.shift, 0, self.shift, 0)) if self.shift else conv.weight


def _padding(stage: Stage, size: tuple[int, int, int]) -> _Padding | None:
    """The padding of a stage for an input of ``size`` (channels, height, width); None if rows and columns differ."""
    if not isinstance(stage.conv, SameConv2d):
        return _Padding(int(stage.conv.padding[0]))
    left, right, top, bottom = same_padding(stage.conv, *size[1:])
    return _Padding(right, right - left) if (left, right) == (top, bottom) else None


def _paddings(chain: Chain, shape: torch.Size) -> list[_Padding] | None:
    """The padding of each stage for a chain's input of ``shape``; None if that is not for the kernels."""
    fact = ("paddings", *shape[1:])
    if fact not in chain.facts:
        found = [_padding(stage, size) for stage, size in zip(chain.stages, chain.map_sizes(shape)[:-1], strict=True)]
        known = [padding for padding in found if padding is not None]
        chain.facts[fact] = known if len(known) == len(found) else None
    return chain.facts[fact]


def _stages(
    chain: Chain,
    paddings: list[_Padding],
    weights: list[Tensor],
    kept: list[Tensor | None],
    grads: list[Tensor | None],
) -> tuple[Any, list[Tensor | None]]:
    """The chain's stages as an array, and the tensors that it points to; geometry is worked out once.

    Each tensor is asked for once: a parametrized one is another at each time, and gone with its last name.
    """
    if "stages" not in chain.facts:
        chain.facts["stages"] = (StageArguments * len(chain.stages))(*map(_geometry, chain.stages))
    array = type(chain.facts["stages"]).from_buffer_copy(chain.facts["stages"])
    alive: list[Tensor | None] = [*weights, *kept, *grads]
    of_stages = zip(array, chain.stages, paddings, weights, kept, grads, strict=True)
    for to, stage, padding, weight, each, grad in of_stages:
        conv, norm, bias = stage.conv, stage.norm, stage.bias
        to.kernel, to.padding = conv.kernel_size[0] + padding.shift, padding.size
        to.weight_strides[:] = weight.stride()
        if isinstance(conv, Int8Conv2d):
            to.int8_weight, to.int8_scale = weight.data_ptr(), conv.weight_scale.data_ptr()
        else:
            to.weight = weight.data_ptr()
        if norm is not None:
            vectors = [norm.weight, norm.running_mean, norm.running_var]
            to.gamma, to.mean, to.var = map(_pointer, vectors)
            to.eps = norm.eps
            alive += vectors
        alive.append(bias)
        to.bias, to.grad_bias = _pointer(bias), _pointer(grad)
        if stage.activation in SMOOTH:
            to.before = _pointer(each)
        else:
            to.mask = _pointer(each)
    return array, alive


def _geometry(stage: Stage) -> StageArguments:
    conv = stage.conv
    return StageArguments(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size[0],
        conv.stride[0],
        0,
        conv.groups > 1,
        activation=ACTIVATIONS[stage.activation],
        upper=UPPER.get(stage.activation or "", 0.0),
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _call(chain: Chain, shape: torch.Size, kept: list[Tensor | None], grads: list[Tensor | None]) -> Call:
    """What forward and backward pass have in common."""
    paddings = _paddings(chain, shape)
    assert paddings is not None
    weights = [padding.weight(stage.conv) for padding, stage in zip(paddings, chain.stages, strict=True)]
    stages, alive = _stages(chain, paddings, weights, kept, grads)
    arguments = ChainArguments(shape[0], shape[2], shape[3], len(stages), stages, chain.branch, chain.residual)
    arguments.threads = torch.get_num_threads()
    arguments.cache = cache_bytes() if chain.slice_mb is None else int(chain.slice_mb * 1e6)
    return Call(arguments, alive)


def chain_forward(
    chain: Chain, x: Tensor, dtype: torch.dtype, keeps: bool, pools: bool
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """See :class:`~tinytl_hf.lean.backend.Backend`."""
    sizes = chain.map_sizes(x.shape)
    kept = chain.empty_kept(x, dtype, keeps)
    call = _call(chain, x.shape, kept, [None] * len(kept))
    output = empty_maps(x, dtype, (len(x), *sizes[-1]))
    channels, height, width = sizes[chain.branch]
    pooled = empty_maps(x, dtype, (len(x), channels, height // 2, width // 2)) if pools else None
    call.set(input=channels_last(x), output=output, pooled=pooled)
    call.run("chain_forward", "chain_scratch")
    return output, pooled, kept


def chain_backward(
    chain: Chain,
    kept: list[Tensor | None],
    shape: torch.Size,
    dtype: torch.dtype,
    grad: Tensor,
    grad_pooled: Tensor | None,
    needs_input: bool,
    needs_bias: list[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """See :class:`~tinytl_hf.lean.backend.Backend`."""
    grads = [
        torch.empty(stage.conv.out_channels, dtype=torch.float32) if needed else None
        for stage, needed in zip(chain.stages, needs_bias, strict=True)
    ]
    call = _call(chain, shape, kept, grads)
    grad_input = empty_maps(grad, dtype, shape) if needs_input else None
    pooled = None if grad_pooled is None else channels_last(grad_pooled)
    call.set(grad_output=channels_last(grad), grad_pooled=pooled, grad_input=grad_input)
    call.arguments.first = 0 if needs_input else needs_bias.index(True)
    call.run("chain_backward", "chain_scratch")
    return grad_input, grads


def upsampling_fits(dtype: torch.dtype) -> bool:
    """Whether the kernels can run an up-sampling of maps of ``dtype``."""
    return dtype in DTYPES


def upsample_add(maps: Tensor, small: Tensor) -> None:
    """See :class:`~tinytl_hf.lean.backend.Backend`."""
    _resample("upsample_add", maps, channels_last(small))


def upsample_backward(grad: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """See :class:`~tinytl_hf.lean.backend.Backend`."""
    small = empty_maps(grad, dtype, shape)
    _resample("upsample_backward", channels_last(grad), small)
    return small


def _resample(kernel: str, maps: Tensor, small: Tensor) -> None:
    arguments = UpsamplingArguments(len(maps), *maps.shape[2:], *small.shape[2:], maps.shape[1])
    arguments.threads = torch.get_num_threads()
    call = Call(arguments, [])
    call.set(maps=maps, small=small)
    call.run(kernel, "upsampling_scratch")
