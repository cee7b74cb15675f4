"""How large the images of a split are once they are decoded, by their headers alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.batches import CHUNK, STREAMS
from tinytl_hf.data.images import decoded_photo_size, decoded_size
from tinytl_hf.data.sets import Split

MOST = 4096  # images of a split that are looked at, spread evenly


@dataclass(frozen=True)
class PhotoSizes:
    """What the images of a split take once they are decoded.

    Attributes:
        in_memory: About what all images take in bytes, or ``STREAMS``.
        largest: Greatest height and greatest width in px: what a batch is padded to at most.
    """

    in_memory: int | str
    largest: tuple[int, int]


def photo_sizes(split: Split, config: DataConfig, size: int) -> PhotoSizes:
    """Read the headers of a split's images, of 4,096 of them at most; those that cannot be read do not count.

    Args:
        split: The images.
        config: How much memory decoded images may take.
        size: Side of the network's input in px; much larger images are reduced.
    """
    count = len(split.labels)
    index = np.linspace(0, count - 1, min(MOST, count)).astype(int)
    chunks = [index[start : start + CHUNK] for start in range(0, len(index), CHUNK)]
    images = (image for chunk in chunks for image in split.rows[chunk]["image"] if image is not None)
    sizes = np.array([found for image in images if (found := decoded_size(image, size)) is not None])
    if not len(sizes):
        return PhotoSizes(0, decoded_photo_size(size))
    in_memory = round(3 * float(sizes.prod(axis=1).mean()) * count)
    height, width = sizes.max(axis=0).tolist()
    return PhotoSizes(STREAMS if in_memory > config.memory_limit_mb * 1e6 else in_memory, (height, width))
