"""The training pass of a lite residual's branch, which keeps its pooled input and four vectors.

All maps of the branch are computed again for the backward pass. Batch statistics are not, so that several processes
exchange them once a pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from tinytl_hf.config.engine import BackendName
from tinytl_hf.lean import backend
from tinytl_hf.lean.slices import compute_dtype
from tinytl_hf.network.lite_residual import LiteResidual
from tinytl_hf.network.norms import GlobalBatchNorm2d, recompute_contexts


@dataclass(frozen=True)
class Branch:
    """Grouped convolution, norm, ReLU, 1x1 convolution, norm, on batch statistics.

    Attributes:
        conv1: The grouped convolution.
        norm1: The norm after it.
        conv2: The 1x1 convolution.
        norm2: The norm after it.
        slice_mb: The engine's slices, in MB of a map, or None for the back-end's own.
        backend: Who computes it.
    """

    conv1: nn.Conv2d
    norm1: GlobalBatchNorm2d
    conv2: nn.Conv2d
    norm2: GlobalBatchNorm2d
    slice_mb: float | None = None
    backend: BackendName = "auto"

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Weights of the first convolution, its norm's weight and bias, and the same of the second."""
        first = (self.conv1.weight, self.norm1.weight, self.norm1.bias)
        return (*first, self.conv2.weight, self.norm2.weight, self.norm2.bias)


def branch(
    lite: LiteResidual, pooled: Tensor, slice_mb: float | None = None, backend_name: BackendName = "auto"
) -> Tensor:
    """``[N, in_channels, h, w]`` to what is to be up-sampled, ``[N, out_channels, h, w]``.

    Args:
        lite: The lite residual.
        pooled: Its pooled input.
        slice_mb: The engine's slices, in MB of a map.
        backend_name: Who computes it.
    """
    norms = [norm for norm in (lite.norm1, lite.norm2) if isinstance(norm, GlobalBatchNorm2d) and norm.training]
    dtype = compute_dtype(pooled)
    if len(norms) == 2:
        runs = Branch(lite.conv1, norms[0], lite.conv2, norms[1], slice_mb, backend_name)
        if backend.of_branch(runs, pooled.device, dtype) != "eager" or dtype == pooled.dtype:
            return _BranchFunction.apply(pooled, runs, *runs.parameters)
    # Group norms, and mixed precision on the eager back-end: stock layers, computed again for the backward pass.
    return checkpoint(
        lite.before_upsampling,
        pooled,
        use_reentrant=False,
        context_fn=recompute_contexts,
        preserve_rng_state=False,
    )


class _BranchFunction(Function):
    """The branch's output; keeps its input and the statistics."""

    @staticmethod
    def forward(ctx: Any, pooled: Tensor, branch: Branch, *parameters: Tensor) -> Tensor:
        dtype = compute_dtype(pooled)
        ctx.branch, ctx.compute_dtype = branch, dtype
        ctx.backend = backend.named(backend.of_branch(branch, pooled.device, dtype))
        with torch.autocast(pooled.device.type, enabled=False):
            output, statistics = ctx.backend.branch_forward(branch, pooled, dtype)
        ctx.save_for_backward(pooled, *statistics)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pooled, *statistics = ctx.saved_tensors
        with torch.autocast(pooled.device.type, enabled=False):
            grad_pooled, of_parameters = ctx.backend.branch_backward(
                ctx.branch, pooled, statistics, ctx.compute_dtype, grad, ctx.needs_input_grad[0]
            )
        grads = [found.to(p.dtype) for found, p in zip(of_parameters, ctx.branch.parameters, strict=True)]
        return None if grad_pooled is None else grad_pooled.to(pooled.dtype), None, *grads
