"""Files that hold tables: read as one, with the places of the images that they name."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import datasets
import httpx2
import pyarrow.ipc
import pyarrow.parquet

from tinytl_hf.data.columns import FEW, is_string, path_columns
from tinytl_hf.data.csv_files import OF_TEXTS, read_csv
from tinytl_hf.data.find import TABLES, suffix_of
from tinytl_hf.data.found import named
from tinytl_hf.data.json_files import check_holds_rows, load_json
from tinytl_hf.data.pointers import check_is_here
from tinytl_hf.data.tars import check_tars
from tinytl_hf.disk import StrPath
from tinytl_hf.errors import TinyTLError, first_line

WITH_CLASSES = ("parquet", "arrow")  # kinds of files that can say which class a number is
WHOLE = re.compile(r"-?\d+(\.0+)?")


def load_tables(files: dict[str, list[str]], base: Path) -> datasets.DatasetDict:
    """Read files of one kind, each split by itself, as a test split may lack columns.

    Args:
        files: Paths of the files of each split.
        base: Folder that paths of images are relative to, unless there is such a file beside the table itself.

    Raises:
        TinyTLError: They are of several kinds.
    """
    kinds = {TABLES[suffix_of(file)] for each in files.values() for file in each}
    if len(kinds) > 1:
        raise TinyTLError(f"{', '.join(sorted(kinds))} files cannot be put together; name those of one kind")
    (kind,) = kinds
    for file in (file for each in files.values() for file in each):
        check_is_here(file)
        check_holds_rows(file)
    splits = {name: _load_split(each, kind, base) for name, each in files.items()}
    return with_whole_numbers(splits) if kind == "csv" else datasets.DatasetDict(splits)


def _load_split(files: list[str], kind: str, base: Path) -> datasets.Dataset:
    if {os.path.dirname(file) for file in files} == {str(base)}:
        return _load(files, kind)
    by_folder: dict[str, list[str]] = defaultdict(list)
    for file in files:
        by_folder[os.path.dirname(file)].append(file)
    first = _load(next(iter(by_folder.values())), kind)
    if not path_columns(first):
        return _load(files, kind)
    return datasets.concatenate_datasets([_placed(_load(each, kind), place) for place, each in by_folder.items()])


def _check_same_columns(files: list[str]) -> None:
    first, *others = files
    expected = set(_schema(first).names)
    for other in others:
        found = set(_schema(other).names)
        if found != expected:
            raise TinyTLError(
                f"{other} has columns {named(sorted(found), shown=FEW)}, and {first} of the same split has "
                f"{named(sorted(expected), shown=FEW)}; give them the same columns, or name one of the two"
            )


def check_alike(files: Sequence[str]) -> None:
    """Raise if files have other kinds of values in a column, or number its classes otherwise.

    The library datasets reads the values of all as what the first holds: 2 as true, or by the names of its classes.
    """
    first, *others = [file for file in files if TABLES.get(suffix_of(file)) in WITH_CLASSES] or [""]
    for other in others:
        _check_same_classes(first, other)
        _check_same_kinds(first, other)


def _check_same_kinds(first: str, other: str) -> None:
    expected, found = _kinds(_schema(first)), _kinds(_schema(other))
    for column in sorted(expected.keys() & found.keys()):
        if expected[column] != found[column]:
            raise TinyTLError(
                f"{other} has {found[column]} in column {column}, and {first} has {expected[column]}; write values of "
                "one kind, or name one of the two"
            )


def _kinds(schema: pyarrow.Schema) -> dict[str, str]:
    """What columns hold, of those that hold truths, numbers or texts."""
    types = pyarrow.types
    tests = {
        "true and false": (types.is_boolean,),
        "numbers": (types.is_integer, types.is_floating),
        "texts": (types.is_string, types.is_large_string, types.is_string_view),
    }
    return {
        field.name: kind
        for field in schema
        for kind, fits in tests.items()
        if any(fit(field.type.value_type if types.is_dictionary(field.type) else field.type) for fit in fits)
    }


def _check_same_classes(first: str, other: str) -> None:
    expected, found = class_names(_schema(first)), class_names(_schema(other))
    for column in sorted(expected.keys() | found.keys()):
        ours, theirs = expected.get(column, []), found.get(column, [])
        if ours != theirs:
            number = next(n for n, pair in enumerate(zip_longest(ours, theirs)) if len(set(pair)) > 1)
            calls = [repr(names[number]) if number < len(names) else "no class" for names in (theirs, ours)]
            raise TinyTLError(
                f"{other} has {calls[0]} for {number} in column {column}, and {first} has {calls[1]}; write the "
                "names of the classes as texts, or name one of the two"
            )


def _schema(file: str) -> pyarrow.Schema:
    if suffix_of(file) == ".parquet":
        return pyarrow.parquet.read_schema(file)
    try:
        with pyarrow.memory_map(file) as content:
            return pyarrow.ipc.open_stream(content).schema
    except pyarrow.ArrowInvalid:  # of the other format that Arrow has
        with pyarrow.memory_map(file) as content:
            return pyarrow.ipc.open_file(content).schema


def class_names(schema: pyarrow.Schema) -> dict[str, list[str]]:
    """Names of the classes that stand for the numbers in a file's columns, as the library datasets writes them."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    features = datasets.Features.from_arrow_schema(schema)
    return {name: feature.names for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)}


def _load(files: list[str], kind: str) -> datasets.Dataset:
    if kind == "csv":
        return datasets.concatenate_datasets([_csv(file) for file in files])
    if kind == "json":
        return load_json(files)
    if kind == "parquet":  # of which the library datasets reads none without rows; Spark writes such for empty parts
        empty = [file for file in files if _count_rows(file) == 0]
        if len(empty) == len(files):
            return datasets.Dataset(pyarrow.parquet.read_table(files[0]))
        files = [file for file in files if file not in empty]
    if kind in WITH_CLASSES and len(files) > 1:
        _check_same_columns(files)
        check_alike(files)
    if kind == "webdataset":
        check_tars(files)
    patterns = [glob.escape(file) for file in files]
    return datasets.load_dataset(kind, state_of(files), data_files={"train": patterns})["train"]


def state_of(files: Sequence[StrPath]) -> str:
    """A name for what files hold now.

    The library datasets keeps what it has read, by the files' names and times, or by their names alone: by this name
    as well, which is of what changes also where a file is replaced by one of the same time.
    """
    states = [(str(path), os.stat(path)) for path in files]
    seen = [(path, state.st_size, state.st_ctime_ns) for path, state in states]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]


def _count_rows(file: str) -> int:
    """Rows of a parquet file; of many files, the one that is damaged is named."""
    try:
        return pyarrow.parquet.read_metadata(file).num_rows
    except pyarrow.ArrowException as error:
        raise TinyTLError(f"{file}: cannot be loaded ({first_line(error)}); mend it or take it away") from error


def _csv(place: str) -> datasets.Dataset:
    return datasets.Dataset.from_pandas(read_csv(place), preserve_index=False)


def _placed(table: datasets.Dataset, folder: str) -> datasets.Dataset:
    """A table whose paths of images that lie beside it are whole."""

    def placed(path: str | None) -> str | None:
        place = None if path is None else os.path.join(folder, path)
        return place if place is not None and os.path.isfile(place) else path

    for column in path_columns(table):
        table = _with_column(table, column, [placed(path) for path in table[column][:]])
    return table


def _with_column(table: datasets.Dataset, column: str, values: list[Any]) -> datasets.Dataset:
    """A table with other values in a column, which stays where it is."""
    changed = table.remove_columns(column).add_column(column, values, feature=table.features[column])
    return changed.select_columns(table.column_names)


def with_whole_numbers(splits: Mapping[str, datasets.Dataset]) -> datasets.DatasetDict:
    """Tables from CSV files, in whose columns whole numbers are written alike in all splits."""
    found = datasets.DatasetDict(splits)
    texts = {
        name: table.select_columns([column for column, feature in table.features.items() if is_string(feature)])
        for name, table in splits.items()
    }
    columns = {name: table.with_format("arrow")[:] for name, table in texts.items()}
    for column in {column for table in columns.values() for column in table.column_names}:
        having = {
            name: table.column(column).to_pylist() for name, table in columns.items() if column in table.column_names
        }
        for name, values in zip(having, _whole_numbers(list(having.values())), strict=True):
            if values != having[name]:
                found[name] = _with_column(found[name], column, values)
    for table in found.values():
        table.info.builder_name = OF_TEXTS
    return found


def _whole_numbers(columns: Sequence[Sequence[str | None]]) -> list[list[str | None]]:
    """Texts without ``.0``, if all are whole numbers: pandas writes 0 and 1 as 0.0 and 1.0 beside what is missing."""
    values = [value for column in columns for value in column if value is not None]
    if not any("." in value for value in values) or not all(WHOLE.fullmatch(value) for value in values):
        return [list(column) for column in columns]
    return [[value and value.partition(".")[0] for value in column] for column in columns]


def table_at(url: str, kind: str) -> datasets.Dataset:
    """The table at a URL; downloaded again where the server does not tell whether it has changed."""
    if kind == "csv":
        return with_whole_numbers({"train": _csv(url)})["train"]
    download = datasets.DownloadConfig(force_download=not _tells_versions(url))
    file = datasets.DownloadManager(download_config=download).download(url)
    check_is_here(file, url)
    check_holds_rows(file, url)
    try:
        return _load([file], kind)
    except TinyTLError as error:
        raise TinyTLError(str(error).replace(file, url)) from error


def _tells_versions(url: str) -> bool:
    """Whether a server sends what the library datasets knows a changed file by."""
    if not url.startswith(("http://", "https://")):
        return True
    try:
        return "etag" in httpx2.head(url, follow_redirects=True).headers
    except httpx2.HTTPError:
        return False
