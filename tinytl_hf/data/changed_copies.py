"""Images that are, by their names, copies of others: changed ones (``1_flip.jpg`` of ``1.jpg``), or other formats."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from tinytl_hf.config.check import LONGEST_NAME
from tinytl_hf.data.columns import image_paths
from tinytl_hf.data.split import Split
from tinytl_hf.words import counted

logger = logging.getLogger(__name__)

# What programs that write changed copies of images put into their names, such as 90deg, flipLR, aug_3, crop_12_0.
_CHANGE = (
    r"(new)?(\d+ ?deg(rees?)?|rot(at(ed?|ion))?|([hv]|lr|ud)?[-_]?flip(ped)?([-_]?([hv]|lr|tb|ud))?|mirror(ed)?|"
    r"aug(mented|mentation)?|crop(ped)?|nois[ey]|blur(red|ry)?|bright(ness|er)?|dark(er)?|contrast|shear(ed)?|"
    r"zoom(ed)?|shift(ed)?|jitter(ed)?)([-_ ]?\d+([-_ ]\d+)?)?"
)
APART = "-_ "
BEHIND = re.compile(rf"[{APART}]?{_CHANGE}$", re.I)
BEFORE = re.compile(rf"^{_CHANGE}[-_ ]+(?=.)", re.I)
OF_CHANGED = re.compile(  # folders
    r"(originals?|thumb(nail)?s?|resized|aug(mented|mentations?)?|flipped|mirrored|rotated|cropped)([-_ ]?\d+)?", re.I
)
MOST_COPIES = 20  # of an image that is not there itself: more are likely none
OF_ROBOFLOW = re.compile(r"(_(jpe?g|png|bmp|webp|tiff?))?\.rf\.[0-9a-z]+$", re.I)  # on all images of its exports


def about_changed_copies(train: Split, evaluated: Sequence[Split]) -> list[str]:
    """What to say of images to evaluate on of which, by their names, a changed copy is trained on."""
    trained = list(_labelled_paths(train))
    lines = []
    for split in evaluated:
        images = [*trained, *_labelled_paths(split)]
        pairs = []
        for group in _by_original(images, say=False):
            ours = [str(images[number][1]) for number in group if number >= len(trained)]
            theirs = [str(images[number][1]) for number in group if number < len(trained)]
            if not _is_in_several_folders(ours) and not _is_in_several_folders(theirs):
                pairs += [(path, other) for path in ours if (other := _copy_of(path, theirs))]
        if pairs:
            lines.append(
                f"{len(pairs):,} of the {counted(len(split.labels), 'image')} of {split.title} "
                f"{'is' if len(pairs) == 1 else 'are'}, by the names, changed copies of images that are trained on "
                f"({' and '.join(pairs[0])}), so that the figures are too good; keep an image and its copies in one "
                "split, or take the copies away"
            )
    return lines


def copies_by_names(split: Split, files: np.ndarray) -> list[list[int]]:
    """Positions of images that are copies of one another by their names: changed, or in another format (``1.png``).

    Names that are in several folders (``p1/left.jpg``, ``p2/left.jpg``) are told apart by those, unless they are
    called as changes are (``augmented/1.jpg`` of ``1.jpg``). Where a table calls several images alike, names say
    nothing.

    Args:
        split: The images.
        files: ``[N]`` for each image a number that only the same file has.
    """
    images = list(_labelled_paths(split))
    found = []
    for group in _by_original(images, say=True):
        parts: dict[str, list[int]] = {}
        apart = _is_in_several_folders([str(images[number][1]) for number in group])
        for number in group:
            parts.setdefault(_folder(str(images[number][1])) if apart else "", []).append(number)
        for part in parts.values():
            paths = {images[number][1] for number in part}
            if len(paths) > 1 and len(paths) == len({(images[number][1], files[number]) for number in part}):
                found.append(part)
    return found


def original_name(path: str) -> str:
    """What an image is called, without what says that it was changed."""
    if len(stem := _stem(path)) > LONGEST_NAME:  # a table can say anything of an image that is in it
        return stem
    name = OF_ROBOFLOW.sub("", stem)
    return BEFORE.sub("", _without_what_is_behind(name)) or name


def _without_what_is_behind(name: str) -> str:
    """A name without the changes behind it, of which the first is set apart (``cat_flip90deg``).

    One pattern for all of them would try each way to share a long name out among them, which can take for ever.
    """
    if BEHIND.search(name) is None:
        return name
    starts, first = [len(name)], len(name)  # where there are changes, and no more than those, up to the end
    for start in reversed(range(len(name))):
        if any(BEHIND.fullmatch(name, start, end) for end in starts):
            starts.append(start)
            first = start if name[start] in APART else first
    return name[:first]


def _by_original(images: Sequence[tuple[int, str | None]], say: bool) -> list[list[int]]:
    """Positions of images, given by label and path, of one class and one original name; two or more.

    Numbers behind a change can count images, not copies: ``wheat_crop_001`` to ``wheat_crop_200``. They do if there
    are many of a name that no image has, and few such names in a class.
    """
    groups: dict[tuple[int, str], list[int]] = {}
    for number, (label, path) in enumerate(images):
        if path is not None:
            groups.setdefault((label, original_name(path)), []).append(number)
    groups = {key: group for key, group in groups.items() if len(group) > 1}
    stems = {key: {_stem(str(images[number][1])) for number in group} for key, group in groups.items()}
    lacking = [key for key in groups if len(stems[key]) > 1 and key[1] not in stems[key]]
    names = Counter(label for label, _ in lacking)
    counts = {key for key in lacking if len(stems[key]) > max(MOST_COPIES, names[key[0]])}
    if counts and say:
        first, last = min(stems[min(counts)]), max(stems[min(counts)])
        logger.warning(
            "%s: named as many changed copies of a few images would be (%s to %s), and taken as images of their own; "
            "if they are copies, put those of some of these few into a split of their own",
            *(counted(sum(len(groups[key]) for key in counts), "image"), first, last),
        )
    return [group for key, group in groups.items() if key not in counts]


def _is_in_several_folders(paths: Sequence[str]) -> bool:
    """Whether a name, without its suffix, is in several folders."""
    return len({os.path.splitext(path)[0] for path in paths}) > len({_stem(path) for path in paths})


def _folder(path: str) -> str:
    """The folder of an image, without those that are called as changes are."""
    return "/".join(part for part in os.path.dirname(path).split("/") if not OF_CHANGED.fullmatch(part))


def _copy_of(path: str, others: Sequence[str]) -> str | None:
    """Of images with the same original name, one that is called otherwise."""
    return next((other for other in others if _stem(other) != _stem(path)), None)


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _labelled_paths(split: Split) -> Iterator[tuple[int, str | None]]:
    return zip(split.labels.tolist(), image_paths(split.rows), strict=True)
