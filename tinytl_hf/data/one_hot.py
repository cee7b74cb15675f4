"""Labels as a column for each class, of which one says yes in each row."""

from __future__ import annotations

import datasets
import numpy as np
import pyarrow.compute

from tinytl_hf.data.found import named
from tinytl_hf.errors import TinyTLError

YES, NO = {"1", "1.0", "true"}, {"0", "0.0", "false"}


def check_not_one_hot(table: datasets.Dataset) -> None:
    """Raise if columns of a table without a column of labels say yes or no, with one yes in each row."""
    values = table.select_columns([name for name, feature in table.features.items() if _is_short(feature)])
    columns = values.with_format("arrow")[:]
    found = [name for name in columns.column_names if _texts(pyarrow.compute.unique(columns[name])) <= YES | NO]
    if len(found) < 2:
        return
    counts = np.sum([[str(value).lower() in YES for value in columns[name].to_pylist()] for name in found], axis=0)
    if (counts == 1).all():
        raise TinyTLError(
            f"data.label_column: {named(found)} are a column for each class, with one yes in each row; write the "
            "names of those columns into one called label, as idxmax(axis=1) of pandas gives them"
        )


def _is_short(feature: object) -> bool:
    return isinstance(feature, datasets.Value) and "binary" not in feature.dtype


def _texts(values: pyarrow.Array) -> set[str]:
    return {str(value).lower() for value in values.to_pylist()}
