"""Text files beside class folders that list the images of splits, as ``train.txt`` and ``TestImages.txt`` do."""

from __future__ import annotations

import logging
import os
import re

from tinytl_hf.data.almost_splits import split_words
from tinytl_hf.data.found import named
from tinytl_hf.data.ids import images_by_id
from tinytl_hf.data.listing import Listing
from tinytl_hf.data.roles import role_of

logger = logging.getLogger(__name__)

FIRST_BYTES = 1000  # of a list, which can be long


def say_lists_beside(listing: Listing) -> None:
    """Say if text files that are called as splits are name images, where the folders say no splits."""
    called = [path for path in listing.lists if split_words(os.path.basename(path))]
    if len({role_of(word) for path in called for word in split_words(os.path.basename(path))}) < 2:
        return
    known = images_by_id(listing.images).keys() | set(listing.images)
    if lists := [path for path in called if _first_name(listing, path) in known]:
        logger.warning(
            "%s: which images are for tests is not taken from there, and the folders do not say it; put the images "
            "into train/CLASS and test/CLASS, or write a table with columns path, label and split, and name that",
            named(lists),
        )


def _first_name(listing: Listing, path: str) -> str:
    """What a list names first: lines are a path or an id, and may have a label behind it."""
    try:
        with open(listing.root / path, "rb") as file:
            line = file.read(FIRST_BYTES).decode("utf-8-sig", "replace").strip().partition("\n")[0]
    except OSError:
        return ""
    return re.split(r"[\s,;]", line.strip())[0].replace("\\", "/").removeprefix("./")
