"""A chain of frozen convolutions, each with its norm and activation, as one autograd function.

Back-ends work through the batch a few images or rows at a time, forward and backward, so that the wide maps inside an
inverted residual never exist as a whole, and masks of one bit a value are all that is kept (TinyTL, section 3.1,
applied to whole blocks). Chains with smooth activations keep maps; they are for slices that are computed again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tinytl_hf.config.engine import BackendName
from tinytl_hf.errors import TinyTLError
from tinytl_hf.lean import backend, operators
from tinytl_hf.lean.function import LeanFunction, check_runs, once_differentiable
from tinytl_hf.lean.slices import compute_dtype, empty_maps, even_slices, slice_mb_on
from tinytl_hf.lean.stage import SMOOTH, Stage


@dataclass(frozen=True)
class Chain:
    """Stages that run one after the other.

    Attributes:
        stages: The convolutions.
        residual: Whether the input of stage ``branch`` is added at the end.
        slice_mb: About how much of the widest map exists at a time, in MB, or None for the back-end's own.
        branch: The stage whose input is the block's; what comes before it is a stem.
        backend: Who computes it.
        facts: What a back-end works out once.
        handle: The name by which operators of a compiled graph find it; a copy has one of its own.
    """

    stages: tuple[Stage, ...]
    residual: bool = False
    slice_mb: float | None = None
    branch: int = 0
    backend: BackendName = "auto"
    facts: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    handle: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "handle", operators.new_handle(self))

    def __reduce__(self) -> tuple[type[Chain], tuple[Any, ...]]:
        """A copy works its facts out for itself, as those can hold addresses, and has a handle of its own."""
        return Chain, (self.stages, self.residual, self.slice_mb, self.branch, self.backend)

    def __call__(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the last stage's output, keeping only what the gradients need."""
        return self._run(x, False)[0]

    def unread(self, x: Tensor) -> Tensor:
        """Maps of the output's shape that hold anything, whose gradient goes back as the output's does."""
        pools, unread, keeps = False, True, False
        biases = (stage.bias for stage in self.stages)
        return _ChainFunction.apply(x, self, self.read_backward, pools, unread, keeps, *biases)[0]

    @property
    def read_backward(self) -> list[Tensor]:
        """The tensors of its layers that its gradients depend on."""
        return [tensor for stage in self.stages for tensor in stage.read_backward]

    @property
    def keeps_maps(self) -> bool:
        """Whether it keeps whole maps, not only bits: then it is for a slice that is computed again."""
        return any(stage.activation in SMOOTH for stage in self.stages)

    def with_pooled_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the mean of 2x2 px of the block's input, whose gradient then needs no tensor of its own."""
        output, pooled = self._run(x, True)
        assert pooled is not None
        return output, pooled

    def block_input_size(self, shape: torch.Size) -> tuple[int, int]:
        """Height and width of the block's input for a chain's input of ``shape``."""
        return self.map_sizes(shape)[self.branch][1:]

    def slices_of(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Iterator[slice]:
        """Ranges of a batch of ``shape`` whose widest map, of ``dtype``, takes about ``slice_mb``."""
        if len(self.stages) == 1:  # nothing between its input and its output
            yield slice(0, shape[0])
            return
        widest = max(map(math.prod, self.map_sizes(shape)[1:]))
        yield from even_slices(shape[0], widest * dtype.itemsize, slice_mb_on(device, self.slice_mb))

    def check(self, shape: torch.Size) -> None:
        """Raise if an input of ``shape`` is not for the first stage: kernels would read what lies beyond it.

        Raises:
            TinyTLError: It has other channels, or is no batch of maps.
        """
        channels = self.stages[0].conv.in_channels
        if len(shape) != 4 or shape[1] != channels:
            raise TinyTLError(
                f"input of shape {list(shape)}: its convolution takes [images, {channels}, height, width]; "
                "model.preprocess makes RGB of images of any kind"
            )

    def map_sizes(self, shape: torch.Size) -> list[tuple[int, int, int]]:
        """Channels, height and width of the input and of each stage's output."""
        check_runs(shape)
        if torch.compiler.is_compiling() or any(isinstance(side, torch.SymInt) for side in shape):
            return self._map_sizes(shape)  # a graph is compiled: what is worked out once is not to be part of it
        if shape[1:] not in self.facts:
            self.facts[shape[1:]] = self._map_sizes(shape)
        return self.facts[shape[1:]]

    def _map_sizes(self, shape: torch.Size) -> list[tuple[int, int, int]]:
        self.check(shape)
        sizes = [(self.stages[0].conv.in_channels, shape[2], shape[3])]
        for stage in self.stages:
            height, width = stage.output_size(*sizes[-1][1:])
            if height < 1 or width < 1:  # kernels would read what lies beyond the maps
                raise TinyTLError(
                    f"images are too small for the network: a convolution of {list(stage.conv.kernel_size)} px gets "
                    f"maps of {list(sizes[-1][1:])} px; use larger ones"
                )
            sizes.append((stage.conv.out_channels, height, width))
        return sizes

    def empty_kept(self, x: Tensor, dtype: torch.dtype, keeps: bool) -> list[Tensor | None]:
        """Room, if ``keeps``, for what the gradient of each stage's activation needs, where there is one.

        For ReLU and ReLU6 one bit a value, whether it is inside its bounds, in the order of channels-last maps; each
        image's begin with a byte: ``uint8 [N, bytes]``. For smooth ones the maps before them, of ``dtype`` or fp32.
        """
        if not keeps:
            return [None] * len(self.stages)
        sizes = self.map_sizes(x.shape)[1:]
        return [_room_for(stage, x, dtype, size) for stage, size in zip(self.stages, sizes, strict=True)]

    def _forget_other_geometry(self) -> None:
        """Work out anew what was worked out for other strides or paddings: kernels would write beyond their maps."""
        geometry = [(stage.conv.stride, stage.conv.padding, stage.conv.dilation) for stage in self.stages]
        if self.facts.get("geometry") != geometry:
            self.facts.clear()
            self.facts["geometry"] = geometry

    def _run(self, x: Tensor, pools: bool) -> tuple[Tensor, Tensor | None]:
        check_runs(x)
        read = self.read_backward
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in read):
            raise TinyTLError(  # the model was called past its own check
                "a frozen weight requires a gradient, which the lean engine does not compute; use a method or "
                "trained_blocks that train it (FT-Full trains all), or lean=False"
            )
        if torch.compiler.is_compiling():
            return operators.run_chain(self, x, compute_dtype(x), pools)
        self._forget_other_geometry()
        unread, keeps = False, torch.is_grad_enabled()
        return _ChainFunction.apply(x, self, read, pools, unread, keeps, *(stage.bias for stage in self.stages))


def _room_for(stage: Stage, x: Tensor, dtype: torch.dtype, size: tuple[int, int, int]) -> Tensor | None:
    if stage.activation is None:
        return None
    if stage.activation in SMOOTH:
        return empty_maps(x, torch.promote_types(dtype, torch.float32), (x.shape[0], *size))
    return x.new_empty((x.shape[0], -(-math.prod(size) // 8)), dtype=torch.uint8)


class _ChainFunction(LeanFunction):
    """The chain's output; keeps what the gradients of its activations need, and nothing else.

    With ``unread`` its output is room that holds anything, which only chains without activations may have. Without
    ``keeps``, as no gradient is wanted, it keeps nothing: that is not to be seen from within.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        chain: Chain,
        read: list[Tensor],
        pools: bool,
        unread: bool,
        keeps: bool,
        *biases: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        chain.check(x.shape)
        dtype = compute_dtype(x)
        ctx.backend = backend.named(backend.of_chain(chain, x.device, dtype, x.shape))
        ctx.chain, ctx.shape, ctx.dtype, ctx.compute_dtype = chain, x.shape, x.dtype, dtype
        ctx.read, ctx.versions = read, operators.versions_of(read)
        if unread:
            ctx.save_for_backward(*chain.empty_kept(x, dtype, keeps=False))
            return empty_maps(x, dtype, (len(x), *chain.map_sizes(x.shape)[-1])), None
        keeps = keeps and any(ctx.needs_input_grad)
        output, pooled, kept = ctx.backend.chain_forward(chain, x, dtype, keeps, pools)
        ctx.save_for_backward(*kept)
        return output, pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_pooled: Tensor | None) -> tuple[Tensor | None, ...]:
        needs_input, _, _, _, _, _, *needs_bias = ctx.needs_input_grad
        operators.check_own(ctx.read, ctx.chain.read_backward, ctx.versions)
        kept = list(ctx.saved_tensors)
        grad_input, bias_grads = ctx.backend.chain_backward(
            ctx.chain, kept, ctx.shape, ctx.compute_dtype, grad, grad_pooled, needs_input, needs_bias
        )
        of_biases = [
            None if total is None or stage.bias is None else total.to(stage.bias.dtype)
            for stage, total in zip(ctx.chain.stages, bias_grads, strict=True)
        ]
        return None if grad_input is None else grad_input.to(ctx.dtype), None, None, None, None, None, *of_biases
