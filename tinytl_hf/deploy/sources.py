"""The images that the arguments of ``predict`` stand for: files, folders, patterns and standard input."""

from __future__ import annotations

import glob
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinytl_hf.data.images import IMAGE_SUFFIXES
from tinytl_hf.data.listing import NEVER, is_of_system, is_ours
from tinytl_hf.disk import expanded, path_of
from tinytl_hf.words import counted

logger = logging.getLogger(__name__)

STANDARD_INPUT = "-"
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass(frozen=True)
class Source:
    """An image that is to be labelled.

    Attributes:
        name: What to call it: its path, or what the user typed.
        encoded: The undecoded image, as :func:`tinytl_hf.data.images.decode_pixels` takes it.
        problem: Why there is none, or None.
    """

    name: str
    encoded: dict[str, Any] | None = None
    problem: str | None = None


def find_images(name: str) -> list[Source]:
    """The images that an argument stands for: of folders those in them, however deep, else the one of that name."""
    if name == STANDARD_INPUT and sys.stdin is None:
        return [Source(name, problem="standard input is closed")]
    if name == STANDARD_INPUT:
        return [Source(name, {"bytes": sys.stdin.buffer.read(), "path": None})]
    name = path_of(name)
    if URL.match(name):
        return [
            Source(name, problem="it is a URL; download it, or hand it over: curl -sL URL | tinytl-hf predict ... -")
        ]
    if not name.strip():
        return [Source(name, problem="it is empty, as of a variable that is not set; name an image or a folder")]
    try:
        path = expanded(name)
        if path.is_dir():
            found = images_in(path)
            return [_of_file(file) for file in found] or [Source(str(path), problem="no image in this folder")]
        matches = [] if path.exists() else glob.glob(str(path), recursive=True)
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, a circle of links, no such ~user
        return [Source(name, problem=str(error))]
    files = _matched(path, matches)
    return [_of_file(file) for file in files] or [_of_file(str(path))]


def _matched(pattern: Path, matches: list[str]) -> list[str]:
    """The images that a pattern matches, and those in folders that it matches."""
    of_systems = [match for match in matches if any(map(is_of_system, {*Path(match).parts} - {*pattern.parts}))]
    if of_systems:
        logger.info("%s: left out: %s in folders of a system or tool", pattern, f"{len(of_systems):,}")
    matches = sorted(set(matches) - set(of_systems))
    files = [match for match in matches if os.path.isfile(match)]
    if "**" in str(pattern):  # links can lead in circles
        files = sorted({os.path.realpath(file): file for file in reversed(files)}.values())
    if "**" not in str(pattern) or not files:  # which gives the files in folders by itself
        files += [file for match in matches if os.path.isdir(match) for file in images_in(Path(match))]
    return files


def _of_file(path: str) -> Source:
    return Source(path, {"bytes": None, "path": path})


def images_in(folder: Path) -> list[str]:
    """Paths of the images in a folder and those below it, links included; what is left out is counted and said."""
    found: list[str] = []
    left_out: Counter[str] = Counter()
    for place, names in _walk(folder, left_out):
        for name in names:
            path, suffix = os.path.join(place, name), os.path.splitext(name)[1].lower()
            if name.startswith("."):
                left_out["hidden"] += 1
            elif suffix not in IMAGE_SUFFIXES:
                left_out[suffix or "without a suffix"] += 1
            elif not os.path.isfile(path):
                left_out["broken link"] += 1
            else:
                found.append(path)
    if left_out:
        parts = ", ".join(f"{count:,} {what}" for what, count in left_out.most_common())
        logger.info("%s: %s; left out: %s", folder, counted(len(found), "image"), parts)
    return sorted(found)


def _walk(folder: Path, left_out: Counter[str]) -> Iterator[tuple[str, list[str]]]:
    """Folders that are not hidden with the names of their files, each once, also where links lead in a circle."""
    seen: set[tuple[int, int]] = set()

    def say(error: OSError) -> None:
        logger.warning("%s cannot be read (%s): left out", error.filename, error.strerror)

    for place, below, names in os.walk(folder, onerror=say, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        if place != str(folder) and is_ours(Path(place), {*below, *names}):
            left_out["folder written by tinytl-hf"] += 1
            below.clear()
            continue
        left_out.update(f"folder {name} of a system or tool" for name in below if is_of_system(name))
        left_out.update("hidden folder" for name in below if name.startswith(".") and name not in NEVER)
        below[:] = [name for name in below if not name.startswith(".") and not is_of_system(name)]
        yield place, names
