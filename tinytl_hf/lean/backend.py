"""Who computes a chain, a lite branch and an up-sampling: one interface, and the choice of the back-end.

``eager`` is PyTorch's own kernels, on any device and of any type: the reference. ``native`` is compiled for CPUs,
``triton`` for CUDA; what they cannot run, eager does.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from tinytl_hf.config.engine import BackendName, Engine
from tinytl_hf.lean.native_library import HOW_TO_BUILD, instruction_sets

if TYPE_CHECKING:
    from tinytl_hf.lean.chain import Chain
    from tinytl_hf.lean.lite_branch import Branch

FASTEST = "AVX-512"  # of the instruction sets that there are kernels for
LOW_TYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the back-ends other than eager


class Backend(Protocol):
    """What a back-end's module offers. Maps are ``[N, C, H, W]``, and channels-last where they are returned."""

    def fits(self, chain: Chain, dtype: torch.dtype) -> str | None:
        """Why it cannot run a chain with maps of ``dtype``; None if it can."""

    def chain_forward(
        self, chain: Chain, x: Tensor, dtype: torch.dtype, keeps: bool, pools: bool
    ) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
        """A chain's output and, if ``pools``, the means of 2x2 px of its block's input, both of ``dtype``.

        Returns:
            The two, and what the backward pass needs, if ``keeps``: masks, in an order of the back-end's own.
        """

    def chain_backward(
        self,
        chain: Chain,
        kept: list[Tensor | None],
        shape: torch.Size,
        dtype: torch.dtype,
        grad: Tensor,
        grad_pooled: Tensor | None,
        needs_input: bool,
        needs_bias: list[bool],
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradients of a chain's input, which had ``shape``, and of each stage's bias, where they are needed."""

    def branch_fits(self, branch: Branch, dtype: torch.dtype) -> bool:
        """Whether it can run a lite branch with maps of ``dtype``."""

    def branch_forward(self, branch: Branch, pooled: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """A lite branch's output before the up-sampling, and the statistics of its norms, which follow the batch.

        Returns:
            The output; mean and inverse standard deviation of the first norm, and of the second.
        """

    def branch_backward(
        self,
        branch: Branch,
        pooled: Tensor,
        statistics: list[Tensor],
        dtype: torch.dtype,
        grad: Tensor,
        needs_input: bool,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The gradients of a lite branch's input, where it is needed, and of its parameters in their order."""

    def upsample_add(self, maps: Tensor, small: Tensor) -> None:
        """Add ``small``, bilinearly resized, to ``maps`` in place."""

    def upsample_backward(self, grad: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The gradient of ``small``, which had ``shape`` and ``dtype``."""


def named(name: BackendName) -> Backend:
    """The module of a back-end."""
    if name == "native":
        from tinytl_hf.lean import native_backend

        return native_backend
    from tinytl_hf.lean import eager_backend

    return eager_backend


def chosen(name: BackendName, device: torch.device) -> BackendName:
    """The back-end that ``name`` stands for on a device: ``auto`` is the fastest that is there."""
    if name != "auto":
        return name
    if device.type == "cpu" and instruction_sets():
        return "native"
    return "triton" if device.type == "cuda" and find_spec("triton") is not None else "eager"


def of_chain(chain: Chain, device: torch.device, dtype: torch.dtype) -> BackendName:
    """Who runs a chain with maps of ``dtype``."""
    name = chosen(chain.backend, device)
    return name if named(name).fits(chain, dtype) is None else "eager"


def of_branch(branch: Branch, device: torch.device, dtype: torch.dtype) -> BackendName:
    """Who runs a lite branch with maps of ``dtype``."""
    name = chosen(branch.backend, device)
    return name if named(name).branch_fits(branch, dtype) else "eager"


def of_upsampling(name: BackendName, maps: Tensor, small: Tensor) -> BackendName:
    """Who adds ``small`` to ``maps``: the others want channels-last maps of one type."""
    name = chosen(name, maps.device)
    ordered = maps.is_contiguous(memory_format=torch.channels_last) and maps.dtype == small.dtype
    return name if ordered and maps.dtype in LOW_TYPES else "eager"


def describe(engine: Engine, device: torch.device) -> str:
    """How training passes run, who computes them and, if it is not the fastest back-end, why."""
    if not engine.lean:
        return "stock"
    name = chosen(engine.backend, device)
    if name == "native":
        sets = list(instruction_sets())
        missing = "" if sets[0] == FASTEST else f", as this processor has no {FASTEST}"
        return f"lean, native {sets[0]}{missing}"
    if device.type == "cpu" and engine.backend == "auto":
        return f"lean, eager (native {HOW_TO_BUILD})"
    return f"lean, {name}"
