"""A part of the training images that is held out to evaluate on."""

from __future__ import annotations

import logging
import math

import numpy as np
from sklearn.model_selection import train_test_split

from tinytl_hf.config.data import DataConfig
from tinytl_hf.errors import TinyTLError
from tinytl_hf.words import counted

logger = logging.getLogger(__name__)


def hold_out(labels: np.ndarray, firsts: np.ndarray, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Split images in two, with the same share of each class in both, and the copies of an image in one with it.

    Where the share is less than an image for each class, as with five photos a class, it is one of each. A class with
    a single image stays whole in the first part.

    Args:
        labels: ``[N]`` class numbers.
        firsts: ``[N]`` positions: of the image that each one goes with, which is the first of those.
        config: The share to hold out, and the seed.

    Returns:
        Positions of the images that are trained on, and of those that are held out, both in order.

    Raises:
        TinyTLError: The share leaves too few images to train on, or each image has a class of its own.
    """
    leaders = np.unique(firsts)
    if copies := len(labels) - len(leaders):
        logger.info(
            "%s changed by their names (flipped, turned): each is held out, or trained on, together with its original",
            counted(copies, "image is a copy", "images are copies"),
        )
    is_held_out = np.isin(firsts, leaders[_held_out(labels[leaders], config)])
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def _held_out(labels: np.ndarray, config: DataConfig) -> np.ndarray:
    """Positions of the images to hold out, of which none is another's copy."""
    counts = np.bincount(labels)
    rest = np.flatnonzero(counts[labels] > 1)
    if not len(rest):
        raise TinyTLError(
            f"cannot hold out a part of {len(labels)} images, as each has a class of its own; use more images of each "
            "class, or name the column of the classes with --data.label_column"
        )
    wanted, classes = math.ceil(config.eval_fraction * len(rest)), int((counts > 1).sum())
    if wanted > len(rest) - classes:
        raise TinyTLError(
            f"data.eval_fraction={config.eval_fraction}: leaves fewer of {len(labels)} images to train on than one of "
            f"each class; use {math.floor(1000 * (len(rest) - classes) / len(rest)) / 1000:g} or less"
        )
    if wanted >= classes:
        held_out = train_test_split(rest, test_size=wanted, random_state=config.split_seed, stratify=labels[rest])[1]
    else:
        held_out = _one_of_each(rest, labels, config.split_seed)
        logger.warning(
            "data.eval_fraction=%s: less than one image of each class, so one of each is held out, %s of %s images",
            *(config.eval_fraction, f"{len(held_out):,}", f"{len(labels):,}"),
        )
    return held_out


def _one_of_each(images: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """An image of each class, at random."""
    shuffled = np.random.default_rng(seed).permutation(images)
    return shuffled[np.unique(labels[shuffled], return_index=True)[1]]
