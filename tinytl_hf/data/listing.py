"""What lies in a folder: image files, tables, metadata, and what is left out and why."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tinytl_hf.data.find import ARCHIVES, TABLES
from tinytl_hf.data.images import HEIF_SUFFIXES, IMAGE_SUFFIXES, UNREAD_SUFFIXES

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# A folder with all names of one of these was written by this package: a run, or an adapter.
OURS = ({"config.yaml", "metrics.jsonl"}, {"adapter_config.json", "adapter_model.safetensors"})
NEVER = {".git", "__MACOSX"}  # not even counted


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


def list_folder(root: Path) -> Listing:
    """List a folder and all folders below it, through links too.

    Raises:
        OSError: A folder cannot be read.
    """
    listing, seen = Listing(root), {os.path.realpath(root)}
    visited: list[str] = []
    folders = [""]  # those to come, the next one last
    while folders:
        prefix = folders.pop()
        with os.scandir(root / prefix) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
        names = {entry.name for entry in inside}
        if prefix and any(names >= ours for ours in OURS):
            listing.leave_out("folder written by tinytl-hf", prefix)
            continue
        visited.append(prefix.rstrip("/"))
        below = []
        for entry in inside:
            path = prefix + entry.name
            if not entry.is_dir():
                _add(listing, path, entry)
            elif entry.name not in NEVER:
                place = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                if entry.is_symlink() and (place in seen or os.path.realpath(root).startswith(place + os.sep)):
                    continue  # a link back would be followed for ever
                seen.add(place)
                below.append(f"{path}/")
        folders += reversed(below)
    _say_empty_folders(listing, visited)
    for files in (listing.images, listing.metadata, listing.tables, listing.archives):
        files.sort()
    return listing


def _say_empty_folders(listing: Listing, visited: list[str]) -> None:
    """Name folders without an image beside those that have some: a class that is still empty is no class."""
    holders = {os.path.dirname(path) for path in listing.images}
    holders |= {str(parent) for folder in holders for parent in PurePosixPath(folder).parents} - {"."}
    if not holders:
        return
    for folder in visited:
        is_hidden = any(part.startswith(".") for part in folder.split("/"))
        if folder and not is_hidden and folder not in holders and os.path.dirname(folder) in {"", *holders}:
            listing.leave_out("folder without images", folder)


def _add(listing: Listing, path: str, entry: os.DirEntry[str]) -> None:
    suffix = os.path.splitext(entry.name)[1].lower()
    is_image = suffix in IMAGE_SUFFIXES
    if any(part.startswith(".") for part in path.split("/")):
        if is_image:
            listing.leave_out("hidden", path)
    elif suffix in UNREAD_SUFFIXES:
        fix = "; pip install pillow-heif reads them" if suffix in HEIF_SUFFIXES else ""
        listing.leave_out(suffix, f"{path}{fix}")
    elif is_image and not entry.is_file():
        listing.leave_out("broken link", path)
    elif is_image and not _is_text(path):
        listing.leave_out("with a name that is not UTF-8", os.fsencode(path).decode("utf-8", "backslashreplace"))
    elif is_image:
        listing.images.append(path)
    elif entry.name in METADATA:
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
