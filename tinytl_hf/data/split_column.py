"""A column ``split`` that says of each row which split it is of."""

from __future__ import annotations

import logging

import datasets
import numpy as np
import pyarrow.compute

from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.columns import LABEL, SPLIT
from tinytl_hf.data.found import named
from tinytl_hf.data.roles import OF_PARTS, SPLIT_WORDS, chosen_splits, role_of
from tinytl_hf.errors import TinyTLError
from tinytl_hf.words import counted

logger = logging.getLogger(__name__)

OTHER_NAMES = ("set", "subset", "partition", "phase", "usage")
MOST_PARTS = 20  # more values are no folds


def by_split_column(splits: datasets.DatasetDict, config: DataConfig) -> datasets.DatasetDict:
    """The only table in parts, if its column ``split`` calls rows' splits as people, or the options, call them.

    Args:
        splits: Tables by the split that their place says.
        config: The names of the splits and columns that were asked for.

    Raises:
        TinyTLError: The column calls some rows splits and others not, or differs from what the place says.
    """
    columns = {name: _column_of(table, config) for name, table in splits.items()}
    if len(splits) > 1:
        _check_agree(splits, columns)
        return splits
    ((name, table),) = splits.items()
    column = columns[name]
    if column is None:
        _say_not_used(table, config)
        return splits
    roles = _roles(table, column, chosen_splits(config))
    found = sorted(set(roles.values()) - {""})
    unknown = [value or "(empty)" for value, role in roles.items() if not role]
    if not found and len(unknown) > 1:
        logger.warning(
            "column %s is not used: it calls rows %s, and splits are train, validation, test", column, named(unknown)
        )
    if not found or (len(found) == 1 and not unknown):
        return splits
    if len(found) == 1:
        raise TinyTLError(
            f"column {column} calls some rows {found[0]} and others {named(unknown)}, which is no split's name; give "
            "them one (train, validation, test), name it as --data.train_split or --data.eval_split, or take the "
            "column out"
        )
    logger.info("the column %s says which rows are of which split", column)
    of_row = np.array([roles[_text(value)] for value in table[column][:]])
    if unknown:
        count = int(np.count_nonzero(of_row == ""))
        logger.warning(
            "%s of no split, as column %s says %s", counted(count, "row is", "rows are"), column, named(unknown)
        )
    rest = table.remove_columns(column)
    return datasets.DatasetDict({role: rest.select(np.flatnonzero(of_row == role)) for role in found})


def says_splits(table: datasets.Dataset, config: DataConfig) -> bool:
    """Whether a column calls the rows of a table those of several splits."""
    column = _column_of(table, config)
    return column is not None and len(set(_roles(table, column, chosen_splits(config)).values()) - {""}) > 1


def _column_of(table: datasets.Dataset, config: DataConfig) -> str | None:
    """The column called ``split``, in letters of any size, if it holds texts and is for nothing else.

    One of another name that people use is it where it calls each row a split, and not all the same, or has a split
    that the options name; one of any name, where it calls each row a split, and some rows train.
    """
    chosen = chosen_splits(config)
    taken = (config.image_column, config.label_column)
    texts = {
        name.lower(): name
        for name, feature in table.features.items()
        if isinstance(feature, datasets.Value) and "string" in feature.dtype and name not in taken
    }
    if SPLIT in texts:
        return texts[SPLIT]
    for column in (texts[name] for name in OTHER_NAMES if name in texts):
        roles = set(_roles(table, column, chosen).values())
        if len(roles) > 1 and ("" not in roles or chosen & roles):
            return column
    others = [column for name, column in texts.items() if name != LABEL]
    values = table.select_columns(others).with_format("arrow")[:]  # of all at once, as there can be hundreds
    others = [column for column in others if _says_all(values.column(column))]
    return others[0] if len(others) == 1 else None


def _says_all(column: pyarrow.ChunkedArray) -> bool:
    """Whether a column, whatever its name, can be nothing else than that of the splits."""
    values = pyarrow.compute.unique(column).to_pylist()
    roles = {role_of(_text(value)) for value in values[: len(SPLIT_WORDS) + 1]}
    return None not in roles and len(roles) > 1 and "train" in roles and len(values) <= len(SPLIT_WORDS)


def _say_not_used(table: datasets.Dataset, config: DataConfig) -> None:
    """Say if a column that is called as those of splits are is not used: nobody else knows what its values mean."""
    by_name = "name its values with --data.train_split and --data.eval_split, or "
    for column, feature in table.features.items():
        called_so = column.lower() in (SPLIT, *OTHER_NAMES) or OF_PARTS.fullmatch(column)
        if not called_so or column in (config.image_column, config.label_column):
            continue
        if not isinstance(feature, datasets.Value):
            continue
        values = sorted({str(value) for value in table[column][:]})
        if 1 < len(values) <= MOST_PARTS:
            logger.warning(
                "column %s is not used (%s): if it says which rows are for training and which for tests, %swrite "
                "train, validation and test into a column split",
                *(column, named(values), by_name if "string" in feature.dtype else ""),
            )


def _roles(table: datasets.Dataset, column: str, chosen: set[str]) -> dict[str, str]:
    """The split that each value of the column stands for; an empty text: none."""
    values = {_text(value) for value in table[column][:]}
    return {value: value if value in chosen else role_of(value) or "" for value in sorted(values)}


def _text(value: str | None) -> str:
    return "" if value is None else value.strip()


def _check_agree(splits: datasets.DatasetDict, columns: dict[str, str | None]) -> None:
    """Raise if rows of one split's file or folder are called rows of another."""
    for name, table in splits.items():
        column = columns[name]
        if column is None or role_of(name) is None:
            continue
        others = [value for value, role in _roles(table, column, set()).items() if role not in ("", role_of(name))]
        if others:
            raise TinyTLError(
                f"column {column} calls rows of split {name} {named(others)}; take that column out if the files or "
                "folders are right, or put all rows into one table"
            )
