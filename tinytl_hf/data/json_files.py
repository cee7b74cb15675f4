"""JSON files that hold no rows, but a whole data set in a layout of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlparse

import datasets

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


def with_kinds_told(table: datasets.Dataset, files: Sequence[str]) -> datasets.Dataset:
    """Columns of several kinds of values as their files have them.

    The library datasets reads such a column's text "1" as the number.
    """
    mixed = [name for name, feature in table.features.items() if isinstance(feature, datasets.Json)]
    if not mixed:
        return table
    rows = [row for file in files for row in _rows(file)]
    values = of_several_kinds({name: [row.get(name) for row in rows] for name in mixed})
    return datasets.concatenate_datasets([table.remove_columns(mixed), values], axis=1).select_columns(
        table.column_names
    )


def of_several_kinds(columns: Mapping[str, Sequence[Any]]) -> datasets.Dataset:
    """A table of columns that hold values of several kinds, each as JSON."""
    features = datasets.Features({name: datasets.Json() for name in columns})
    texts = {name: [_as_json(value) for value in values] for name, values in columns.items()}
    return datasets.Dataset.from_dict(texts, features=features)


def _as_json(value: Any) -> str | None:
    return None if value is None or value != value else json.dumps(value)


def _rows(file: str) -> Iterator[dict[str, Any]]:
    """The rows of a file, which are a list or one in each line."""
    with open(file, encoding="utf-8-sig") as text:
        if text.read(LOOKED_AT).lstrip().startswith("["):
            text.seek(0)
            yield from json.load(text)
        else:
            text.seek(0)
            yield from (json.loads(line) for line in text if line.strip())
