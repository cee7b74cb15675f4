"""The training pass of a whole residual block, with its lite residual."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tinytl_hf.lean.chain import UPPER, Chain
from tinytl_hf.lean.layers import average_pool, masked_relu, upsample_add
from tinytl_hf.lite_residual import LiteResidual
from tinytl_hf.norms import recompute_contexts


@dataclass(frozen=True)
class LeanResNetPath:
    """A ResNet block: main chain plus shortcut, then ReLU.

    Attributes:
        main: The convolutions of the block.
        shortcut: The projection of its input, or null where the input itself is added.
    """

    main: Chain
    shortcut: Chain | None

    def __call__(self, x: Tensor) -> Tensor:
        """As the block."""
        return masked_relu(self.main(x) + (x if self.shortcut is None else self.shortcut(x)), UPPER["relu"])


@dataclass(frozen=True)
class LeanBlockPath:
    """A block plus its lite residual, which keeps the maps before and after its grouped convolution.

    What follows that convolution is cheap and is computed again for the backward pass.

    Attributes:
        main: The block itself.
        lite: Its lite residual.
    """

    main: Callable[[Tensor], Tensor]
    lite: LiteResidual

    def __call__(self, x: Tensor) -> Tensor:
        """As the block with its lite residual."""
        if not self.lite.pools_maps_of(x):
            output, pooled = self.main(x), x
        elif isinstance(self.main, Chain):
            output, pooled = self.main.with_pooled_input(x)
        else:
            output, pooled = self.main(x), average_pool(x)
        maps = self.lite.conv1(pooled)
        small = checkpoint(
            self.lite.after_conv1, maps, use_reentrant=False, context_fn=recompute_contexts, preserve_rng_state=False
        )
        return upsample_add(output, small)
