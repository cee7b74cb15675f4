"""The eager back-end: PyTorch's own kernels, on any device and of any type; the reference for the others.

Norms are folded into convolutions on the fly. The batch is worked through in slices, forward and backward, so that
the wide maps inside an inverted residual exist for one slice at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tinytl_hf.lean.eager_branch import branch_backward as branch_backward
from tinytl_hf.lean.eager_branch import branch_forward as branch_forward
from tinytl_hf.lean.slices import Gathered, without_autocast
from tinytl_hf.lean.stage import convolve

if TYPE_CHECKING:
    from tinytl_hf.lean.chain import Chain
    from tinytl_hf.lean.lite_branch import Branch


def fits(chain: Chain, dtype: torch.dtype, shape: torch.Size) -> str | None:
    """Any chain."""
    return None


def branch_fits(branch: Branch, dtype: torch.dtype) -> str | None:
    """Any branch, if its parameters and its input are of ``dtype``; else it is left to stock layers."""
    return None


@without_autocast
def chain_forward(
    chain: Chain, x: Tensor, dtype: torch.dtype, keeps: bool, pools: bool
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """See :class:`~tinytl_hf.lean.backend.Backend`; norms are folded once for all slices."""
    folded = [(stage.folded_weight(dtype), stage.folded_bias(dtype)) for stage in chain.stages]
    kept = chain.empty_kept(x, dtype, keeps)
    outputs, pooled = Gathered(x.shape[0]), Gathered(x.shape[0])
    for part in chain.slices_of(x.shape, dtype, x.device):
        maps = inputs = x[part].to(dtype)
        for i, (stage, (weight, bias)) in enumerate(zip(chain.stages, folded, strict=True)):
            if i == chain.branch:
                inputs = maps
            mask = kept[i]
            maps = stage.activate(convolve(stage.conv, maps, weight, bias), None if mask is None else mask[part])
        outputs.put(part, maps.add_(inputs) if chain.residual else maps)
        if pools:
            pooled.put(part, F.avg_pool2d(inputs, 2).contiguous(memory_format=torch.channels_last))
    assert outputs.whole is not None
    return outputs.whole, pooled.whole, kept


@without_autocast
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
    run = _BackwardRun(chain, shape, dtype, needs_input, needs_bias)
    grad_input = Gathered(shape[0])
    for part in chain.slices_of(shape, dtype, grad.device):
        outer = grad[part].contiguous(memory_format=torch.channels_last)
        pooled = None if grad_pooled is None else grad_pooled[part]
        flowing = run.slice_backward(outer, pooled, [None if mask is None else mask[part] for mask in kept])
        if needs_input:
            grad_input.put(part, flowing)
    return grad_input.whole, run.bias_grads


def upsampling_fits(dtype: torch.dtype) -> bool:
    """Any up-sampling."""
    return True


def upsample_add(maps: Tensor, small: Tensor) -> None:
    """See :class:`~tinytl_hf.lean.backend.Backend`; on a CPU, up-sampled maps exist for one image at a time."""
    images = 1 if maps.device.type == "cpu" else len(maps)
    for part, source in zip(maps.split(images), small.split(images), strict=True):
        part.add_(F.interpolate(source, size=maps.shape[-2:], mode="bilinear", align_corners=False))


def upsample_backward(grad: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """See :class:`~tinytl_hf.lean.backend.Backend`."""
    size = list(grad.shape[-2:])
    return torch.ops.aten.upsample_bilinear2d_backward(grad.to(dtype), size, list(shape), False)


class _BackwardRun:
    """One backward pass through a chain, slice by slice.

    Attributes:
        bias_grads: What the slices so far add up to.
    """

    def __init__(
        self, chain: Chain, shape: torch.Size, dtype: torch.dtype, needs_input: bool, needs_bias: list[bool]
    ) -> None:
        self.chain = chain
        self.needs_bias = needs_bias
        self.sizes = chain.map_sizes(shape)
        self.weights = [stage.folded_weight(dtype) for stage in chain.stages]
        self.bias_grads: list[Tensor | None] = [None] * len(chain.stages)
        self.needs_input = needs_input
        self.first = 0 if needs_input else needs_bias.index(True)

    def slice_backward(self, outer: Tensor, grad_pooled: Tensor | None, kept: list[Tensor | None]) -> Tensor:
        """The gradient of a slice's input; ``outer`` is the one of its output."""
        flowing = outer
        for i in reversed(range(self.first, len(kept))):
            stage = self.chain.stages[i]
            flowing = stage.activate_backward(flowing, kept[i], in_place=flowing is not outer)
            if self.needs_bias[i]:
                self._add_bias_grad(i, flowing)
            if i == self.first and not self.needs_input:
                break
            flowing = stage.convolve_backward(flowing, self.weights[i], (len(flowing), *self.sizes[i]))
            if i == self.chain.branch:
                if self.chain.residual:
                    flowing.add_(outer)
                if grad_pooled is not None:
                    _add_spread(flowing, grad_pooled)
        return flowing

    def _add_bias_grad(self, i: int, grad: Tensor) -> None:
        total = grad.sum((0, 2, 3), dtype=torch.promote_types(grad.dtype, torch.float32))
        before = self.bias_grads[i]
        self.bias_grads[i] = total if before is None else before + total


def _add_spread(maps: Tensor, grad_pooled: Tensor) -> None:
    """Add to ``maps`` the gradient of their 2x2 means."""
    quarter = grad_pooled.to(maps.dtype) / 4
    height, width = 2 * quarter.shape[2], 2 * quarter.shape[3]
    for top in (0, 1):
        for left in (0, 1):
            maps[:, :, top:height:2, left:width:2].add_(quarter)
