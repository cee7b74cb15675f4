"""Images that a table names without their suffix or folder: ``000bec18`` for ``train/000bec18.jpg``."""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets

from tinytl_hf.data.almost_splits import split_words
from tinytl_hf.data.find import suffix_of
from tinytl_hf.data.images import IMAGE_SUFFIXES
from tinytl_hf.data.listing import list_folder
from tinytl_hf.data.roles import role_of
from tinytl_hf.errors import TinyTLError

logger = logging.getLogger(__name__)

IDS = re.compile(r"(large_)?string|u?int\d+")  # types of values that can be ids


def is_id(feature: object) -> bool:
    """Whether a column can hold ids, by its type."""
    return isinstance(feature, datasets.Value) and IDS.fullmatch(feature.dtype) is not None


def id_columns(table: datasets.Dataset, base: Path, label_column: str) -> list[str]:
    """Columns of which each row has another value, and most are ids of images.

    Args:
        table: A split.
        base: The table's folder.
        label_column: A column that has none, whatever it holds.
    """
    columns = [name for name, feature in table.features.items() if is_id(feature) and name != label_column]
    values = table.select_columns(columns).with_format("arrow")[:]  # of all at once, as there can be hundreds
    texts = {name: [str(value) for value in values.column(name).to_pylist() if value is not None] for name in columns}
    unlike = {name: values for name, values in texts.items() if values and len(set(values)) == len(values)}
    known = images_by_id(list_folder(base).images) if unlike else {}
    return [name for name, values in unlike.items() if 2 * len(known.keys() & values) > len(values)]


def with_ids_placed(
    ids: Sequence[str | None], places: Sequence[str | None], column: str, base: Path, split: str | None
) -> list[str | None]:
    """Places of images, where those that are not there may be named by their ids.

    Names with a suffix stand for images in other folders if no image at all lies where it is said to; else the table
    names images that are gone, and others that are called so are not those.

    Args:
        ids: What a table says.
        places: Where that is, if it is a path.
        column: The table's column, for messages.
        base: The table's folder.
        split: The table's split, if there are others.

    Raises:
        TinyTLError: Two images have one id.
    """
    placed = list(places)
    elsewhere = not any(place and os.path.isfile(place) for place in places)
    missing = [
        (number, name)
        for number, (name, place) in enumerate(zip(ids, places, strict=True))
        if name and place and (elsewhere or suffix_of(name) not in IMAGE_SUFFIXES) and not os.path.isfile(place)
    ]
    images_there = list_folder(base).images if missing else []
    known = {**images_by_id(images_there), **images_by_name(images_there)}
    for number, name in missing:
        images = _of_split(known.get(name, []), split)
        if len(images) > 1:
            raise TinyTLError(
                f"column {column}: {name} can be {images[0]} and {images[1]} in {base}; put the table into the folder "
                "of its images, or write their paths into it, with the suffix"
            )
        if images:
            placed[number] = f"{base}/{images[0]}"
    found = [(name, place) for number, name in missing if (place := placed[number]) and place != places[number]]
    for name, place in found[:1]:
        lacking, image = "folder" if suffix_of(name) in IMAGE_SUFFIXES else "suffix", os.path.relpath(place, base)
        logger.info("column %s names images without their %s: %s is %s", column, lacking, name, image)
    return placed


def _of_split(images: list[str], split: str | None) -> list[str]:
    """Of several images, the one that lies in a folder that is called as their split is, if it is one alone."""
    role = role_of(split or "")
    if role is None or len(images) < 2:
        return images
    called_so = [
        image for image in images if {role_of(word) for word in split_words(os.path.dirname(image))} == {role}
    ]
    return called_so if len(called_so) == 1 else images


def images_by_id(images: Iterable[str]) -> dict[str, list[str]]:
    """Images by their names and by their paths, both without the suffix."""
    known: dict[str, list[str]] = defaultdict(list)
    for image in images:
        path = os.path.splitext(image)[0]
        for name in {path, os.path.basename(path)}:
            known[name].append(image)
    return dict(known)


def images_by_name(images: Iterable[str]) -> dict[str, list[str]]:
    """Images by their names without their folders."""
    known: dict[str, list[str]] = defaultdict(list)
    for image in images:
        known[os.path.basename(image)].append(image)
    return dict(known)
