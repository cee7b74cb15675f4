"""Images that are, by their names, copies of others: changed ones (``1_flip.jpg`` of ``1.jpg``), or other formats."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

from tinytl_hf.data.columns import image_paths
from tinytl_hf.data.split import Split
from tinytl_hf.words import counted

# What programs that write changed copies of images put into their names, such as 90deg, flipLR, rotated, aug_3.
_CHANGE = (
    r"(new)?(\d+ ?deg(rees?)?|rot(at(ed?|ion))?|([hv]|lr|ud)?[-_]?flip(ped)?([-_]?([hv]|lr|tb|ud))?|mirror(ed)?|"
    r"aug(mented|mentation)?|crop(ped)?|nois[ey]|blur(red|ry)?|bright(ness|er)?|dark(er)?|contrast|shear(ed)?|"
    r"zoom(ed)?|shift(ed)?|jitter(ed)?)([-_ ]?\d+)?"
)
BEHIND = re.compile(rf"([-_ ]{_CHANGE})({_CHANGE}|[-_ ]{_CHANGE})*$", re.I)
BEFORE = re.compile(rf"^{_CHANGE}[-_ ]+(?=.)", re.I)
OF_ROBOFLOW = re.compile(r"(_(jpe?g|png|bmp|webp|tiff?))?\.rf\.[0-9a-z]+$", re.I)  # on all images of its exports


def about_changed_copies(train: Split, evaluated: Sequence[Split]) -> list[str]:
    """What to say of images to evaluate on of which, by their names, a changed copy is trained on."""
    known: dict[tuple[int, str], list[str]] = {}
    for label, path in _labelled_paths(train):
        if path is not None:
            known.setdefault((label, original_name(path)), []).append(path)
    lines = []
    for split in evaluated:
        pairs = [
            (path, other)
            for label, path in _labelled_paths(split)
            if path is not None and (other := _copy_of(path, known.get((label, original_name(path)), ())))
        ]
        if pairs:
            lines.append(
                f"{len(pairs):,} of the {counted(len(split.labels), 'image')} of {split.title} "
                f"{'is' if len(pairs) == 1 else 'are'}, by the names, changed copies of images that are trained on "
                f"({' and '.join(pairs[0])}), so that the figures are too good; keep an image and its copies in one "
                "split, or take the copies away"
            )
    return lines


def copies_by_names(split: Split) -> list[list[int]]:
    """Positions of images that are copies of one another by their names: changed, or in another format (``1.png``)."""
    changed: dict[tuple[int, str], list[int]] = {}
    formats: dict[tuple[int, str], list[int]] = {}
    paths: list[str | None] = []
    for number, (label, path) in enumerate(_labelled_paths(split)):
        paths.append(path)
        if path is not None:
            changed.setdefault((label, original_name(path)), []).append(number)
            formats.setdefault((label, os.path.splitext(path)[0]), []).append(number)
    # Images of one name in several folders are no copies, and tables can call all of theirs alike.
    groups = [group for group in changed.values() if len({_stem(paths[number] or "") for number in group}) > 1]
    return groups + [group for group in formats.values() if len(group) == len({paths[number] for number in group}) > 1]


def original_name(path: str) -> str:
    """What an image is called, without what says that it was changed, and in small letters."""
    name = OF_ROBOFLOW.sub("", _stem(path))
    return (BEFORE.sub("", BEHIND.sub("", name)) or name).lower()


def _copy_of(path: str, others: Sequence[str]) -> str | None:
    """Of images with the same original name, one that is called otherwise."""
    return next((other for other in others if _stem(other) != _stem(path)), None)


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _labelled_paths(split: Split) -> Iterator[tuple[int, str | None]]:
    return zip(split.labels.tolist(), image_paths(split.rows), strict=True)
