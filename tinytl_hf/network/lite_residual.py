"""The lite residual: a narrow trainable branch beside a frozen block (TinyTL, section 3.2).

::

    x ──┬── block (frozen) ───────────────────────────────────────────────────────── + ── y
        └── pool/2 ─ kxk grouped conv ─ norm ─ ReLU ─ 1x1 conv ─ norm (weight 0) ─ upsample ─┘

The last norm's weight starts at zero, so at step 0 the sum is exactly the block's own output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from tinytl_hf.config.network import LiteConfig
from tinytl_hf.errors import TinyTLError
from tinytl_hf.network.norms import GlobalBatchNorm2d

CHANNELS_PER_GROUP = 8
# What asks for the size of maps is one step of the graphs that torch.fx draws, create_feature_extractor's say: they
# have none.
torch.fx.wrap("_pooled")


class LiteResidual(nn.Module):
    """Pool, grouped convolution, norm, ReLU, 1x1 convolution, norm, bilinear up-sampling.

    Args:
        in_channels: Channels of the block's input.
        out_channels: Channels of the block's output.
        stride: The block's stride.
        map_size: Side of the block's input in px at the training resolution; decides the kernel size.
        options: Kernel size, groups, expansion and kind of norm.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, map_size: int, options: LiteConfig) -> None:
        super().__init__()
        middle = _round_channels(in_channels * options.expand)
        if in_channels % options.groups or middle % options.groups:
            # The middle ones are a multiple of 8.
            raise TinyTLError(
                f"lite.groups={options.groups}: must divide the {in_channels} input and {middle} middle "
                f"channels of a block; use 1{'' if in_channels % 2 else ' or 2'}"
            )
        kernel_size, self.pools = fit_kernel(options.kernel_size, map_size)
        self.conv1 = nn.Conv2d(
            in_channels,
            middle,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            groups=options.groups,
            bias=False,
        )
        self.norm1 = _norm(middle, options.norm)
        self.conv2 = nn.Conv2d(middle, out_channels, 1, bias=False)
        self.norm2 = _norm(out_channels, options.norm)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out")
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, out_channels, *size]``."""
        small = self.before_upsampling(_pooled(x, self.pools))
        return F.interpolate(small, size=size, mode="bilinear", align_corners=False)

    def pools_maps_of(self, size: tuple[int, ...]) -> bool:
        """Whether maps are pooled: not those 1 px high or wide, at whatever size the branch was built for."""
        return _pools_maps(self.pools, size)

    def before_upsampling(self, pooled: Tensor) -> Tensor:
        """What comes between the pooling and the up-sampling."""
        return self.norm2(self.conv2(F.relu(self.norm1(self.conv1(pooled)))))


def fit_kernel(kernel_size: int, map_size: int) -> tuple[int, bool]:
    """The kernel size for a block's input of ``map_size`` px, and whether the branch pools.

    The kernel shrinks until it fits the pooled map; where that is 1 px, the branch is 1x1 and does not
    pool (the official code's rule).
    """
    pooled = max(1, map_size // 2)
    if pooled == 1:
        return 1, False
    while kernel_size > pooled:
        kernel_size -= 2
    return kernel_size, True


def _pooled(x: Tensor, pools: bool) -> Tensor:
    return F.avg_pool2d(x, 2) if _pools_maps(pools, x.shape[-2:]) else x


def _pools_maps(pools: bool, size: Sequence[int]) -> bool:
    return pools and min(size) > 1


def _round_channels(channels: float) -> int:
    """The nearest multiple of 8, never more than 10 % below ``channels``."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


def _norm(channels: int, kind: str) -> GlobalBatchNorm2d | nn.GroupNorm:
    if kind == "batch":
        norm = GlobalBatchNorm2d(channels)
        norm.instead = "--lite.norm group"
        return norm
    groups = channels // CHANNELS_PER_GROUP if channels % CHANNELS_PER_GROUP == 0 else 1
    return nn.GroupNorm(groups, channels)
