"""What lies in a folder: image files, tables, metadata, and what is left out and why."""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tinytl_hf.data.find import ARCHIVES, TABLES
from tinytl_hf.data.images import HEIF_SUFFIXES, IMAGE_SUFFIXES, UNREAD_SUFFIXES

logger = logging.getLogger(__name__)

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# A folder with all names of one of these was written by this package: a run, an adapter, or a comparison.
OURS = (
    {"config.yaml", "metrics.jsonl"},
    {"adapter_config.json", "adapter_model.safetensors"},
    {"compare.json", "compare.csv", "compare.md"},
)
NEVER = {".git", "__MACOSX", "@eaDir"}  # not even counted


@dataclass
class Listing:
    """The files below a folder, by their paths relative to it, with ``/`` and sorted.

    Attributes:
        root: The folder.
        images: Image files that Pillow reads.
        metadata: ``metadata.csv`` and the like.
        tables: Files that can hold a table, but for metadata.
        archives: Files that are to be unpacked first.
        left_out: How many files are left out, by the reason.
        examples: One of them for each reason.
    """

    root: Path
    images: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    archives: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def leave_out(self, reason: str, path: str, count: int = 1) -> None:
        """Count files that are left out."""
        self.left_out[reason] += count
        self.examples.setdefault(reason, path)


@dataclass(frozen=True)
class _Place:
    """A folder on the way.

    Attributes:
        prefix: Its path relative to the root, with a ``/`` at the end; the root's is empty.
        around: Where it and the folders that it was reached through really are.
        in_link: Whether one of them is a link.
    """

    prefix: str
    around: frozenset[str]
    in_link: bool = False

    def below(self, name: str, real: str, is_link: bool) -> _Place:
        """A folder in it."""
        return _Place(f"{self.prefix}{name}/", self.around | {real}, self.in_link or is_link)

    def is_below(self, real: str) -> bool:
        """Whether it lies in that folder, or is it."""
        return any(f"{each}/".startswith(f"{real}/") for each in self.around)


def list_folder(root: Path) -> Listing:
    """List a folder and all folders below it, through links too.

    A link is followed to wherever it leads but to a folder that it lies in. Within what a link leads to, only links to
    what was not listed before are followed, as there is no end of ways through links to one another.

    Raises:
        OSError: The folder itself cannot be read.
    """
    listing, seen = Listing(root), {os.path.realpath(root)}
    visited: list[str] = []
    twice: list[str] = []
    folders = [_Place("", frozenset(seen))]  # those to come, the next one last
    while folders:
        place = folders.pop()
        inside = _entries(listing, place.prefix)
        names = {entry.name for entry in inside}
        if place.prefix and any(names >= ours for ours in OURS):
            listing.leave_out("folder written by tinytl-hf", place.prefix)
            continue
        visited.append(place.prefix.rstrip("/"))
        below = []
        for entry in inside:
            path, is_link = place.prefix + entry.name, entry.is_symlink()
            if is_link and not os.path.exists(entry.path):
                if not _is_hidden(path):
                    listing.leave_out("broken link", path)
            elif not entry.is_dir():
                _add(listing, path, entry)
            elif entry.name not in NEVER:
                real = os.path.realpath(entry.path) if is_link else os.path.join(root, path)
                if is_link and place.is_below(real):
                    continue  # a link back would be followed for ever, and has nothing new
                if is_link and place.in_link and real in seen:
                    listing.leave_out("link to a folder that is listed already", path)
                    continue
                twice += [path] if real in seen else []
                seen.add(real)
                below.append(place.below(entry.name, real, is_link))
        folders += reversed(below)
    if twice:
        logger.warning("%s: a link makes this folder a part of the data set twice", ", ".join(twice[:5]))
    _say_empty_folders(listing, visited)
    for files in (listing.images, listing.metadata, listing.tables, listing.archives):
        files.sort()
    return listing


def _entries(listing: Listing, prefix: str) -> list[os.DirEntry[str]]:
    """What a folder holds, by name; one below the root that cannot be read is left out."""
    try:
        with os.scandir(listing.root / prefix) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        if not prefix:
            raise
        listing.leave_out("folder that cannot be read", prefix)
        return []


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _say_empty_folders(listing: Listing, visited: list[str]) -> None:
    """Name folders without an image beside those that have some: a class that is still empty is no class."""
    holders = {os.path.dirname(path) for path in listing.images}
    holders |= {str(parent) for folder in holders for parent in PurePosixPath(folder).parents} - {"."}
    if not holders:
        return
    for folder in visited:
        if folder and not _is_hidden(folder) and folder not in holders and os.path.dirname(folder) in {"", *holders}:
            listing.leave_out("folder without images", folder)


def _add(listing: Listing, path: str, entry: os.DirEntry[str]) -> None:
    suffix = os.path.splitext(entry.name)[1].lower()
    is_image = suffix in IMAGE_SUFFIXES
    if _is_hidden(path):
        if is_image:
            listing.leave_out("hidden", path)
    elif suffix in UNREAD_SUFFIXES:
        fix = "; pip install pillow-heif reads them" if suffix in HEIF_SUFFIXES else ""
        listing.leave_out(suffix, f"{path}{fix}")
    elif is_image and not _is_text(path):
        listing.leave_out("with a name that is not UTF-8", os.fsencode(path).decode("utf-8", "backslashreplace"))
    elif is_image:
        listing.images.append(path)
    elif entry.name.lower() in METADATA:
        listing.metadata.append(path)
    elif suffix in TABLES:
        listing.tables.append(path)
    elif suffix in ARCHIVES:
        listing.archives.append(path)
    elif not suffix and "/" in path:
        listing.leave_out("without a suffix", path)


def _is_text(path: str) -> bool:
    """Whether a path is UTF-8, as tables want it."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
