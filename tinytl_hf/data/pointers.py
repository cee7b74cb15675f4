"""What a clone or a server may have in place of a table: a pointer of Git LFS, or a web page."""

from __future__ import annotations

import re
from pathlib import Path

from tinytl_hf.data.images import LFS
from tinytl_hf.disk import check_is_file
from tinytl_hf.errors import TinyTLError

PAGES = re.compile(rb"\s*<(!doctype html|html)", re.I)
LOOKED_AT = 200  # bytes
RAW, MEDIA = "https://raw.githubusercontent.com/", "https://media.githubusercontent.com/media/"


def check_is_here(file: str | Path, url: str | None = None) -> None:
    """Raise if a file is none, but a pointer to it or a web page.

    Args:
        file: Its path.
        url: Where it was downloaded from.
    """
    check_is_file(Path(file))
    with open(file, "rb") as content:
        check_start(content.read(LOOKED_AT), str(file if url is None else url))


def check_start(start: bytes, place: str) -> None:
    """Raise if what a file starts with is that of a pointer or a web page.

    Args:
        start: Its first bytes.
        place: Its path or URL.
    """
    if PAGES.match(start):
        raise TinyTLError(f"{place}: is a web page, not the file; download the file itself, and name it")
    if not start.startswith(LFS):
        return
    fix = "git lfs pull downloads the file"
    if place.startswith(RAW):
        fix = f"the file is at {place.replace(RAW, MEDIA)}"
    elif "://" in place:
        fix = "clone the repository, download the file with git lfs pull, and name it"
    raise TinyTLError(f"{place}: is not the file, but a pointer to it; {fix}")
