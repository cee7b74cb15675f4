"""How large the images of a split are once they are decoded, by their headers alone."""

from __future__ import annotations

import numpy as np

from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.batches import Survey, survey_of
from tinytl_hf.data.images import decoded_size
from tinytl_hf.data.sets import Split

MOST = 4096  # images of a split that are looked at, spread evenly


def photo_sizes(split: Split, config: DataConfig, size: int) -> Survey:
    """Read the headers of a split's images, of 4,096 of them at most; those that cannot be read do not count.

    Args:
        split: The images.
        config: How much memory decoded images may take.
        size: Side of the network's input in px; much larger images are reduced.
    """
    count = len(split.labels)
    index = np.linspace(0, count - 1, min(MOST, count)).astype(int)
    sizes = [decoded_size(image, size) for image in split.images(index) if image is not None]
    return survey_of([each for each in sizes if each is not None], split, config, size)
