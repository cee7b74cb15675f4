"""The training pass of a whole residual block, with its lite residual."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinytl_hf.lean import bits
from tinytl_hf.lean.again import is_computed_again
from tinytl_hf.lean.chain import Chain
from tinytl_hf.lean.function import LeanFunction, once_differentiable
from tinytl_hf.lean.layers import average_pool, masked_relu, scales_output, upsample_add
from tinytl_hf.lean.lite_branch import Branch
from tinytl_hf.lean.recompute import Recomputed
from tinytl_hf.lean.sliced import in_slices
from tinytl_hf.lean.slices import even_slices, slice_mb_on
from tinytl_hf.lean.together import has_hooks


@dataclass(frozen=True)
class LeanResNetPath:
    """A ResNet block: main chain plus shortcut, then ReLU.

    Attributes:
        main: The convolutions of the block.
        shortcut: The projection of its input, or None where the input itself is added.
        upper: Where the last activation saturates: infinite for ReLU, 6 for ReLU6.
    """

    main: Chain
    shortcut: Chain | None
    upper: float

    def __call__(self, x: Tensor) -> Tensor:
        """As the block."""
        if torch.compiler.is_compiling():  # slices and what is done in place are no part of a graph
            return masked_relu(self.main(x) + (x if self.shortcut is None else self.shortcut(x)), self.upper)
        image_bytes = max(map(math.prod, self.main.map_sizes(x.shape))) * x.element_size()
        slices = list(even_slices(len(x), image_bytes, slice_mb_on(x.device, self.main.slice_mb)))
        chains = (self.main,) if self.shortcut is None else (self.main, self.shortcut)
        biases = [stage.bias for chain in chains for stage in chain.stages]
        return in_slices(self._run, x, slices, [b for b in biases if b is not None and b.requires_grad])

    def _run(self, x: Tensor) -> Tensor:
        return _AddReLU.apply(self.main(x), x if self.shortcut is None else self.shortcut(x), self.upper)


class _AddReLU(LeanFunction):
    """Adds to the first maps, in their place, and activates; keeps one bit a value.

    In place, a block has two maps of a batch at a time, where a sum and an activation of their own would be two more.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, added: Tensor, upper: float) -> Tensor:
        ctx.mark_dirty(maps)
        maps.add_(added).clamp_(0, upper)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(bits.pack(maps.permute(0, 2, 3, 1), upper))
        return maps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (mask,) = ctx.saved_tensors
        rows = grad.clone(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        masked = bits.mask_(rows, mask).permute(0, 3, 1, 2)
        return masked, masked, None


@dataclass(frozen=True)
class LeanBlockPath:
    """A block plus its lite residual.

    Attributes:
        main: The block itself, perhaps with a stem before it.
        branch: Its lite residual, but for pooling and up-sampling.
        apart: The stem and the block by themselves, where ``main`` is both.
    """

    main: Callable[[Tensor], Tensor]
    branch: Branch
    apart: tuple[Chain, Chain] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """As the block with its lite residual, which runs as in stock PyTorch if somebody looks at it."""
        lite = self.branch.lite
        if has_hooks(lite):
            output = self.main(x)
            return output + lite(x, tuple(output.shape[-2:]))
        if isinstance(self.main, Chain) and lite.pools_maps_of(self.main.block_input_size(x.shape)):
            output, pooled = self.main.with_pooled_input(x)
        elif self.apart is not None:  # the lite residual gets what the stem gives as it is
            stem, block = self.apart
            return LeanBlockPath(block, self.branch)(stem(x))
        else:
            output, pooled = self.main(x), self.pooled(x)
        small = self.branch(pooled)
        if not isinstance(self.main, (Chain, LeanResNetPath, Recomputed)):
            output = output.clone()  # a stock layer may have kept its output, which is not to be written over
        return upsample_add(output, small, self.branch.backend)

    def pooled(self, x: Tensor) -> Tensor:
        """What the lite residual gets of the block's input."""
        return average_pool(x) if self.branch.lite.pools_maps_of(tuple(x.shape[-2:])) else x


@dataclass(frozen=True)
class UnreadWhenAgain:
    """The last convolution of a block that is computed again: nothing but the addition of its input follows.

    The second time only gradients are wanted, and none of them needs its output. Called for itself, it is computed.

    Attributes:
        chain: The convolution, without an activation.
        block: The block.
    """

    chain: Chain
    block: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        """The output, or maps of its shape that hold anything."""
        is_read = not is_computed_again() or scales_output(self.block)
        return self.chain(x) if is_read else self.chain.unread(x)


@dataclass(frozen=True)
class Activated:
    """A chain, and an activation that is computed again with it.

    Attributes:
        chain: The chain.
        activation: What follows it.
    """

    chain: Chain
    activation: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        """As the layers of both."""
        return self.activation(self.chain(x))


class LeanPart(nn.Module):
    """Mixed in before the class of a part of an unknown kind.

    Attributes:
        path: Its training pass.
    """

    path: Recomputed

    def forward(self, x: Tensor) -> Tensor:
        """As the part's own class."""
        return self.path(x) if self.training else super().forward(x)
