"""CSV files as people and their programs write them, to tables of texts."""

from __future__ import annotations

import functools
import logging
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Literal

import datasets
import pandas as pd

from tinytl_hf.data.find import suffix_of
from tinytl_hf.data.images import IMAGE_SUFFIXES
from tinytl_hf.data.pointers import check_start
from tinytl_hf.errors import TinyTLError, first_line

logger = logging.getLogger(__name__)

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}  # Excel's are those of the country

WHOLE = re.compile(r"-?\d+(\.0*)?")
NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)(e[-+]\d+)?|-?inf|nan", re.I)  # as programs write numbers
TRUTH = re.compile(r"true|false", re.I)
OF_TEXTS = "csv"  # what the library datasets calls a table's builder, of one whose numbers are texts


def is_of_texts(table: datasets.Dataset) -> bool:
    """Whether a table is from CSV files, which do not tell numbers from texts."""
    return table.info.builder_name == OF_TEXTS


def read_csv(place: str | Path) -> pd.DataFrame:
    """A CSV or TSV file, on this disk or at a URL, with all columns as texts; only what is empty is missing.

    Raises:
        TinyTLError: It is not in UTF-8, has no header or two, or rows of more values than that has names.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows with more values than the header has names
            separator, before = _separator(place)
            table = _read(place, separator, before)
            _check_names_differ(place, table, separator, before)
    except UnicodeDecodeError as error:
        raise TinyTLError(f"{place}: is not in UTF-8 ({error}); save it as CSV in UTF-8") from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise TinyTLError(
            f"{place}: cannot be loaded ({type(error).__name__}: {first_line(error)}); mend it or take it away"
        ) from error
    except pd.errors.ParserWarning as error:
        raise TinyTLError(
            f"{place}: has rows with more values than its first line has names; put quotes around values with commas "
            "in them, and have the names of all columns in the first line"
        ) from error
    for column in table.columns:
        if str(column) != str(column).lstrip():  # "file_name, label": a space after each comma
            table[column] = [text.lstrip() if isinstance(text, str) else text for text in table[column]]
    table = table.rename(columns=lambda column: str(column).strip())
    if value := next((name for name in table.columns if suffix_of(name) in IMAGE_SUFFIXES), None):
        raise TinyTLError(
            f"{place}: its first line names an image ({value}), not the columns; put a line with their names before "
            "it, such as file_name,label"
        )
    _check_one_header(place, table)
    _check_one_separator(place, table, separator)
    return table.dropna(how="all", ignore_index=True)  # of rows that a person emptied, Excel writes the commas


def _check_one_header(place: str | Path, table: pd.DataFrame) -> None:
    """Raise if the names of the columns come again, as in files put together."""
    alike = table[table.iloc[:, 0] == table.columns[0]]
    again = alike.index[(alike == alike.columns).all(axis=1)]
    if len(again):
        raise TinyTLError(
            f"{place}: the names of its columns come again in row {again[0] + 1} of its values, as in files put "
            "together; take such lines out"
        )


def _check_one_separator(place: str | Path, table: pd.DataFrame, separator: str) -> None:
    """Raise if the rows are not separated as the names of the columns are, so that all is in the first column."""
    first = table.iloc[:, 0].dropna()
    if len(table.columns) < 2 or first.empty or table.iloc[:, 1:].notna().any(axis=None):
        return
    inside = [each for each in SEPARATORS if each != separator and first.str.contains(each, regex=False).all()]
    if inside:
        raise TinyTLError(
            f"{place}: has {SEPARATORS[inside[0]]} in its rows, and others between the names of its columns; write "
            "the same in all lines"
        )


def _check_names_differ(place: str | Path, table: pd.DataFrame, separator: str, before: int) -> None:
    """Raise if columns of other values have one name: pandas calls the second ``label`` of a file ``label.1``."""
    seconds = {str(column).removesuffix(".1").strip(): column for column in table.columns if str(column)[-2:] == ".1"}
    seconds = {name: column for name, column in seconds.items() if name in table.columns}
    names = [str(column).strip() for column in table.columns]
    if seconds:
        first = _read(place, separator, before, nrows=1, header=None)
        names = [str(name).strip() for name in first.iloc[0].dropna()]
    for name, count in Counter(names).items():
        if count > 1 and not (name in seconds and table[name].equals(table[seconds[name]])):
            raise TinyTLError(
                f"{place}: its first line has the name {name} {count} times; give each column a name of its own"
            )


def _separator(place: str | Path) -> tuple[str, int]:
    """What stands between the names of the columns, and how many lines are before those."""
    separator = "\t" if str(place).lower().endswith(".tsv") else ","
    names = _read(place, separator, nrows=0).columns
    check_start(str(names[0]).encode(), str(place))
    if str(names[0]).startswith("sep="):  # which Excel writes and reads
        return str(names[0]).removeprefix("sep=") or separator, 1
    counts = Counter(each for each in str(names[0]) if each in SEPARATORS and each != separator)
    if len(names) > 1 or not counts:
        return separator, 0
    ((other, _),) = counts.most_common(1)
    _say_separator(place, SEPARATORS[other])
    return other, 0


@functools.cache  # once a process, as an evaluation reads its data twice
def _say_separator(place: str | Path, name: str) -> None:
    logger.info("%s: read as having %s between its columns", place, name)


def _read(
    place: str | Path,
    separator: str,
    before: int = 0,
    nrows: int | None = None,
    header: Literal["infer"] | None = "infer",
) -> pd.DataFrame:
    # index_col: else a comma at the end of each row makes the first column an index, and the names slip.
    return pd.read_csv(
        place,
        sep=separator,
        dtype=str,
        keep_default_na=False,
        na_values=[""],
        encoding="utf-8-sig",
        index_col=False,
        skiprows=before,
        nrows=nrows,
        header=header,
    )
