"""The values of a column of labels to numbers of classes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.columns import NoLabelsError, as_label, class_order, is_string, label_column
from tinytl_hf.data.csv_files import NUMBER, WHOLE, is_of_texts
from tinytl_hf.data.found import named
from tinytl_hf.data.json_files import KINDS
from tinytl_hf.errors import TinyTLError

LABELS = re.compile(r"(large_)?string(_view)?|u?int\d+|float\d+|bool|null")  # types of values that can be classes
A_CLASS = "a class is a text, a whole number, or true or false"
LONGEST = 1000  # characters of the name of a class
MOST = 2.0**53  # up to which floats are whole numbers
DECIMAL_COMMA = re.compile(r"-?\d+,(\d{1,2}|\d{4,})")


def label_values(
    table: datasets.Dataset, name: str, config: DataConfig, image_column: str
) -> tuple[str, np.ndarray, list[str]]:
    """The name of the labels' column, the class number of each row, and the names of the classes.

    Raises:
        TinyTLError: There is no such column, there are several, a row has no label, or what it has is no class.
    """
    column = label_column(table, config, image_column)
    feature = table.features[column]
    if isinstance(feature, datasets.Json):
        content = table[column][:]
        check_one_kind(content, column, [f"row {row} of split {name}" for row in range(len(content))])
    if not isinstance(feature, (datasets.ClassLabel, datasets.Value)) or not LABELS.match(feature.dtype):
        raise _no_class(table, column)
    if is_string(feature):
        _check_short(table, column)
    values = table.with_format("numpy")[column][:]
    missing = [i for i, value in enumerate(values) if is_missing(value)]
    if len(missing) == len(values):
        raise NoLabelsError(f"no row of split {name} has a label in {column}")
    if missing:
        raise TinyTLError(f"row {missing[0]} of split {name} has no label in {column}; drop such rows")
    if isinstance(feature, datasets.ClassLabel):
        labels, names = np.asarray(values, dtype=np.int64), [as_label(name) for name in feature.names]
        outside = np.flatnonzero((labels < 0) | (labels >= len(names)))
        if outside.size == len(labels):
            raise NoLabelsError(f"no row of split {name} has a label in {column}: all are {labels[0]}")
        if outside.size:
            raise TinyTLError(
                f"row {outside[0]} of split {name} has label {labels[outside[0]]}, outside 0 to "
                f"{len(names) - 1}; this split may be unlabelled, use another (data.eval_split)"
            )
        number = {name: at for at, name in enumerate(dict.fromkeys(names))}
        return column, np.array([number[name] for name in names])[labels], list(number)
    values = np.asarray(values)
    return column, *_numbered(_as_numbers(values, column) if is_of_texts(table) else values, column)


def _check_short(table: datasets.Dataset, column: str) -> None:
    """Raise for texts that are no names: an array of them takes as much memory for each row as for the longest."""
    texts = table.select_columns(column).with_format("arrow")[:].column(column)
    longest = pc.max(pc.utf8_length(texts.cast(pa.large_string()))).as_py() or 0
    if longest > LONGEST:
        raise TinyTLError(
            f"data.label_column={column}: it holds a text of {longest:,} characters, and the name of a class has up "
            f"to {LONGEST:,}; name the column of the classes"
        )


def check_one_kind(values: Sequence[Any], column: str, places: Sequence[str]) -> None:
    """Raise if a column of labels holds values of several kinds, as JSON has 1 in one row and "1" in another.

    Args:
        values: The column.
        column: Its name.
        places: What to call each row.
    """
    first: dict[str, int] = {}
    for row, value in enumerate(values):
        if not is_missing(value):
            first.setdefault(KINDS[type(value)], row)
    if len(first) < 2:
        return
    examples = [f"{json.dumps(values[row], ensure_ascii=False)} in {places[row]}" for row in first.values()]
    raise TinyTLError(
        f"data.label_column={column}: it holds {' and '.join(first)} ({named(examples)}), and the classes of a column "
        "are of one kind; write all of them as texts"
    )


def _no_class(table: datasets.Dataset, column: str) -> TinyTLError:
    """What to say of a column of objects, lists, dates or the like."""
    feature = table.features[column]
    is_json = isinstance(feature, datasets.Json)
    content = table[column][:] if is_json else table.with_format("arrow")[:].column(column).to_pylist()
    held, fix = getattr(feature, "dtype", feature), ""
    values = [value for value in content if value is not None]
    if values and isinstance(values[0], dict):
        held = f"objects ({named([json.dumps(values[0], ensure_ascii=False, default=str)])})"
        fix = f"; write what names the class ({named(list(values[0]))}) into a column of its own"
    elif values and isinstance(values[0], list):
        held = "List" if is_json else feature
        fix = "; an image has one class here, not several"
        if all(len(value) == 1 for value in values):
            fix = f'; take the one item of each list, as df["{column}"].str[0] of pandas does'
    elif is_json:  # of the library datasets, which has read the texts "1" and "true" as what they look like
        held, fix = f'values of several kinds, such as {values[0]} and "{values[0]}"', "; write all of them as texts"
    elif values and isinstance(values[0], bytes):
        fix = f'; make texts of bytes, as df["{column}"].str.decode("utf-8") of pandas does'
    return TinyTLError(f"data.label_column={column}: it holds {held}, and {A_CLASS}{fix}")


def is_missing(value: Any) -> bool:
    """Whether a value is none, no number, or a text without a letter."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _as_numbers(texts: np.ndarray, column: str) -> np.ndarray:
    """Texts of a CSV file, which does not tell them from numbers, as floats if all are numbers in such spelling."""
    stripped = [_with_point(text.strip()) for text in texts]
    if all(WHOLE.fullmatch(text.strip()) for text in texts) or not all(NUMBER.fullmatch(text) for text in stripped):
        return texts
    values = np.array(stripped, dtype=np.float64)
    if not np.isfinite(values).any():
        return texts
    _check_whole(values[~np.isnan(values)], column)
    return texts if np.isnan(values).any() else values


def _with_point(text: str) -> str:
    """A number with a point, where a country writes 0,5; of three digits, 1,000 is a thousand in others."""
    return text.replace(",", ".") if DECIMAL_COMMA.fullmatch(text) else text


def _check_whole(values: np.ndarray, column: str) -> None:
    odd = values[(values != np.round(values)) | (np.abs(values) > MOST)]
    if odd.size:
        raise TinyTLError(
            f"data.label_column={column}: it holds {odd[0]:g}, and {A_CLASS}; round such numbers, or write names, as "
            "v0.5 for 0.5"
        )


def _numbered(values: np.ndarray, column: str) -> tuple[np.ndarray, list[str]]:
    if values.dtype.kind == "f":
        _check_whole(values, column)
        values = values.astype(np.int64)  # pandas' whole numbers
    if values.dtype.kind in "OU":
        values = np.array([as_label(str(value)) for value in values])
    classes, labels = np.unique(values, return_inverse=True)
    texts = [str(value) for value in classes]
    names = class_order(texts)
    place = {name: at for at, name in enumerate(names)}
    number = np.array([place[text] for text in texts], dtype=np.int64)
    return number[labels], names
