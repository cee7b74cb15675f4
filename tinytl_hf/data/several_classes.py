"""Tables that give an image several classes, or a column to each class: a class in each row is what is read here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence

import datasets
import numpy as np
import pyarrow.compute

from tinytl_hf.data.found import named
from tinytl_hf.data.roles import OF_PARTS, role_of
from tinytl_hf.errors import TinyTLError

YES, NO = {"1", "1.0", "true"}, {"0", "0.0", "false"}
TAGS = re.compile(r"tags?|keywords|attributes", re.I)
SEVERAL = re.compile(r"(.*[-_ ])?(tags?|keywords|attributes|labels|classes|categories|findings|genres)", re.I)
BETWEEN = re.compile(r"[,;|]")
ONE_CLASS = "an image has one class here, not several"


def check_one_class(table: datasets.Dataset, guessed: Sequence[str]) -> None:
    """Raise if a table that names no column of labels says yes or no of each class, or has several for an image.

    Args:
        table: A split.
        guessed: Columns of texts that may be the labels.
    """
    _check_no_yes_or_no(table, guessed)
    for name, feature in table.features.items():
        if SEVERAL.fullmatch(name) and isinstance(feature, (datasets.List, datasets.LargeList)):
            raise TinyTLError(
                f"data.label_column: {name} holds lists, and {ONE_CLASS}; write that class into a column called "
                f'label, as df["label"] = df["{name}"].str[0] of pandas does where each list has one item'
            )
    texts = [name for name, feature in table.features.items() if _is_text(feature) and SEVERAL.fullmatch(name)]
    for name in texts:
        values = {text for text in table.with_format("arrow")[:].column(name).unique().to_pylist() if text is not None}
        if joined := _joined(values, anything=TAGS.fullmatch(name) is not None):
            raise TinyTLError(
                f"data.label_column: {name} has several classes in a row ({joined!r}), and {ONE_CLASS}; write that "
                f"class into a column called label, or name {name} with --data.label_column {name}, to take each "
                "combination for a class of its own"
            )


def _check_no_yes_or_no(table: datasets.Dataset, guessed: Sequence[str]) -> None:
    """Raise if columns say yes or no, as a column for each class does."""
    values = table.select_columns([name for name, feature in table.features.items() if _is_short(feature, name)])
    columns = values.with_format("arrow")[:]
    found = [name for name in columns.column_names if _says_yes_or_no(columns[name])]
    if len(found) < 2:
        return
    said = np.array([[str(value).lower() in YES for value in columns[name].to_pylist()] for name in found])
    counts = said.sum(axis=0)
    others = [name for name in guessed if name not in found]
    fix = f", or name the column of labels, as --data.label_column {others[0]}" if others else ""
    if (counts == 1).all():
        listed = ", ".join(f'"{name}"' for name in found)
        raise TinyTLError(
            f"data.label_column: {named(found)} are a column for each class, with one yes in each row; make one "
            f'column of labels with pandas, df["label"] = df[[{listed}]].astype(float).idxmax(axis=1){fix}'
        )
    if others or counts.max() < 2:
        return
    row = int(counts.argmax())
    yes = [name for name, is_said in zip(found, said[:, row], strict=True) if is_said]
    raise TinyTLError(
        f"data.label_column: {named(found)} say yes or no, and row {row} says yes in {named(yes)}, but {ONE_CLASS}; "
        f"name one of them, as --data.label_column {found[0]}, to tell its yes from its no, or write a class for each "
        "image into a column called label"
    )


def _is_text(feature: object) -> bool:
    return isinstance(feature, datasets.Value) and "string" in feature.dtype


def _is_short(feature: object, name: str) -> bool:
    says_split = OF_PARTS.fullmatch(name) or role_of(name)
    return isinstance(feature, datasets.Value) and "binary" not in feature.dtype and not says_split


def _says_yes_or_no(column: pyarrow.ChunkedArray) -> bool:
    values = pyarrow.compute.unique(column)
    return len(values) <= len(YES | NO) and {str(value).lower() for value in values.to_pylist()} <= YES | NO


def _joined(texts: Collection[str], anything: bool) -> str | None:
    """A text that is put together of classes that are in other texts, too, each alone unless ``anything`` will do."""
    parts = {text: [part.strip() for part in BETWEEN.split(text)] for text in texts}
    if all(len(each) == 1 for each in parts.values()):
        parts = {text: text.split() for text in texts}
    counts = Counter(part for each in parts.values() for part in set(each))
    alone = {each[0] for each in parts.values() if len(each) == 1}
    for text in sorted(texts):
        each = parts[text]
        if len(each) > 1 and (alone.issuperset(each) or (anything and any(counts[part] > 1 for part in each))):
            return text
    return None
