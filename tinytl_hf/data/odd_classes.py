"""Names of classes that are likely no classes of their own: what a run says of them before it trains."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence

from tinytl_hf.data.found import named

# What programs write where there is no label: Python, pandas, R, SQL and Excel.
MISSING = {"nan", "NaN", "None", "NA", "N/A", "#N/A", "<NA>", "null", "NULL", "?", "unlabeled", "unlabelled"}
UNKNOWN = {"-1", "-1.0"}  # the same, where classes are numbers from 0 on
# What systems put behind the name of a copy: Windows, macOS, downloads.
OF_A_COPY = re.compile(r"( - copy)?( \(\d+\))?|( copy)( \d+)?", re.I)
NUMBER = re.compile(r"\d+(\.0+)?")
BETWEEN = re.compile(r"[,;|]")


def about_names(names: Sequence[str]) -> list[str]:
    """What may surprise of the names of classes."""
    lines = [
        f"{_quoted(group)} are classes of their own, though only capitals, spaces or zeros tell them apart; if they "
        "are one, give them one name"
        for group in _alike(names)
    ]
    lines += [
        f"{_quoted(group)}: the name of the second is as that of a copy; if they are one class, put them together"
        for group in _copies(names)
    ]
    if missing := _missing(names):
        lines.append(f"{_quoted(missing)}: taken as a class; leave such images out if it says that they have no label")
    if joined := _joined(names):
        lines.append(
            f"{_quoted(joined)}: taken as a class of its own, beside those that it names; an image has one class here"
        )
    return lines


def _quoted(names: Sequence[str]) -> str:
    return named([repr(name) for name in names])


def _alike(names: Sequence[str]) -> list[list[str]]:
    """Names that differ in capitals, spaces, zeros in front, or in marks that nobody sees, alone."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        shown = "".join(letter for letter in name if unicodedata.category(letter) != "Cf")
        words = unicodedata.normalize("NFKC", shown).casefold().split()
        groups[" ".join(word.lstrip("0") if word.isdecimal() else word for word in words)].append(name)
    return [group for group in groups.values() if len(group) > 1]


def _copies(names: Sequence[str]) -> list[tuple[str, str]]:
    """Names with those that are called as their copies, as ``cat`` and ``cat (1)``."""
    known, lengths = set(names), {len(name) for name in names} - {0}
    pairs = [(name[:end], name) for name in names for end in lengths if end < len(name) and name[:end] in known]
    return [(name, copy) for name, copy in pairs if OF_A_COPY.fullmatch(copy[len(name) :])]


def _missing(names: Sequence[str]) -> list[str]:
    """Those that say that there is no label."""
    others = [name for name in names if name not in UNKNOWN]
    of_numbers = len(others) > 1 and all(NUMBER.fullmatch(name) for name in others)
    return [name for name in names if name in MISSING or (of_numbers and name in UNKNOWN)]


def _joined(names: Sequence[str]) -> list[str]:
    """Those that are put together from others, as ``cat|dog`` or ``['cat', 'dog']`` where images have several."""
    parts = {name: [part.strip(" \"'[]") for part in BETWEEN.split(name)] for name in names}
    single = {each[0] for each in parts.values() if len(each) == 1}
    return [name for name, each in parts.items() if len(each) > 1 and single.issuperset(each)]
