"""A lite branch on PyTorch's own kernels; statistics over several processes are explicit sums."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tinytl_hf.lean.slices import even_slices, slice_mb_on, without_autocast
from tinytl_hf.lean.stage import convolution_backward, convolve
from tinytl_hf.network.norms import GlobalBatchNorm2d, sum_over_processes

if TYPE_CHECKING:
    from tinytl_hf.lean.lite_branch import Branch

SHARE_OF_CHAIN = 0.4  # of the slices of a chain, as several maps of a slice exist at a time


@without_autocast
def branch_forward(branch: Branch, pooled: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """See :class:`~tinytl_hf.lean.backend.Backend`."""
    slice_mb = slice_mb_on(pooled.device, branch.slice_mb)
    weight1, _, _, weight2, _, _ = branch.parameters
    maps, first = _normalise(branch.norm1, convolve(branch.conv1, pooled, weight1), slice_mb)
    maps, second = _normalise(branch.norm2, F.conv2d(maps.relu_(), weight2), slice_mb)
    return maps, [first.mean, first.inverse, second.mean, second.inverse]


@without_autocast
def branch_backward(
    branch: Branch, pooled: Tensor, statistics: list[Tensor], dtype: torch.dtype, grad: Tensor, needs_input: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """See :class:`~tinytl_hf.lean.backend.Backend`."""
    weight1, scale1, shift1, weight2, scale2, _ = branch.parameters
    mean1, inverse1, mean2, inverse2 = statistics
    maps = convolve(branch.conv1, pooled, weight1)
    values = branch.norm1.values_of_a_channel(maps.shape)
    first, second = _Statistics(mean1, inverse1, values), _Statistics(mean2, inverse2, values)
    inner = _InnerBackward(first, scale1, shift1, weight2, second, scale2)
    grad = grad.contiguous(memory_format=torch.channels_last)
    slices = list(_slices(maps, slice_mb_on(maps.device, branch.slice_mb)))
    if len(slices) == 1 and not branch.norm1.spans_processes:
        grad_maps, sums1, grad_weight2, sums2 = inner.at_once(grad, maps)
    else:
        grad_maps, sums1, grad_weight2, sums2 = inner.in_slices(grad, maps, slices)
    grad_pooled, grad_weight1 = convolution_backward(branch.conv1, grad_maps, pooled, weight1, [needs_input, True])
    of_parameters = [grad_weight1, sums1[1], sums1[0], grad_weight2, sums2[1], sums2[0]]
    return grad_pooled if needs_input else None, of_parameters


@dataclass(frozen=True)
class _Statistics:
    """Mean and inverse standard deviation of a batch over all processes; ``values`` of a channel were counted."""

    mean: Tensor
    inverse: Tensor
    values: int

    @classmethod
    def of(cls, norm: GlobalBatchNorm2d, maps: Tensor, slice_mb: float) -> _Statistics:
        """Those of ``maps``, which the running statistics of ``norm`` take in."""
        values = norm.values_of_a_channel(maps.shape)
        mean = sum_over_processes(maps.sum((0, 2, 3))) / values
        squares = torch.zeros_like(mean)
        for part in _slices(maps, slice_mb):
            squares += (maps[part] - _channels(mean)).square_().sum((0, 2, 3))
        var = sum_over_processes(squares) / values
        norm.take_in(mean, var, values)
        return cls(mean, torch.rsqrt(var + norm.eps), values)

    def normalised_(self, maps: Tensor) -> Tensor:
        """``maps`` with mean 0 and variance 1, in place."""
        return _affine(maps, self.inverse, -self.mean * self.inverse, out=maps)

    def backward_(self, normalised: Tensor, grad: Tensor, weight: Tensor, sums: Tensor) -> Tensor:
        """The gradient before the norm, in the memory of ``normalised``; ``sums`` are of all processes."""
        scale = weight * self.inverse
        grad_bias, grad_weight = -scale / self.values * sums
        return _affine(normalised, grad_weight, grad_bias, out=normalised).addcmul_(grad, _channels(scale))

    def native_backward(self, maps: Tensor, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of a norm's input ``maps``, its bias and its weight, on one process."""
        factors = weight.contiguous()  # PyTorch's kernel for channels-last maps takes it for that
        grad_maps, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, maps, factors, None, None, self.mean, self.inverse, True, 0.0, [True] * 3
        )
        return grad_maps, grad_bias, grad_weight


InnerGradients = tuple[Tensor, Sequence[Tensor], Tensor, Sequence[Tensor]]
"""Of the grouped convolution's output, the first norm's bias and weight, the 1x1 weight, the second norm's."""


@dataclass(frozen=True)
class _InnerBackward:
    """What comes after the grouped convolution, backward: norm, ReLU, 1x1 convolution, norm."""

    first: _Statistics
    scale1: Tensor
    shift1: Tensor
    weight2: Tensor
    second: _Statistics
    scale2: Tensor

    def at_once(self, grad: Tensor, maps: Tensor) -> InnerGradients:
        """For maps that are small and in one process."""
        factor = self.scale1 * self.first.inverse
        activated = _affine(maps, factor, self.shift1 - self.first.mean * factor).relu_()
        outer = F.conv2d(activated, self.weight2)
        grad_outer, *sums2 = self.second.native_backward(outer, grad, self.scale2)
        grad_weight2, flowing = self._before_relu(grad_outer, activated)
        grad_maps, *sums1 = self.first.native_backward(maps, flowing, self.scale1)
        return grad_maps, sums1, grad_weight2, sums2

    def in_slices(self, grad: Tensor, maps: Tensor, slices: Sequence[slice]) -> InnerGradients:
        """In slices and over processes; runs the 1x1 convolution twice rather than keep its output."""
        inner = self.first.normalised_(maps)
        sums2 = torch.zeros_like(torch.stack([self.scale2, self.scale2]))
        for part in slices:
            sums2 += _norm_sums(self._outer(inner[part])[1], grad[part])
        total2 = sum_over_processes(sums2)

        grad_weight2, grad_inner = torch.zeros_like(self.weight2), torch.empty_like(inner)
        sums1 = torch.zeros_like(torch.stack([self.scale1, self.scale1]))
        for part in slices:
            activated, outer = self._outer(inner[part])
            part_of_weight2, flowing = self._before_relu(
                self.second.backward_(outer, grad[part], self.scale2, total2), activated
            )
            grad_weight2 += part_of_weight2
            sums1 += _norm_sums(inner[part], flowing)
            grad_inner[part] = flowing
        grad_maps = self.first.backward_(inner, grad_inner, self.scale1, sum_over_processes(sums1))
        return grad_maps, tuple(sums1), grad_weight2, tuple(sums2)

    def _outer(self, inner: Tensor) -> tuple[Tensor, Tensor]:
        """From normalised maps: the ReLU's output, and the second norm's input, normalised."""
        activated = _affine(inner, self.scale1, self.shift1).relu_()
        return activated, self.second.normalised_(F.conv2d(activated, self.weight2))

    def _before_relu(self, grad_outer: Tensor, activated: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of the 1x1 weight and of the ReLU's input."""
        grad_weight2 = _rows(grad_outer).t().mm(_rows(activated))[:, :, None, None]
        flowing = F.conv2d(grad_outer, self.weight2.transpose(0, 1))
        return grad_weight2, torch.ops.aten.threshold_backward(flowing, activated, 0)


def _normalise(norm: GlobalBatchNorm2d, maps: Tensor, slice_mb: float) -> tuple[Tensor, _Statistics]:
    """The norm's output and the statistics it used; ``maps`` may be written over."""
    values = norm.values_of_a_channel(maps.shape)  # before the running statistics take in those of one value
    if not norm.spans_processes:
        output, mean, inverse = torch.native_batch_norm(
            maps, norm.weight, norm.bias, norm.running_mean, norm.running_var, True, norm.count_batch(), norm.eps
        )
        return output, _Statistics(mean, inverse, values)
    statistics = _Statistics.of(norm, maps, slice_mb)
    return _affine(statistics.normalised_(maps), norm.weight, norm.bias, out=maps), statistics


def _affine(maps: Tensor, scale: Tensor, shift: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.addcmul(_channels(shift), maps, _channels(scale), out=out)


def _norm_sums(normalised: Tensor, grad: Tensor) -> Tensor:
    """Gradients of a norm's bias and weight: ``[2, C]``."""
    return torch.stack([grad.sum((0, 2, 3)), (grad * normalised).sum((0, 2, 3))])


def _channels(vector: Tensor) -> Tensor:
    return vector[:, None, None]


def _rows(maps: Tensor) -> Tensor:
    """``[N, C, H, W]`` as ``[N * H * W, C]``: a view of channels-last memory."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def _slices(maps: Tensor, slice_mb: float) -> Iterator[slice]:
    """Ranges of the batch, so that temporaries exist for a share of ``slice_mb`` of maps at a time."""
    return even_slices(len(maps), maps[0].numel() * maps.element_size(), SHARE_OF_CHAIN * slice_mb)
