"""JSON files: rows of any values to tables, and what holds no rows, but a whole data set in a layout of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import datasets
import pyarrow

from tinytl_hf.data.find import suffix_of
from tinytl_hf.data.found import named
from tinytl_hf.data.images import IMAGE_SUFFIXES
from tinytl_hf.errors import TinyTLError

ROWS = "write a .csv file with columns file_name,label and a row for each image"
KINDS = {bool: "truths", int: "numbers", float: "numbers", str: "texts", dict: "objects", list: "lists"}
LOOKED_AT = 1000  # characters
SHOWN = 40  # characters of what is no row


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


def load_json(files: Sequence[str]) -> datasets.Dataset:
    """The rows of files, whatever values they hold.

    The library datasets reads a text "1" as the number in a column that holds both, puts texts of the second 10 MB of
    a file into quotes if there are numbers among them, and takes texts such as 2020-01-01 for dates.

    Raises:
        TinyTLError: A file holds something else than rows.
    """
    return table_of(json_columns(files))


def table_of(columns: Mapping[str, list[Any]]) -> datasets.Dataset:
    """Columns of any values; those of several kinds, as JSON has 1 in one line and "1" in another, each as JSON."""
    mixed = [name for name, values in columns.items() if not _is_of_one_kind(values)]
    plain = {name: pyarrow.array(values, from_pandas=True) for name, values in columns.items() if name not in mixed}
    table = datasets.Dataset(pyarrow.table(plain))
    if not mixed:
        return table
    features = datasets.Features({name: datasets.Json() for name in mixed})
    texts = {name: [_as_json(value) for value in columns[name]] for name in mixed}
    others = datasets.Dataset.from_dict(texts, features=features)
    return datasets.concatenate_datasets([table, others], axis=1) if plain else others


def _is_of_one_kind(values: list[Any]) -> bool:
    if len({KINDS.get(type(value)) for value in values if value is not None and value == value}) > 1:
        return False
    try:
        pyarrow.array(values, from_pandas=True)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError, UnicodeEncodeError):
        return False  # the last two of numbers beyond 64 bits and of halves of characters, which JSON can have
    return True


def _as_json(value: Any) -> str | None:
    return None if value is None or value != value else json.dumps(value)


def json_columns(files: Sequence[str]) -> dict[str, list[Any]]:
    """The columns of files of rows, with None where a row lacks one."""
    rows = [row for file in files for row in _rows(file)]
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def _rows(file: str) -> Iterator[dict[str, Any]]:
    """The rows of a file, which are a list or one in each line."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TinyTLError(f"{file}: is not in UTF-8 ({error}); save it as JSON in UTF-8") from error
    is_list = text.lstrip().startswith("[")
    for number, part in enumerate([text] if is_list else text.split("\n"), 1):
        try:
            rows = json.loads(part, object_pairs_hook=_row) if part.strip() else []
        except ValueError as error:
            reason = error if is_list or not isinstance(error, json.JSONDecodeError) else error.msg
            where = "" if is_list else f"line {number}: "
            raise TinyTLError(f"{file}: cannot be loaded ({where}{reason}); mend it or take it away") from error
        for row in rows if is_list else [rows] if part.strip() else []:
            if not isinstance(row, dict):
                raise TinyTLError(f"{file}: holds {json.dumps(row)[:SHOWN]} where a row is due; {ROWS}")
            yield row


def _row(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)} twice")
    return row
