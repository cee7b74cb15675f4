"""Masks, boxes or other pictures beside the images that they belong to: their folder is no class."""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from itertools import combinations
from pathlib import Path

from tinytl_hf.errors import TinyTLError
from tinytl_hf.words import counted

logger = logging.getLogger(__name__)

NEARLY_ALL = 0.9  # of the files of the larger folder

IMAGES = re.compile(r"(jpe?g)?im(age|g)s?|photos?|inputs?|rgb|originals?", re.I)
OF_IMAGES = re.compile(
    r"(.*[-_ ])?(masks?|labels?|labelids|annotations?|annots?|gts?|ground[-_ ]?truths?|seg(mentation)?s?|targets?|"
    r"trimaps?|segmentation(class|object))(png)?",
    re.I,
)
# What restoration, depth or several cameras have beside an image, and what they may call the image.
OTHER_PICTURES = re.compile(
    r"(.*[-_ ])?(hr|lr|hq|lq|depth|disparity|normals|thermal|infrared|nir|edges|noisy|blur(red|ry)?|hazy?)"
    r"([-_ ]?x\d)?",
    re.I,
)
THEIR_IMAGES = re.compile(r"(.*[-_ ])?(gt|rgb|colou?rs?|clean|clear|sharp|visible)", re.I)
BEHIND_A_NAME = re.compile(r"[-_ ]?(masks?|labels?|annot(ation)?s?|gts?|seg(mentation)?s?)$", re.I)  # trainannot
OF_AN_IMAGE = re.compile(r"[-_ ](mask|seg|segmentation|gt|label|annotation)([-_ ]?\d+)?$", re.I)


def check_no_masks(root: Path, classes: Mapping[str, list[str]]) -> None:
    """Raise if one of the class folders holds masks, one for most of the images of another.

    Args:
        root: The data set's folder.
        classes: Paths of the images of each class folder.
    """
    images = next((folder for folder in classes if IMAGES.fullmatch(folder)), None)
    if images is None:
        return
    stems = set(_stems(classes[images]))
    for folder, paths in classes.items():
        if folder == images or not OF_IMAGES.fullmatch(folder):
            continue
        # 1_mask.png belongs to 1.jpg as well
        count = sum(stem in stems or re.sub(r"[-_ ][a-z]+$", "", stem, flags=re.I) in stems for stem in _stems(paths))
        if 2 * count >= len(paths):
            raise TinyTLError(
                f"data.dataset={root}: {folder}/ has files of the same names as {images}/ ({paths[0]}), as masks or "
                "boxes of its images have, and these are no classes; put the images of each class into a folder of "
                "its name, or write a metadata.csv with columns file_name and label, and name the folder of that"
            )


def say_pairs(classes: Mapping[str, list[str]]) -> None:
    """Say if two class folders hold the same names and are called as pictures of the same things are (``HR``, ``LR``).

    The same names alone say nothing: many number the images of each class from 1 on.
    """
    for one, other in sorted(_called_pairs(classes)):
        ours, theirs = set(_stems(classes[one])), set(_stems(classes[other]))
        shared, most = ours & theirs, max(len(ours), len(theirs))
        if len(shared) > 1 and len(shared) >= NEARLY_ALL * most:
            logger.warning(
                "%s/ and %s/ hold files of the same names (%s of %s), and are taken as two classes; if they show the "
                "same things, as images and their masks or depths do, they are none",
                *(one, other, f"{len(shared):,}", f"{most:,}"),
            )


def _called_pairs(folders: Collection[str]) -> set[tuple[str, str]]:
    """Folders of which, by their names, one has other pictures, or masks, of what is in the other."""
    others = [name for name in folders if OTHER_PICTURES.fullmatch(name)]
    images = [name for name in folders if IMAGES.fullmatch(name) or THEIR_IMAGES.fullmatch(name)]
    of_both = ((image, other) for image in images for other in others)
    masks = ((before, name) for name in folders if (before := BEHIND_A_NAME.sub("", name)) != name)
    found = [*combinations(others, 2), *of_both, *(pair for pair in masks if pair[0] in folders)]
    return {(min(pair), max(pair)) for pair in found}


def say_masks(paths: Iterable[str], depth: int) -> None:
    """Say if images are called as masks of others in their class, by their names or by folders in the class folder.

    So are ``cat/1_mask.png`` of ``cat/1.jpg`` and ``cat/masks/1.png`` of ``cat/images/1.jpg``.

    Args:
        paths: Those of the images.
        depth: How many folders there are up to the class folder, and with it.
    """
    images = {os.path.splitext(path)[0]: path for path in paths}
    beside: dict[str, set[str]] = defaultdict(set)  # folders that hold images, by the folder around them
    for folder in {os.path.dirname(path) for path in images}:
        beside[os.path.dirname(folder)].add(folder)
    called = [(path, _image_of(mask, images, beside, depth)) for mask, path in images.items()]
    pairs = [(path, image) for path, image in called if image is not None]
    if pairs:
        logger.warning(
            "%s called as masks of others are (%s beside %s), and taken as images of their class; move masks away",
            *(counted(len(pairs), "image is", "images are"), *pairs[0]),
        )


def _image_of(mask: str, images: Mapping[str, str], beside: Mapping[str, set[str]], depth: int) -> str | None:
    """The image that this is called as a mask of, by its name or its folder; paths are without suffix."""
    names = [OF_AN_IMAGE.sub("", mask)]
    folder, name = os.path.split(mask)
    around, called = os.path.split(folder)
    if folder.count("/") >= depth and OF_IMAGES.fullmatch(called):
        folders = [around, *sorted(each for each in beside[around] if not OF_IMAGES.fullmatch(os.path.basename(each)))]
        names += [f"{each}/{OF_AN_IMAGE.sub('', name)}" for each in folders]
    return next((images[each] for each in names if each != mask and each in images), None)


def _stems(paths: Iterable[str]) -> list[str]:
    return [Path(path).stem for path in paths]
