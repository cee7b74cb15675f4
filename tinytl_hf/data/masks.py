"""Masks or boxes beside the images that they belong to: these are no images of a class, and their folder is none."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from tinytl_hf.errors import TinyTLError

logger = logging.getLogger(__name__)

IMAGES = re.compile(r"(jpe?g)?im(age|g)s?|photos?|inputs?|rgb|originals?", re.I)
OF_IMAGES = re.compile(
    r"(.*[-_ ])?(masks?|labels?|labelids|annotations?|annots?|gts?|ground[-_ ]?truths?|seg(mentation)?s?|targets?|"
    r"trimaps?|segmentation(class|object))(png)?",
    re.I,
)
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


def say_masks(paths: Iterable[str]) -> None:
    """Say if images are called as masks of others beside them, as ``cat/1_mask.png`` is of ``cat/1.jpg``."""
    images = {os.path.splitext(path)[0]: path for path in paths}
    masks = [(path, OF_AN_IMAGE.sub("", name)) for name, path in images.items() if OF_AN_IMAGE.search(name)]
    pairs = [(path, images[name]) for path, name in masks if name in images]
    if pairs:
        logger.warning(
            "%s images are called as masks of others are (%s beside %s), and are taken as images of their class; move "
            "them away if they are masks",
            *(f"{len(pairs):,}", *pairs[0]),
        )


def _stems(paths: Iterable[str]) -> list[str]:
    return [Path(path).stem for path in paths]
