"""How ``fit`` ranks what fits: points of accuracy in %, next to the whole ``TinyTL-L+B`` at 128 px, which add up.

The table of configs/README.md, "How fit ranks", has where each is measured, and is compared with this one by a test.
What was not measured takes the figure of what is nearest to it.
"""

from __future__ import annotations

import numpy as np

METHODS = {
    "FT-Full": 1.0,
    "FT-Layerwise": 0.6,
    "TinyTL-L+B": 0.0,
    "TinyTL-L": -0.1,
    "TinyTL-B": -0.7,
    "FT-Norm+Last": -2.3,
    "FT-Last": -6.5,
}
BLOCKS = {17: 0.0, 10: -0.3, 6: -0.8, 3: -2.8}  # that train, of MobileNetV2's 17
SIZES = {160: 0.4, 128: 0.0, 96: -0.6, 64: -3.5}  # px
INT8_WITH_LITE_RESIDUALS = -0.2
INT8_WITHOUT = -2.8
GROUP_NORM = -0.6  # in lite residuals

SHARES = {count / max(BLOCKS): gained for count, gained in BLOCKS.items()}


def points(method: str, share: float, train_size: int, int8: bool, group_norm: bool) -> float:
    """Points of a way to train; between shares and sizes that were measured they are interpolated.

    Args:
        method: One of the seven.
        share: Share of the residual blocks that train, counted from the last.
        train_size: Side of the training images in px.
        int8: Whether frozen weights are stored in 8 bits.
        group_norm: Whether lite residuals have group norms in place of batch norms.
    """
    of_method, of_blocks = METHODS[method], _between(SHARES, share)
    if share < 1:  # a lead that was measured with all blocks is not taken for granted with fewer
        of_method = min(0.0, of_method)
    total = of_method + of_blocks + _between(SIZES, train_size)
    if int8:
        total += INT8_WITH_LITE_RESIDUALS if method.startswith("TinyTL-L") else INT8_WITHOUT
    return round(total + GROUP_NORM * group_norm, 2)


def _between(table: dict[int, float] | dict[float, float], place: float) -> float:
    places = sorted(table)
    return float(np.interp(place, places, [table[known] for known in places]))  # type: ignore[index]
