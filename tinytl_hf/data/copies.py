"""Images that are the same file byte for byte, under other names or in another class."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from tinytl_hf.data.columns import byte_sizes, image_files
from tinytl_hf.data.split import READ_WHOLE, Split, contents
from tinytl_hf.words import counted


def about_copies(train: Split, evaluated: Sequence[Split]) -> list[str]:
    """What to say of images to evaluate on that are trained on under other names, and of images in two classes."""
    lines = [
        f"{count:,} of the {counted(len(split.labels), 'image')} of {split.title} "
        f"{'is' if count == 1 else 'are'} trained on as well: the same files, byte for byte"
        for split in evaluated
        if (count := count_shared(split, train))
    ]
    if pairs := _in_two_classes([train, *evaluated]):
        files = "file is" if len(pairs) == 1 else "files are"
        lines.append(f"{len(pairs):,} {files} in two classes, byte for byte: {' and '.join(pairs[0])}; one is wrong")
    return lines


def same_files(splits: Sequence[Split]) -> list[list[tuple[Split, int]]]:
    """Images that are one file byte for byte: of each such file, the splits and positions where it is.

    Files of one size are read to know, if they are no more than :data:`READ_WHOLE` bytes; of more, those that several
    rows name are known by their paths.
    """
    sizes = [byte_sizes(split.rows) for split in splits]
    distinct, counts = np.unique(np.concatenate(sizes), return_counts=True)
    several = distinct[(counts > 1) & (distinct > 0)]
    places = [np.flatnonzero(np.isin(each, several)) for each in sizes]
    is_read = sum(each[place].sum() for each, place in zip(sizes, places, strict=True)) <= READ_WHOLE
    found: dict[bytes | str, list[tuple[Split, int]]] = {}
    for split, place in zip(splits, places, strict=True):
        marks: Iterable[bytes | str | None] = _hashes(split, place) if is_read else _paths(split, place)
        for number, mark in zip(place.tolist(), marks, strict=True):
            if mark is not None:
                found.setdefault(mark, []).append((split, number))
    return [group for group in found.values() if len(group) > 1]


def _hashes(split: Split, places: np.ndarray) -> Iterator[bytes]:
    return (hashlib.sha256(content).digest() for content in contents(split, places))


def _paths(split: Split, places: np.ndarray) -> list[str | None]:
    """The files of images; None for one that is in the table itself."""
    return image_files(split.rows.select(places))


def _in_two_classes(splits: Sequence[Split]) -> list[tuple[str, str]]:
    """Pairs of images that are one file and have two labels."""
    pairs = []
    for (first, at), *others in same_files(splits):
        label = first.labels[at]
        other = next((place for place in others if place[0].labels[place[1]] != label), None)
        if other is not None:
            pairs.append((_labelled(first, at), _labelled(*other)))
    return pairs


def _labelled(split: Split, number: int) -> str:
    image = split.rows[number]["image"]
    name = image["path"] if image["bytes"] is None else f"row {split.numbers[number]} of split {split.name}"
    return f"{name} ({split.label_names[split.labels[number]]})"


def count_shared(one: Split, other: Split) -> int:
    """How many images of a part of a data set are in another: the same rows, or the same files byte for byte.

    Files are compared where those of one size are no more than :data:`READ_WHOLE` bytes, else their paths.
    """
    same = one.name == other.name
    shared = np.isin(one.numbers, other.numbers) if same else np.zeros(len(one.labels), dtype=bool)
    sizes, others = byte_sizes(one.rows), byte_sizes(other.rows)
    ours = np.flatnonzero(np.isin(sizes, others) & (sizes > 0) & ~shared)
    theirs = np.flatnonzero(np.isin(others, sizes[ours]))
    if sizes[ours].sum() + others[theirs].sum() <= READ_WHOLE:
        known = set(_hashes(other, theirs))
        shared[ours] = [digest in known for digest in _hashes(one, ours)]
    else:
        paths = {path for path in _paths(other, theirs) if path is not None}
        shared[ours] = [path in paths for path in _paths(one, ours)]
    return int(shared.sum())
