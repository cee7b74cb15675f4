"""What the ``.tar`` files of a WebDataset must be like, of which the library datasets makes a table.

The files of a sample have one name up to the first dot, and what is behind that dot is their column.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from itertools import islice, pairwise

from tinytl_hf.data.find import suffix_of
from tinytl_hf.data.found import named
from tinytl_hf.data.images import IMAGE_SUFFIXES
from tinytl_hf.errors import TinyTLError

LOOKED_AT = 200  # files in each .tar, of which there can be a million
MOST_COLUMNS = 20  # a sample has some files, not that many
CLASS = ".cls"
LONGEST_CLASS = 200  # bytes of a number, and of the spaces around it


def check_tars(files: Sequence[str]) -> None:
    """Raise if images would get into columns of their own, or be lost, by the first files in each ``.tar``.

    Raises:
        TinyTLError: With what to call the files.
    """
    seen: dict[str, str] = {}  # columns, with a file of each
    keys: dict[str, set[str]] = {}  # the names that columns of images have
    for file in files:
        for name in _look_into(file):
            column = name.rpartition("/")[2].partition(".")[2]
            seen.setdefault(column, f"{name} in {file}")
            if f".{column.lower()}" in IMAGE_SUFFIXES:
                keys.setdefault(column, set()).add(f"{file}/{name[: -len(column)]}")
        if len(seen) > MOST_COLUMNS:
            raise TinyTLError(
                f"{next(iter(seen.values()))}: in a .tar, what is behind the first dot of a name says what a file "
                "holds, the same for each sample; write the files with - in place of the other dots"
            )
    if any(one.isdisjoint(other) for one, other in pairwise(keys.values())):
        raise TinyTLError(
            f"images are called .{' and .'.join(keys)} ({named([seen[column] for column in keys])}), and of a "
            ".tar each of these is a column; give all images one suffix, or name the files of one"
        )


def _look_into(file: str) -> list[str]:
    """Names of the first files in a ``.tar``; of a damaged one, those before the damage."""
    names = []
    try:
        with tarfile.open(file) as content:
            for member in islice(content, LOOKED_AT):
                if member.isfile() and not member.name.rpartition("/")[2].startswith("."):
                    names.append(member.name)
                    _check_class(content, member, file)
    except (OSError, tarfile.TarError):  # who reads all of it says what is wrong
        pass
    return names


def _check_class(content: tarfile.TarFile, member: tarfile.TarInfo, file: str) -> None:
    if suffix_of(member.name) != CLASS or (held := content.extractfile(member)) is None:
        return
    text = held.read(LONGEST_CLASS)  # a file of holes is as long as it says
    try:
        if member.size > LONGEST_CLASS:
            raise ValueError
        int(text)
    except ValueError:
        raise TinyTLError(
            f"{member.name} in {file}: it holds {text[:50].decode(errors='replace')!r}, and .cls files hold whole "
            "numbers; call files with the names of classes .txt"
        ) from None
