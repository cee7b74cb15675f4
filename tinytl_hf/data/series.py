"""Images that are, by their names, of one series: frames of a video, or pictures of one person or thing."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence

import numpy as np

from tinytl_hf.data.changed_copies import original_name
from tinytl_hf.data.columns import image_paths
from tinytl_hf.data.split import Split
from tinytl_hf.words import counted

Series = tuple[int, str, str]  # class, folder, and the name without its last number

NUMBERED = re.compile(r"(.*?)(\d{1,15})(\D*)")
FEWEST_IMAGES = 3  # of a series
FEWEST_SERIES = 4  # of a class: one or two are how its images are counted, or where they come from


def about_series(train: Split, evaluated: Sequence[Split]) -> list[str]:
    """What to say where most images to evaluate on are of series that are trained on, as of GTSRB's frames."""
    trained = list(_numbered(train))
    lines = []
    for split in evaluated:
        images = list(_numbered(split))
        series = _series([*trained, *images])
        places = {key: path for key, _, path in trained if key in series}
        pairs = [(path, places[key]) for key, _, path in images if key in places]
        if 2 * len(pairs) > len(split.labels):
            lines.append(
                f"{len(pairs):,} of the {counted(len(split.labels), 'image')} of {split.title} are, by the names, of "
                f"series that are trained on ({' and '.join(pairs[0])}), as frames of a video or pictures of a person "
                "are; if so, the figures are too good: put whole series into a split to evaluate on"
            )
    return lines


def _numbered(split: Split) -> Iterator[tuple[Series, int, str]]:
    """The series, the number in it and the path of each image that has a number."""
    for label, path in zip(split.labels.tolist(), image_paths(split.rows), strict=True):
        if path is not None and (parts := NUMBERED.fullmatch(original_name(path))):
            folder = os.path.basename(os.path.dirname(path))
            yield (label, folder, f"{parts[1]}*{parts[3]}"), int(parts[2]), path


def _series(images: Sequence[tuple[Series, int, str]]) -> set[Series]:
    """Those whose images are counted, unlike names with times or random numbers, of classes with several of them."""
    numbers: dict[Series, set[int]] = {}
    for key, number, _ in images:
        numbers.setdefault(key, set()).add(number)
    found = {key for key, each in numbers.items() if len(each) >= FEWEST_IMAGES and _is_counted(each)}
    counts = np.bincount([label for label, *_ in found], minlength=1)
    return {key for key in found if counts[key[0]] >= FEWEST_SERIES}


def _is_counted(numbers: set[int]) -> bool:
    """Whether numbers go up by one step, with no more than half of them lacking."""
    first, last = min(numbers), max(numbers)
    step = math.gcd(*(number - first for number in numbers))
    return (last - first) // step < 2 * len(numbers)
