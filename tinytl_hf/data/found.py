"""What was found in a data set, in one line and for the files of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinytl_hf.words import counted

SHOWN = 5  # names that a line lists
NOUNS = ("folder", "broken link", "link", "line", "saved data set")  # that a reason to leave something out starts with
LONGEST = 300  # characters of a name in it: a column of paths can hold whole images as texts


class LeftOut(dict[str, int]):
    """How many files of a data set are left out, by the reason; as a text, with one file for each.

    Attributes:
        examples: That file, by the reason.
    """

    def __init__(self) -> None:
        super().__init__()
        self.examples: dict[str, str] = {}

    def add(self, reason: str, path: str, count: int = 1) -> None:
        """Count files, of which ``path`` is one."""
        self[reason] = self.get(reason, 0) + count
        self.examples.setdefault(reason, path)

    def __str__(self) -> str:
        parts = [f"{_with_count(count, reason)} ({self.examples[reason]})" for reason, count in self.items()]
        return f"left out: {', '.join(parts)}"


def _with_count(count: int, reason: str) -> str:
    """As ``2 folders without images`` and ``3 .heic``: a reason that starts with a noun says what is left out."""
    one = next((noun for noun in NOUNS if reason.startswith(noun)), None)
    return f"{count:,} {reason}" if one is None else f"{counted(count, one)}{reason.removeprefix(one)}"


@dataclass(frozen=True)
class Found:
    """What a data set holds, and what a run makes of it.

    Attributes:
        classes: Names of the classes.
        images: Number of images of each split.
        labels: The column that the labels are from, and of which file beside the images.
        left_out: The files that were left out.
        train: Name and number of images of the part to train on.
        evaluation: That to evaluate on after each epoch.
        test: That to evaluate on at the end, or None.
    """

    classes: Sequence[str]
    images: Mapping[str, int]
    labels: str
    left_out: LeftOut
    train: tuple[str, int]
    evaluation: tuple[str, int]
    test: tuple[str, int] | None

    def __str__(self) -> str:
        line = f"{len(self.classes)} classes ({named(self.classes)})"
        for number, (name, count) in enumerate(self.images.items()):
            unused = " (not used)" if name in self.not_used else ""
            line += f", {count:,} {'' if number else 'images '}in {name}{unused}"
        if self.labels != "label":
            line += f"; labels are from column {self.labels}"
        if self.left_out:
            line += f"; {self.left_out}"
        name, count = self.evaluation
        line += f"; training on {self.train[1]:,}, evaluating after each epoch on {count:,} ({name})"
        return line if self.test is None else f"{line}, and at the end on {self.test[1]:,} ({self.test[0]})"

    @property
    def not_used(self) -> list[str]:
        """Names of the splits that the run does not use."""
        used = {self.train[0], self.evaluation[0], self.test[0] if self.test else None}
        return [name for name in self.images if name not in used]

    def to_json(self) -> dict[str, Any]:
        """For ``eval_results.json``: it says nothing of the disk."""
        return {
            "classes": len(self.classes),
            "images": dict(self.images),
            "trained_on": list(self.train),
            "not_used": self.not_used,
            "label_column": self.labels,
            "left_out": dict(self.left_out),
        }


def named(names: Sequence[str], count: int | None = None, shown: int = SHOWN) -> str:
    """Names for a line: a few of many, ``count`` of them or as many as are given."""
    more = (count or len(names)) - shown
    half = LONGEST // 2
    listed = [name if len(name) <= LONGEST else f"{name[:half]}...{name[-half:]}" for name in names[:shown]]
    return ", ".join(listed) if more <= 0 else f"{', '.join(listed)} and {more:,} more"
