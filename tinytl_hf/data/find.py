"""Which source of data a name stands for; nothing that can be local is ever looked up on the Hub."""

from __future__ import annotations

import glob
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinytl_hf.disk import expanded, local_path, path_of
from tinytl_hf.errors import TinyTLError

logger = logging.getLogger(__name__)

Place = Literal["local", "hub", "url", "digits"]
DIGITS = "digits"
# By their suffix, what reads tables (a builder of the library datasets), the likeliest first; CSV and JSON are read
# here, see ``table_files.py``.
TABLES = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".tar": "webdataset",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "json",
    ".json": "json",
}
ARCHIVES = {".zip", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"}
ON_THE_HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class Source:
    """Where a data set is.

    Attributes:
        place: On this disk, on the Hub, at a URL, or in scikit-learn.
        name: The absolute path (or pattern of one), the name on the Hub, or the URL.
    """

    place: Place
    name: str


def find(name: str) -> Source:
    """Find what a data set's name stands for: what is on this disk comes first.

    Raises:
        TinyTLError: It can only be a path, and there is nothing.
    """
    name = path_of(name)
    if "://" in name:
        return Source("url", name)
    if not name.strip():
        raise TinyTLError(
            "data.dataset: missing; name a folder of images or a data set, as --data.dataset path/to/images"
        )
    path = _place_of(name)
    if path_exists(path):
        if name == DIGITS:
            logger.info("digits is the %s here, not scikit-learn's digits", "folder" if path.is_dir() else "file")
        return Source("local", str(path))
    if name == DIGITS:
        return Source("digits", name)
    if is_there(name):
        return Source("local", str(path))
    if not ON_THE_HUB.fullmatch(name) or suffix_of(name) in {*TABLES, *ARCHIVES}:
        raise TinyTLError(
            f"data.dataset={name}: cannot be loaded (there is no {path}); name a folder of images, a .parquet, .csv "
            "or .json file, a saved data set, a data set on the Hub, or digits"
        )
    return Source("hub", name)


def _place_of(name: str) -> Path:
    """The path of a folder, where it really lies, or of a file in its folder.

    A link to a file keeps its own name: what it leads to may have none (as in caches of the Hub or of DVC), and the
    paths in a table are relative to the folder that the table was put into.
    """
    path = local_path(name)
    return path if path.is_dir() else local_path(expanded(name).parent) / expanded(name).name


def suffix_of(name: str) -> str:
    """The end of a file's name, such as ``.csv``, in small letters; empty where there is none."""
    return os.path.splitext(name)[1].lower()


def is_same_place(one: str, other: str) -> bool:
    """Whether two names of a data set are one name, or two spellings of the path of one file or folder."""
    return one == other or (is_there(one) and local_path(one) == local_path(other))


def is_there(name: str) -> bool:
    """Whether a name is that of a file or a folder on this disk, or a pattern that some match."""
    path = local_path(name)
    return path_exists(path) or (glob.has_magic(name) and bool(glob.glob(str(path), recursive=True)))


def path_exists(path: Path) -> bool:
    """Whether a path exists; one with characters that no path can have does not."""
    try:
        return os.path.exists(path)
    except ValueError:
        return False
