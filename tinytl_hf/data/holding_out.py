"""A part of the training images that is held out to evaluate on."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import train_test_split

from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.changed_copies import copies_by_names
from tinytl_hf.data.copies import same_files
from tinytl_hf.data.found import named
from tinytl_hf.data.split import Split
from tinytl_hf.errors import TinyTLError
from tinytl_hf.words import counted

logger = logging.getLogger(__name__)


def hold_out(split: Split, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Split images in two, with the same share of each class in both, and the copies of an image in one with it.

    Where the share is less than an image for each class, as with five photos a class, it is one of each. A class with
    a single image stays whole in the first part; one that is an image and its copies is split like others.

    Args:
        split: The images.
        config: The share to hold out, and the seed.

    Returns:
        Positions of the images that are trained on, and of those that are held out, both in order.

    Raises:
        TinyTLError: The share leaves too few images to train on, or each image has a class of its own.
    """
    firsts = _without_classes_of_one(_firsts_of_copies(split), split)
    leaders = np.unique(firsts)
    if copies := len(firsts) - len(leaders):
        logger.info(
            "%s of others (the same file, or by the names flipped, turned or in another format): an image and its "
            "copies are held out, or trained on, together",
            counted(copies, "image is a copy", "images are copies"),
        )
    sizes = np.unique(firsts, return_counts=True)[1]
    is_held_out = np.isin(firsts, leaders[_held_out(split.labels[leaders], sizes, config)])
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def _firsts_of_copies(split: Split) -> np.ndarray:
    """``[N]`` positions: for each image of the first among those that are copies of one another, else of itself."""
    alike = [[number for _, number in group] for group in same_files([split])]
    files = _firsts(alike, len(split.labels))
    return _firsts([*alike, *copies_by_names(split, files)], len(split.labels))


def _firsts(groups: Sequence[Sequence[int]], count: int) -> np.ndarray:
    """``[count]`` for each number the first of those that it is in a group with, directly or through others."""
    pairs = np.array([(group[0], other) for group in groups for other in group[1:]], dtype=np.int64).reshape(-1, 2)
    _, components = connected_components(coo_array((np.ones(len(pairs)), pairs.T), shape=(count, count)))
    _, first, inverse = np.unique(components, return_index=True, return_inverse=True)
    return first[inverse]


def _without_classes_of_one(firsts: np.ndarray, split: Split) -> np.ndarray:
    """``firsts`` where the copies of a class that has nothing else go with no other, so that some can be held out."""
    itself, classes = np.arange(len(firsts)), len(split.label_names)
    images = np.bincount(split.labels, minlength=classes)
    distinct = np.bincount(split.labels[firsts == itself], minlength=classes)
    alike = np.flatnonzero((images > 1) & (distinct < 2))
    if len(alike):
        logger.warning(
            "%s: all images of %s are copies of one, so that those held out say nothing of others",
            *(named([split.label_names[number] for number in alike]), "it" if len(alike) == 1 else "each"),
        )
    return np.where(np.isin(split.labels, alike), itself, firsts)


def _held_out(labels: np.ndarray, sizes: np.ndarray, config: DataConfig) -> np.ndarray:
    """Positions to hold out of images of which none is another's copy; ``sizes``: how many images each stands for."""
    counts, images = np.bincount(labels), sizes.sum()
    rest = np.flatnonzero(counts[labels] > 1)
    if not len(rest):
        raise TinyTLError(
            f"cannot hold out a part of {images} images, as each has a class of its own; use more images of each "
            "class, or name the column of the classes with --data.label_column"
        )
    wanted, classes = math.ceil(config.eval_fraction * len(rest)), int((counts > 1).sum())
    if wanted > len(rest) - classes:
        raise TinyTLError(
            f"data.eval_fraction={config.eval_fraction}: leaves fewer of {images} images to train on than one of "
            f"each class; use {math.floor(1000 * (len(rest) - classes) / len(rest)) / 1000:g} or less"
        )
    if wanted >= classes:
        drawn = train_test_split(rest, test_size=wanted, random_state=config.split_seed, stratify=labels[rest])[1]
        return _without_most(drawn, labels, sizes)
    held_out = _without_most(_one_of_each(rest, labels, config.split_seed), labels, sizes)
    logger.warning(
        "data.eval_fraction=%s: less than one image of each class, so one of each is held out, %s of %s images",
        *(config.eval_fraction, f"{sizes[held_out].sum():,}", f"{images:,}"),
    )
    return held_out


def _without_most(held_out: np.ndarray, labels: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """``held_out``, where an image whose copies are most of its class is exchanged for another of it."""
    found = set(held_out.tolist())
    of_class = np.bincount(labels, weights=sizes)
    for position in held_out[2 * sizes[held_out] > of_class[labels[held_out]]].tolist():
        others = [other for other in np.flatnonzero(labels == labels[position]).tolist() if other not in found]
        found = (found - {position}) | set(others[:1]) if others else found
    return np.array(sorted(found))


def _one_of_each(images: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """An image of each class, at random."""
    shuffled = np.random.default_rng(seed).permutation(images)
    return shuffled[np.unique(labels[shuffled], return_index=True)[1]]
