"""A lite branch on the native back-end: one call of a C function each way (``native/branch.h``)."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinytl_hf.lean.native_library import (
    LARGEST_KERNEL,
    BranchArguments,
    Call,
    NormArguments,
    Reduce,
    channels_last,
    unfit_tensors,
)
from tinytl_hf.lean.slices import empty_maps
from tinytl_hf.network.norms import GlobalBatchNorm2d, sum_over_processes

if TYPE_CHECKING:
    from tinytl_hf.lean.lite_branch import Branch

MOST_WEIGHTS = 1 << 20  # of the grouped convolution, as the kernels take a second copy of them, in another order


def branch_fits(branch: Branch, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run a branch with maps of ``dtype``; None if they can."""
    parameters = branch.parameters
    if branch.conv1.kernel_size[0] > LARGEST_KERNEL:
        return f"lite residuals with a kernel of more than {LARGEST_KERNEL} px"
    if parameters[0].numel() > MOST_WEIGHTS:
        return f"lite residuals with more than {MOST_WEIGHTS:,} weights in the grouped convolution"
    statistics = [tensor for norm in (branch.norm1, branch.norm2) for tensor in (norm.running_mean, norm.running_var)]
    return unfit_tensors(dtype, [*parameters, *statistics])


def branch_forward(branch: Branch, pooled: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """See :class:`~tinytl_hf.lean.backend.Backend`."""
    middle, channels = branch.conv1.out_channels, branch.conv2.out_channels
    statistics = [torch.empty(size, dtype=torch.float32) for size in (middle, middle, channels, channels)]
    call = _Call(branch, branch.parameters, pooled, statistics)
    call.arguments.norm1.rate = branch.norm1.count_batch()
    call.arguments.norm2.rate = branch.norm2.count_batch()
    output = empty_maps(pooled, dtype, (len(pooled), channels, *call.size))
    call.set(output=output)
    call.run("branch_forward", "branch_scratch")
    return output, statistics


def branch_backward(
    branch: Branch, pooled: Tensor, statistics: list[Tensor], dtype: torch.dtype, grad: Tensor, needs_input: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """See :class:`~tinytl_hf.lean.backend.Backend`."""
    parameters = branch.parameters
    call = _Call(branch, parameters, pooled, statistics)
    grad_input = empty_maps(pooled, pooled.dtype, pooled.shape) if needs_input else None
    grads = [torch.empty(parameter.shape, dtype=torch.float32) for parameter in parameters]
    grads[0] = torch.empty_like(parameters[0], memory_format=torch.channels_last)
    call.set(grad_output=channels_last(grad), grad_input=grad_input)
    arguments = call.arguments
    arguments.grad_weight1, arguments.grad_weight2 = grads[0].data_ptr(), grads[3].data_ptr()
    arguments.norm1.grad_gamma, arguments.norm1.grad_beta = grads[1].data_ptr(), grads[2].data_ptr()
    arguments.norm2.grad_gamma, arguments.norm2.grad_beta = grads[4].data_ptr(), grads[5].data_ptr()
    call.run("branch_backward", "branch_scratch")
    return grad_input, grads


class _Call(Call):
    """The arguments of a branch's kernel, which may call back to add up over processes.

    Attributes:
        size: Height and width of the branch's maps.
    """

    def __init__(
        self, branch: Branch, parameters: tuple[Tensor, ...], pooled: Tensor, statistics: list[Tensor]
    ) -> None:
        conv = branch.conv1
        weight1, gamma1, beta1, weight2, gamma2, beta2 = parameters
        kernel, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
        images, channels, height, width = pooled.shape
        self.size = branch.output_size(pooled.shape)[1:]
        weights = [weight1.detach(), weight2.detach().contiguous()]
        if weights[0].stride(2) != weights[0].stride(3) * kernel:  # taps that do not lie one after the other
            weights[0] = weights[0].contiguous()
        arguments = BranchArguments(
            *(images, height, width, channels, conv.out_channels, branch.conv2.out_channels),
            *(kernel, stride, padding, conv.groups),
        )
        super().__init__(arguments, [*weights, *statistics])
        self.failed: Exception | None = None
        arguments.weight1, arguments.weight2 = (weight.data_ptr() for weight in weights)
        strides = weights[0].stride()
        arguments.weight1_strides[:] = strides[0], strides[1], strides[3]
        mean1, inverse1, mean2, inverse2 = statistics
        arguments.norm1 = self._norm(branch.norm1, gamma1, beta1, mean1, inverse1)
        arguments.norm2 = self._norm(branch.norm2, gamma2, beta2, mean2, inverse2)
        arguments.values = branch.norm1.values_of_a_channel((images, 1, *self.size))
        arguments.threads = torch.get_num_threads()
        if branch.norm1.spans_processes:
            arguments.reduce = Reduce(self._reduce)
        self.set(input=channels_last(pooled))

    def _norm(
        self, norm: GlobalBatchNorm2d, gamma: Tensor, beta: Tensor, mean: Tensor, inverse: Tensor
    ) -> NormArguments:
        vectors = [gamma, beta, norm.running_mean, norm.running_var]
        self.alive += vectors
        pointers = [None if vector is None else vector.data_ptr() for vector in vectors]
        return NormArguments(*pointers, 0.0, norm.eps, mean.data_ptr(), inverse.data_ptr())

    def run(self, kernel: str, scratch_of: str) -> None:
        """As any call; raises what failed while it ran."""
        super().run(kernel, scratch_of)
        if self.failed is not None:
            raise self.failed

    def _reduce(self, sums: Any, count: int) -> None:
        """Add up over the processes, in place; called from C, through which no exception passes."""
        buffer = ctypes.cast(sums, ctypes.POINTER(ctypes.c_double * count)).contents
        values = torch.frombuffer(buffer, dtype=torch.float64)
        try:
            values.copy_(sum_over_processes(values))
        except Exception as error:  # whatever it is, run() raises it
            self.failed = error
