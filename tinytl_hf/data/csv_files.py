"""CSV files as people and their programs write them, to tables of texts."""

from __future__ import annotations

import functools
import logging
import warnings
from collections import Counter
from pathlib import Path

import pandas as pd

from tinytl_hf.data.find import suffix_of
from tinytl_hf.data.images import IMAGE_SUFFIXES
from tinytl_hf.errors import TinyTLError

logger = logging.getLogger(__name__)

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}  # Excel's are those of the country


def read_csv(place: str | Path) -> pd.DataFrame:
    """A CSV or TSV file, on this disk or at a URL, with all columns as texts; only what is empty is missing.

    Raises:
        TinyTLError: It is not in UTF-8, has no header, or rows of more values than that has names.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows with more values than the header has names
            table = _read(place, _separator(place))
    except UnicodeDecodeError as error:
        raise TinyTLError(f"{place}: is not in UTF-8 ({error}); save it as CSV in UTF-8") from error
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
    return table


def _separator(place: str | Path) -> str:
    """What stands between the names of the first line."""
    separator = "\t" if str(place).lower().endswith(".tsv") else ","
    names = _read(place, separator, nrows=0).columns
    counts = Counter(each for each in str(names[0]) if each in SEPARATORS and each != separator)
    if len(names) > 1 or not counts:
        return separator
    ((other, _),) = counts.most_common(1)
    _say_separator(place, SEPARATORS[other])
    return other


@functools.cache  # once a process, as an evaluation reads its data twice
def _say_separator(place: str | Path, name: str) -> None:
    logger.info("%s: read as having %s between its columns", place, name)


def _read(place: str | Path, separator: str, nrows: int | None = None) -> pd.DataFrame:
    # index_col: else a comma at the end of each row makes the first column an index, and the names slip.
    return pd.read_csv(
        place,
        sep=separator,
        dtype=str,
        keep_default_na=False,
        na_values=[""],
        encoding="utf-8-sig",
        index_col=False,
        nrows=nrows,
    )
