"""A part of the training images that is held out to evaluate on."""

from __future__ import annotations

import math

import numpy as np
from sklearn.model_selection import train_test_split

from tinytl_hf.config.data import DataConfig
from tinytl_hf.errors import TinyTLError


def hold_out(labels: np.ndarray, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Split images in two, with the same share of each class in both.

    A class with a single image stays whole in the first part.

    Args:
        labels: ``[N]`` class numbers.
        config: The share to hold out, and the seed.

    Returns:
        Positions of the images that are trained on, and of those that are held out, both in order.

    Raises:
        TinyTLError: There are too few images for the share.
    """
    counts = np.bincount(labels)
    alone = np.flatnonzero(counts[labels] == 1)
    rest = np.flatnonzero(counts[labels] > 1)
    if not len(rest):
        raise TinyTLError(
            f"cannot hold out a part of {len(labels)} images, as each has a class of its own; use more images of each "
            "class, or name the column of the classes with --data.label_column"
        )
    try:
        kept, held_out = train_test_split(
            rest, test_size=config.eval_fraction, random_state=config.split_seed, stratify=labels[rest]
        )
    except ValueError as error:
        raise TinyTLError(
            f"data.eval_fraction={config.eval_fraction}: cannot hold out a part of {len(labels)} images with every "
            f"class in both parts ({error}); {_fix(len(rest), int((counts > 1).sum()))}"
        ) from error
    return np.sort(np.concatenate([alone, kept])), np.sort(held_out)


def _fix(images: int, classes: int) -> str:
    """What share would do: both parts need an image of each class."""
    if images < 2 * classes or images == 0:
        return "use more images"
    low = math.ceil(1000 * classes / images) / 1000
    high = math.floor(1000 * (images - classes) / images) / 1000
    return f"use a share from {low:g} to {high:g}, or more images" if low <= high else "use more images"
