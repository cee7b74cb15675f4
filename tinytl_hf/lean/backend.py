"""Who computes a chain, a lite branch and an up-sampling: one interface, and the choice of the back-end.

``eager`` is PyTorch's own kernels, on any device and of any type: the reference. ``native`` is compiled for CPUs,
``triton`` for CUDA; what they cannot run, eager does.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from tinytl_hf.config.engine import BackendName, Engine
from tinytl_hf.errors import TinyTLError
from tinytl_hf.lean.native_library import HOW_TO_BUILD, instruction_sets

if TYPE_CHECKING:
    from tinytl_hf.lean.chain import Chain
    from tinytl_hf.lean.lite_branch import Branch

logger = logging.getLogger(__name__)

# Said after the name of the instruction set that is used: why it is not a faster one.
SLOWER_BECAUSE = {
    "AVX-512 BF16": "",
    "AVX-512": ", as this processor or its compiler has no AVX-512 BF16, which only bf16 gains by",
}
FASTEST_ON: dict[str, BackendName] = {"cpu": "native", "cuda": "triton"}
left_to_eager: list[str] = []  # messages so far about parts that the chosen back-end does not run
LEAST_CAPABILITY = (8, 0)  # of the GPUs that the Triton kernels are compiled for in the tests


class Backend(Protocol):
    """What a back-end's module offers. Maps are ``[N, C, H, W]``, and channels-last where they are returned."""

    def fits(self, chain: Chain, dtype: torch.dtype, shape: torch.Size) -> str | None:
        """Why it cannot run a chain with maps of ``dtype`` and an input of ``shape``; None if it can."""

    def chain_forward(
        self, chain: Chain, x: Tensor, dtype: torch.dtype, keeps: bool, pools: bool
    ) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
        """A chain's output and, if ``pools``, the means of 2x2 px of its block's input, both of ``dtype``.

        Returns:
            The two, and what the backward pass needs, if ``keeps``: that of ``chain.empty_kept``.
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

    def branch_fits(self, branch: Branch, dtype: torch.dtype) -> str | None:
        """Why it cannot run a lite branch with maps of ``dtype``; None if it can."""

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

    def upsampling_fits(self, dtype: torch.dtype) -> bool:
        """Whether it can run an up-sampling of channels-last maps of ``dtype``."""

    def upsample_add(self, maps: Tensor, small: Tensor) -> None:
        """Add ``small``, bilinearly resized, to ``maps`` in place."""

    def upsample_backward(self, grad: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The gradient of ``small``, which had ``shape`` and ``dtype``."""


@functools.cache  # as an import takes long, even of what is there
def named(name: BackendName) -> Backend:
    """The module of a back-end."""
    if name == "native":
        from tinytl_hf.lean import native_backend

        return native_backend
    if name == "triton":
        from tinytl_hf.lean import triton_backend

        return triton_backend
    from tinytl_hf.lean import eager_backend

    return eager_backend


def chosen(name: BackendName, device: torch.device) -> BackendName:
    """The back-end that ``name`` stands for on a device: ``auto`` is the fastest that is there.

    Raises:
        TinyTLError: It is named and cannot run there.
    """
    if name == "auto":
        fastest = FASTEST_ON.get(device.type, "eager")
        return fastest if why_not(fastest, device) is None else "eager"
    check(name, device)
    return name


def has_bf16(device: torch.device) -> bool:
    """Whether the fastest back-end has products of bf16 values there: elsewhere bf16 takes no less time."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and "AVX-512 BF16" in instruction_sets()


def check(name: BackendName, device: torch.device) -> None:
    """Raise if a back-end that is named cannot run on a device.

    Raises:
        TinyTLError: Why, and what to do.
    """
    if name != "auto" and (reason := why_not(name, device)) is not None:
        raise TinyTLError(f"memory.backend={name}: {reason}; or use auto")


@functools.cache
def why_not(name: BackendName, device: torch.device) -> str | None:
    """Why a back-end does not run on a device; None if it does.

    Triton runs on NVIDIA GPUs from compute capability 8.0 on, and on a CPU by its interpreter, which is for tests.
    """
    if name == "native":
        if device.type != "cpu":
            return f"runs on CPUs, not on {device.type}"
        return None if instruction_sets() else HOW_TO_BUILD
    if name == "triton":
        interprets = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        if not interprets and (device.type != "cuda" or torch.version.hip is not None):
            return f"runs on NVIDIA GPUs, not on {'AMD' if device.type == 'cuda' else device.type}"
        if find_spec("triton") is None:
            return "needs the package triton: pip install triton"
        if not interprets and (capability := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
            least, found = (".".join(map(str, each)) for each in (LEAST_CAPABILITY, capability))
            return f"needs a GPU of compute capability {least} or more, and this one has {found}"
    return None


def of_chain(chain: Chain, device: torch.device, dtype: torch.dtype, shape: torch.Size) -> BackendName:
    """Who runs a chain with maps of ``dtype`` and an input of ``shape``; eager where it has no images."""
    if shape[0] == 0:
        return "eager"
    check_device(device, (tensor for stage in chain.stages for tensor in stage.tensors))
    name = chosen(chain.backend, device)
    return _or_eager(name, named(name).fits(chain, dtype, shape))


def of_branch(branch: Branch, device: torch.device, dtype: torch.dtype) -> BackendName:
    """Who runs a lite branch with maps of ``dtype``."""
    check_device(device, branch.parameters)
    name = chosen(branch.backend, device)
    return _or_eager(name, named(name).branch_fits(branch, dtype))


def check_device(device: torch.device, parameters: Iterable[Tensor | None]) -> None:
    """Raise unless parameters are where the maps are: kernels take their addresses, and would read what lies there.

    Raises:
        TinyTLError: One is elsewhere, with the fix.
    """
    for tensor in parameters:
        if tensor is not None and tensor.device != device:
            raise TinyTLError(
                f"images are on {device} and parameters of the model on {tensor.device}: move them to one device with "
                ".to(); several GPUs take a process each (accelerate launch), not nn.DataParallel, and weights that "
                "are offloaded take model.eval() or lean=False"
            )


def _or_eager(name: BackendName, reason: str | None) -> BackendName:
    if reason is None:
        return name
    _say_once(name, reason)
    return "eager"


@functools.cache
def _say_once(name: BackendName, reason: str) -> None:
    left_to_eager.append(f"the {name} back-end does not run {reason}: such parts run on eager")
    logger.info("%s", left_to_eager[-1])


def of_upsampling(name: BackendName, maps: Tensor, small: Tensor) -> BackendName:
    """Who adds ``small`` to ``maps``: all but eager need channels-last maps of one type, and at least one image."""
    name = chosen(name, maps.device)
    ordered = maps.shape[0] > 0 and maps.is_contiguous(memory_format=torch.channels_last) and maps.dtype == small.dtype
    return name if ordered and named(name).upsampling_fits(maps.dtype) else "eager"


def describe(engine: Engine, device: torch.device) -> str:
    """How training passes run, who computes them and, if it is not the fastest back-end, why."""
    if not engine.lean:
        return "stock"
    name = chosen(engine.backend, device)
    if name == "native":
        sets = list(instruction_sets())
        return f"lean, native {sets[0]}{SLOWER_BECAUSE.get(sets[0], ', as this processor has no AVX-512')}"
    if name == "eager" and engine.backend == "auto" and (fastest := FASTEST_ON.get(device.type)):
        return f"lean, eager ({fastest} {why_not(fastest, device)})"
    return f"lean, {name}"
