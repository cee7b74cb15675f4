"""JSON files beside class folders that name images: with other labels than the folders', boxes, or lists of splits."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.beside import say_not_used, say_splits_not_taken
from tinytl_hf.data.columns import LABEL, as_label
from tinytl_hf.data.find import suffix_of
from tinytl_hf.data.ids import images_by_id, images_by_name
from tinytl_hf.data.listing import Listing
from tinytl_hf.data.roles import of_several_splits
from tinytl_hf.errors import TinyTLError, first_line

logger = logging.getLogger(__name__)

FEW = 5  # JSON files in a folder: more are one for each image
LARGEST = 64_000_000  # bytes of a file that is looked into, as it is read whole
WRITE = "write a metadata.csv with columns file_name and label"


def check_json_beside(listing: Listing, by_folder: Mapping[str, str], config: DataConfig, has_splits: bool) -> None:
    """Name JSON files that name images which are labelled by their folders.

    Args:
        listing: The files of the folder.
        by_folder: The images' labels by their folders; whole paths.
        config: The label's key in a row, if that was said.
        has_splits: Whether the folders say which images are for tests.

    Raises:
        TinyTLError: A file has another label for an image than its folder.
    """
    files = _few_in_a_folder(listing)
    places, classes = _places(listing) if files else {}, set(by_folder.values())
    naming: list[str] = []
    unused: dict[str, int] = {}
    for name in files:
        content = _read(listing, name)
        found = _found(content, os.path.dirname(name), places)
        labels = _labels_of_rows(content, found, config.label_column or LABEL) or _labels_of_images(content, found)
        if isinstance(content, dict) and not classes.issuperset(labels.values()):
            labels = {}  # they can be anything: cameras, splits
        naming += [name] if found else []
        if found and not labels:
            unused[name] = len(set(found.values()))
        for image, label in labels.items():
            there = by_folder.get(f"{listing.root}/{image}", label)
            if label != there:
                take = f"name {listing.root / name}" if isinstance(content, list) else WRITE
                raise TinyTLError(
                    f"data.dataset={listing.root}: {image} is {there} by its folder, and {label} by {name}; {take} to "
                    f"take those labels, or move {name} away to take the folders'"
                )
    if unused:
        say_not_used(unused, f"{WRITE} for other labels")
    if of_several_splits(naming) and not has_splits:
        say_splits_not_taken(naming)


def _few_in_a_folder(listing: Listing) -> list[str]:
    """JSON files, but for those of folders that hold many, and of each image: ``1.json``, ``1.jpg.json``."""
    files = [name for name in listing.tables if suffix_of(name) == ".json"]
    in_folder = Counter(os.path.dirname(name) for name in files)
    of_an_image = {*listing.images, *(os.path.splitext(image)[0] for image in listing.images)}
    return [
        name
        for name in files
        if in_folder[os.path.dirname(name)] <= FEW and os.path.splitext(name)[0] not in of_an_image
    ]


def _places(listing: Listing) -> dict[str, str]:
    """Images by their paths, and by what stands for one alone: its name, and both without the suffix."""
    others: dict[str, list[str]] = defaultdict(list)
    for known in (images_by_name(listing.images), images_by_id(listing.images)):
        for text, images in known.items():
            if not text.isdecimal():  # any number in a file
                others[text] += images
    alone = {text: images[0] for text, images in others.items() if len(set(images)) == 1}
    return {**alone, **{image: image for image in listing.images}}


def _read(listing: Listing, name: str) -> Any:
    try:
        if (listing.root / name).stat().st_size > LARGEST:
            logger.info("%s: not looked into, as it is larger than %d MB", name, LARGEST // 1_000_000)
            return None
        return json.loads((listing.root / name).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        logger.info("%s: not used, as it cannot be read (%s)", name, first_line(error))
        return None


def _found(content: Any, folder: str, places: Mapping[str, str]) -> dict[str, str]:
    """The texts of a file in this folder that name images, and which: by their paths from there, or as elsewhere."""
    paths = {text: text.replace("\\", "/").removeprefix("./") for text in _texts(content)}
    beside = f"{folder}/" if folder else ""
    return {text: place for text, path in paths.items() if (place := places.get(beside + path) or places.get(path))}


def _texts(content: Any) -> Iterator[str]:
    """All texts in a JSON file, names of values included."""
    to_come = [content]
    while to_come:
        value = to_come.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            to_come += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            to_come += value


def _labels_of_rows(content: Any, found: Mapping[str, str], key: str) -> dict[str, str]:
    """What rows have under a key, by the image that they name first."""
    labels: dict[str, str] = {}
    for row in content if isinstance(content, list) else []:
        if isinstance(row, dict) and isinstance(row.get(key), str):
            images = [found[value] for value in row.values() if isinstance(value, str) and value in found]
            labels |= dict.fromkeys(images[:1], as_label(row[key]))
    return labels


def _labels_of_images(content: Any, found: Mapping[str, str]) -> dict[str, str]:
    """What stands behind the names of images."""
    pairs = content.items() if isinstance(content, dict) else []
    return {found[name]: as_label(value) for name, value in pairs if name in found and isinstance(value, str)}
