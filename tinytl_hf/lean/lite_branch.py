"""The training pass of a lite residual's branch, which keeps its pooled input and four vectors.

All maps of the branch are computed again for the backward pass. Batch statistics are not, so that several processes
exchange them once a pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinytl_hf.config.engine import BackendName
from tinytl_hf.errors import TinyTLError
from tinytl_hf.lean import backend, operators
from tinytl_hf.lean.function import LeanFunction, once_differentiable
from tinytl_hf.lean.slices import compute_dtype, empty_maps
from tinytl_hf.lean.stage import Stage
from tinytl_hf.network.lite_residual import LiteResidual
from tinytl_hf.network.norms import GlobalBatchNorm2d, recompute_contexts


@dataclass(frozen=True)
class Branch:
    """What a lite residual does between pooling and up-sampling: convolution, norm, ReLU, 1x1 convolution, norm.

    Attributes:
        lite: The lite residual.
        slice_mb: The engine's slices, in MB of a map, or None for the back-end's own.
        backend: Who computes it.
        conv1: The grouped convolution.
        norm1: The norm after it: a group norm is never asked for.
        conv2: The 1x1 convolution.
        norm2: The norm after it.
        handle: The name by which operators of a compiled graph find it; a copy has one of its own.
    """

    lite: LiteResidual
    slice_mb: float | None = None
    backend: BackendName = "auto"
    conv1: nn.Conv2d = field(init=False, compare=False, repr=False)
    norm1: GlobalBatchNorm2d = field(init=False, compare=False, repr=False)
    conv2: nn.Conv2d = field(init=False, compare=False, repr=False)
    norm2: GlobalBatchNorm2d = field(init=False, compare=False, repr=False)
    handle: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("conv1", "norm1", "conv2", "norm2"):  # to ask a module for a part of it each time takes long
            object.__setattr__(self, name, getattr(self.lite, name))
        object.__setattr__(self, "handle", operators.new_handle(self))

    def __reduce__(self) -> tuple[type[Branch], tuple[Any, ...]]:
        return Branch, (self.lite, self.slice_mb, self.backend)

    def __call__(self, pooled: Tensor) -> Tensor:
        """``[N, in_channels, h, w]`` to what is to be up-sampled, ``[N, out_channels, h, w]``."""
        dtype = compute_dtype(pooled)
        if not self._is_for_backends(pooled, dtype):
            return self._checkpointed(pooled)
        if torch.compiler.is_compiling():
            return operators.run_branch(self, pooled, dtype)
        return _BranchFunction.apply(pooled, self, None, *self.parameters)

    def with_statistics(self, pooled: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What a call gives, and the batch's statistics for :meth:`unread`: none where no back-end runs it."""
        dtype = compute_dtype(pooled)
        if torch.compiler.is_compiling() or not self._is_for_backends(pooled, dtype):
            return self(pooled), []
        return self.run(pooled, dtype)

    def unread(self, pooled: Tensor, statistics: list[Tensor]) -> Tensor:
        """Maps of the output's shape that hold anything, for a second pass of which gradients alone are wanted.

        Without statistics stock layers run, and keep what they need: they go back at once.
        """
        if not statistics:
            return self.lite.before_upsampling(pooled)
        return _BranchFunction.apply(pooled, self, statistics, *self.parameters)

    def run(self, pooled: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """On its back-end, without gradients: the output, and the batch's statistics."""
        return backend.named(backend.of_branch(self, pooled.device, dtype)).branch_forward(self, pooled, dtype)

    def _is_for_backends(self, pooled: Tensor, dtype: torch.dtype) -> bool:
        """Whether a back-end runs it: no group norms, no empty batch and, on the eager one, no mixed precision."""
        if pooled.shape[0] == 0 or not self._uses_batch_statistics():
            return False
        of_one_type = self.conv1.weight.dtype == pooled.dtype == dtype
        return of_one_type or self._backend(pooled, dtype) != "eager"

    def _checkpointed(self, pooled: Tensor) -> Tensor:
        """The stock layers, computed again for the backward pass."""
        # A compiled graph takes no contexts and needs none: it repeats no change of a buffer.
        contexts: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": recompute_contexts}
        held = tuple(self.lite.parameters())

        def run(pooled: Tensor) -> Tensor:
            if not torch.compiler.is_compiling():
                operators.check_own(held, tuple(self.lite.parameters()))
            return self.lite.before_upsampling(pooled)

        return checkpoint(run, pooled, use_reentrant=False, preserve_rng_state=False, **contexts)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Weights of the first convolution, its norm's weight and bias, and the same of the second."""
        first = (self.conv1.weight, self.norm1.weight, self.norm1.bias)
        return (*first, self.conv2.weight, self.norm2.weight, self.norm2.bias)

    def output_size(self, shape: torch.Size) -> tuple[int, int, int]:
        """Channels, height and width of its maps for an input of ``shape``.

        Raises:
            TinyTLError: That has other channels than the branch. Kernels would read beyond them.
        """
        if shape[1] != self.conv1.in_channels:
            raise TinyTLError(
                f"input of shape {list(shape)}: the lite residual takes maps of {self.conv1.in_channels} channels"
            )
        return (self.conv2.out_channels, *Stage(self.conv1).output_size(*shape[2:]))

    def _uses_batch_statistics(self) -> bool:
        return all(isinstance(norm, GlobalBatchNorm2d) and norm.training for norm in (self.norm1, self.norm2))

    def _backend(self, pooled: Tensor, dtype: torch.dtype) -> BackendName:
        if torch.compiler.is_compiling():
            return operators.branch_backend(self.handle, str(pooled.device), dtype)
        return backend.of_branch(self, pooled.device, dtype)


class _BranchFunction(LeanFunction):
    """The branch's output, or with statistics that are known, maps that hold anything; keeps its input and these."""

    @staticmethod
    def forward(
        ctx: Any, pooled: Tensor, branch: Branch, statistics: list[Tensor] | None, *parameters: Tensor
    ) -> Tensor:
        dtype = compute_dtype(pooled)
        ctx.branch, ctx.compute_dtype, ctx.parameters = branch, dtype, parameters
        ctx.versions = operators.versions_of(parameters)
        ctx.backend = backend.named(backend.of_branch(branch, pooled.device, dtype))
        if statistics is None:
            output, statistics = ctx.backend.branch_forward(branch, pooled, dtype)
        else:
            output = empty_maps(pooled, dtype, (len(pooled), *branch.output_size(pooled.shape)))
        ctx.save_for_backward(pooled, *statistics)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pooled, *statistics = ctx.saved_tensors
        operators.check_own(ctx.parameters, ctx.branch.parameters, ctx.versions)
        grad_pooled, of_parameters = ctx.backend.branch_backward(
            ctx.branch, pooled, statistics, ctx.compute_dtype, grad, ctx.needs_input_grad[0]
        )
        grads = [_laid_as(p, found.to(p.dtype)) for found, p in zip(of_parameters, ctx.parameters, strict=True)]
        return None if grad_pooled is None else grad_pooled.to(pooled.dtype), None, None, *grads


def _laid_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with the strides of its parameter where a dimension has one entry, so that they mean nothing.

    ``DistributedDataParallel`` compares them all the same, and warns of any other.
    """
    dimensions = zip(gradient.shape, gradient.stride(), parameter.stride(), strict=True)
    return gradient.as_strided(gradient.shape, [theirs if size == 1 else own for size, own, theirs in dimensions])
