"""JSON files that hold no rows, but a whole data set in a layout of its own."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlparse

from tinytl_hf.data.find import suffix_of
from tinytl_hf.data.found import named
from tinytl_hf.data.images import IMAGE_SUFFIXES
from tinytl_hf.errors import TinyTLError

ROWS = "write a .csv file with columns file_name,label and a row for each image"
LOOKED_AT = 1000  # characters


def check_holds_rows(file: str, url: str | None = None) -> None:
    """Raise if a ``.json`` file is one object that is no row, which would be read as one row of many columns.

    Args:
        file: Its path.
        url: Where it was downloaded from, which has its name then.
    """
    if suffix_of(file if url is None else urlparse(url).path) != ".json":
        return
    with open(file, encoding="utf-8-sig", errors="replace") as text:
        if not text.read(LOOKED_AT).lstrip().startswith("{"):  # a list of rows, which can be long
            return
        text.seek(0)
        try:
            content = json.load(text)
        except ValueError:  # a row in each line, or damaged, as reading it will say
            return
    if what := _layout(content):
        raise TinyTLError(f"{url or file}: {what}")


def _layout(content: dict[str, Any]) -> str | None:
    """What an object is that holds more than a row, and what to do."""
    if {"images", "annotations"} <= content.keys():
        return f"is a file of COCO, of boxes or captions; a class for each image is needed, so {ROWS}"
    if content and all(suffix_of(name) in IMAGE_SUFFIXES for name in content):
        return f"has images as names and not in rows; {ROWS}"
    if content and all(_is_column(values) for values in content.values()):
        fix = 'to_json(path, orient="records", lines=True)'
        return f"has one column after the other, as pandas writes them; write rows, with {fix}"
    lists = [name for name, values in content.items() if _is_rows(values)]
    fix = "write such a list into a file of its own, as [{...}, ...]"
    return f"has its rows in {named(lists)}; {fix}" if lists else None


def _is_column(values: Any) -> bool:
    return bool(values) and isinstance(values, (dict, list)) and not _is_rows(values)


def _is_rows(values: Any) -> bool:
    return isinstance(values, list) and len(values) > 1 and all(isinstance(value, dict) for value in values)
