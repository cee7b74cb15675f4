"""What lies in a folder: image files, tables, metadata, and what is left out and why."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tinytl_hf.data.find import ARCHIVES, TABLES, suffix_of
from tinytl_hf.data.found import LeftOut, named
from tinytl_hf.data.images import HEIF_SUFFIXES, IMAGE_SUFFIXES, UNREAD_SUFFIXES

logger = logging.getLogger(__name__)

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# What this package writes: a folder with all these names in it, of which the first holds this text, is a run's, an
# adapter's or a comparison's.
OURS = (
    (("config.yaml", "metrics.jsonl"), "\nlite:"),
    (("adapter_config.json", "adapter_model.safetensors"), "format_version"),
    (("compare.json", "compare.csv", "compare.md"), '"method"'),
)
# What downloads and other programs make of an image's suffix: .jpg?w=300, .jpg_large, .jpg.1, .jpg~, .jpg.part
MORE_BEHIND = re.compile(r"(\.[a-z0-9]+)(?:[^a-z0-9.][^.]*|\.(\d*|part(ial)?|(cr)?download|tmp|bak|old|orig))$")
LISTS = (".txt", ".lst")
NOT_HERE = ".icloud"  # macOS has .1.jpg.icloud in place of a 1.jpg that lies in the cloud alone
NEVER = {".git"}  # not even counted
# What Windows, macOS, Linux, Python and the network storages of Synology and QNAP make beside what people put there,
# in small letters. Those with a dot in front are hidden.
OF_SYSTEMS = {
    *("$recycle.bin", "system volume information", "found.000", "__macosx", "lost+found", "__pycache__"),
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"),
}


@dataclass
class Listing:
    """The files below a folder, by their paths relative to it, with ``/`` and sorted.

    Attributes:
        root: The folder.
        images: Image files that Pillow reads.
        metadata: ``metadata.csv`` and the like.
        tables: Files that can hold a table, but for metadata.
        archives: Files that are to be unpacked first.
        lists: Text files.
        almost_metadata: Metadata files without a column ``file_name``, with the column that was likely meant.
        left_out: Files that are left out.
    """

    root: Path
    images: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    archives: list[str] = field(default_factory=list)
    lists: list[str] = field(default_factory=list)
    almost_metadata: dict[str, str] = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=LeftOut)


@dataclass(frozen=True)
class _Place:
    """A folder on the way.

    Attributes:
        prefix: Its path relative to the root, with a ``/`` at the end; the root's is empty.
        real: Where it really is.
        is_link: Whether it is a link.
        around: Where the folders that it was reached through really are.
        in_link: Whether one of those is a link.
    """

    prefix: str
    real: str
    is_link: bool = False
    around: tuple[str, ...] = ()
    in_link: bool = False

    def below(self, entry: os.DirEntry[str]) -> _Place:
        """A folder in it."""
        is_link = entry.is_symlink()
        real = os.path.realpath(entry.path) if is_link else os.path.join(self.real, entry.name)
        around, in_link = (*self.around, self.real), self.in_link or self.is_link
        return _Place(f"{self.prefix}{entry.name}/", real, is_link, around, in_link)

    @property
    def leads_back(self) -> bool:
        """Whether a folder that it was reached through is it, or lies in it."""
        return any(f"{each}/".startswith(f"{self.real}/") for each in self.around)


def list_folder(root: Path) -> Listing:
    """List a folder and all folders below it, through links too.

    A link is followed to wherever it leads but to a folder that it lies in. Within what a link leads to, only links to
    what was not listed before are followed, as there is no end of ways through links to one another.

    Raises:
        OSError: The folder itself cannot be read.
    """
    start = _Place("", os.path.realpath(root))
    listing, seen = Listing(root), {start.real}
    visited: list[str] = []
    twice: list[str] = []
    ours: list[str] = []
    folders = [start]  # those to come, the next one last
    while folders:
        place = folders.pop()
        inside = _entries(listing, place.prefix)
        if inside is None:
            continue
        if place.prefix and is_ours(root / place.prefix, {entry.name for entry in inside}):
            listing.left_out.add("folder written by tinytl-hf", place.prefix)
            ours.append(place.prefix)
            continue
        visited.append(place.prefix)
        below = []
        for folder in _add_files(listing, place, inside):
            if _is_followed(folder, seen, listing):
                if folder.real in seen and not folder.prefix.startswith(tuple(twice)):
                    twice.append(folder.prefix)
                seen.add(folder.real)
                below.append(folder)
        folders += reversed(below)
    if twice:
        folders_twice = named([prefix.rstrip("/") for prefix in twice])
        logger.warning("%s: a link makes this folder a part of the data set twice", folders_twice)
    _say_empty_folders(listing, [prefix for prefix in visited if not any(each.startswith(prefix) for each in ours)])
    for files in (listing.images, listing.metadata, listing.tables, listing.archives, listing.lists):
        files.sort()
    return listing


def _add_files(listing: Listing, place: _Place, inside: list[os.DirEntry[str]]) -> Iterator[_Place]:
    """Add the files of a folder to the listing, and give the folders in it."""
    for entry in inside:
        path = place.prefix + entry.name
        if entry.is_symlink() and not os.path.exists(entry.path):
            if not _is_hidden(path):
                listing.left_out.add("broken link", path)
        elif entry.is_dir():
            if is_of_system(entry.name):
                listing.left_out.add(f"folder {entry.name} of a system or tool", path)
            elif entry.name not in NEVER:
                yield place.below(entry)
        elif entry.is_file():
            _add(listing, path, entry)
        else:
            listing.left_out.add("that is no file", path)  # a pipe would be waited for, for ever


def is_of_system(folder: str) -> bool:
    """Whether a folder of that name is made by a system or tool, and is no person's."""
    return folder.lower() in OF_SYSTEMS


def _is_followed(folder: _Place, seen: set[str], listing: Listing) -> bool:
    """Whether to list a folder that may be a link."""
    if not folder.is_link:
        return True
    if folder.leads_back:  # it would be followed for ever, and has nothing new
        return False
    if folder.in_link and folder.real in seen:
        listing.left_out.add("link to a folder that is listed already", folder.prefix.rstrip("/"))
        return False
    return True


def is_ours(folder: Path, names: set[str]) -> bool:
    """Whether this package wrote a folder that holds those names."""
    found = [(folder / ours[0], mark) for ours, mark in OURS if names.issuperset(ours)]
    return any(file.is_file() and mark in file.read_text(encoding="utf-8", errors="replace") for file, mark in found)


def _entries(listing: Listing, prefix: str) -> list[os.DirEntry[str]] | None:
    """What a folder holds, by name; None: it is below the root and cannot be read, so it is left out."""
    try:
        with os.scandir(listing.root / prefix) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        if not prefix:
            raise
        listing.left_out.add("folder that cannot be read", prefix)
        return None


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _say_empty_folders(listing: Listing, prefixes: list[str]) -> None:
    """Name folders without an image beside those that have some: a class that is still empty is no class."""
    holders = {os.path.dirname(path) for path in listing.images}
    holders |= {str(parent) for folder in holders for parent in PurePosixPath(folder).parents} - {"."}
    if not holders:
        return
    for folder in (prefix.rstrip("/") for prefix in prefixes):
        if folder and not _is_hidden(folder) and folder not in holders and os.path.dirname(folder) in {"", *holders}:
            listing.left_out.add("folder without images", folder)


def _add(listing: Listing, path: str, entry: os.DirEntry[str]) -> None:
    suffix = suffix_of(entry.name)
    is_image = suffix in IMAGE_SUFFIXES
    if _is_hidden(path):
        if is_image or suffix == NOT_HERE:
            listing.left_out.add("hidden", path)
    elif suffix in UNREAD_SUFFIXES:
        fix = "; pip install pillow-heif reads them" if suffix in HEIF_SUFFIXES else ""
        listing.left_out.add(suffix, f"{path}{fix}")
    elif is_image and not _is_utf8(path):
        listing.left_out.add("with a name that is not UTF-8", os.fsencode(path).decode("utf-8", "backslashreplace"))
    elif is_image:
        listing.images.append(path)
    elif entry.name.lower() in METADATA:
        listing.metadata.append(path)
    elif suffix in TABLES:
        listing.tables.append(path)
    elif suffix in ARCHIVES:
        listing.archives.append(path)
    elif suffix in LISTS:
        listing.lists.append(path)
    elif not suffix and "/" in path:
        listing.left_out.add("without a suffix", path)
    elif (cut := MORE_BEHIND.search(entry.name.lower())) and cut[1] in IMAGE_SUFFIXES:
        listing.left_out.add(f"with more behind {cut[1]}", path)


def _is_utf8(path: str) -> bool:
    """Whether a path is UTF-8, as tables want it."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
