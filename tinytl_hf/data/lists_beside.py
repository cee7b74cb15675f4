"""Text files beside class folders that list the images of splits, as ``train.txt`` and ``TestImages.txt`` do."""

from __future__ import annotations

import os
import re

from tinytl_hf.data.almost_splits import split_words
from tinytl_hf.data.beside import say_splits_not_taken
from tinytl_hf.data.ids import images_by_id
from tinytl_hf.data.listing import Listing
from tinytl_hf.data.roles import role_of

FIRST_BYTES = 1000  # of a list, which can be long


def say_lists_beside(listing: Listing) -> None:
    """Say if text files that are called as splits are name images, where the folders say no splits."""
    called = [path for path in listing.lists if split_words(os.path.basename(path))]
    if len({role_of(word) for path in called for word in split_words(os.path.basename(path))}) < 2:
        return
    known = images_by_id(listing.images).keys() | set(listing.images)
    if lists := [path for path in called if not known.isdisjoint(_first_names(listing, path))]:
        say_splits_not_taken(lists)


def _first_names(listing: Listing, path: str) -> list[str]:
    """What the first two lines of a list hold: a path or an id, labels and numbers; the first can be a heading."""
    try:
        with open(listing.root / path, "rb") as file:
            lines = file.read(FIRST_BYTES).decode("utf-8-sig", "replace").splitlines()[:2]
    except OSError:
        return []
    rows = [re.split(r"[\s,;]+", line.strip()) for line in lines]
    words = [word for first, *others in rows for word in (first, *others) if word == first or not word.isdecimal()]
    return [word.replace("\\", "/").removeprefix("./") for word in words]
