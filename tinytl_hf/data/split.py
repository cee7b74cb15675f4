"""The images of one split with their classes, undecoded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from tinytl_hf.data.roles import HOLDOUT

READ_WHOLE = 256_000_000  # bytes of images, which a disk reads and a core hashes in a second or so
READ_AT_ONCE = 256  # images


@dataclass(frozen=True)
class Split:
    """Encoded images and their class numbers.

    Attributes:
        name: The split's name, for messages.
        rows: The images, undecoded, in the column ``image``.
        labels: Class number of each image.
        label_names: Names of the classes.
        image_column: The column that the images are from.
        label_column: The column that the labels are from.
        numbers: Number of each image's row in the split as the data set has it.
        held_out: Whether it is the part of that split which is held out of training.
    """

    name: str
    rows: datasets.Dataset
    labels: np.ndarray
    label_names: list[str]
    image_column: str
    label_column: str
    numbers: np.ndarray
    held_out: bool = False

    @property
    def title(self) -> str:
        """What to write in ``data.eval_split`` to get this split."""
        return HOLDOUT if self.held_out else self.name

    def select(self, index: np.ndarray) -> Split:
        """The images at ``index``."""
        return replace(self, rows=self.rows.select(index), labels=self.labels[index], numbers=self.numbers[index])

    def images(self, index: np.ndarray) -> Iterator[dict[str, Any] | None]:
        """The undecoded images at ``index``, of which a few are in memory at a time."""
        for start in range(0, len(index), READ_AT_ONCE):
            yield from self.rows[index[start : start + READ_AT_ONCE]]["image"]

    def occurring(self) -> list[str]:
        """Names of the classes that have an image."""
        return [self.label_names[number] for number in np.unique(self.labels)]


def contents(split: Split, rows: np.ndarray) -> Iterator[bytes]:
    """The image files of some rows; nothing for one that is not there."""
    for image in split.images(rows):
        if image is not None and image["bytes"] is not None:
            yield image["bytes"]
        elif image is not None and Path(image["path"]).is_file():
            yield Path(image["path"]).read_bytes()
        else:
            yield b""
