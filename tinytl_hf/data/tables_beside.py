"""Tables that lie beside class folders: whether they say other labels than the folders do."""

from __future__ import annotations

import logging
import os

import datasets

from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.columns import LABEL, as_label, path_columns, place_of
from tinytl_hf.data.find import suffix_of
from tinytl_hf.data.listing import Listing
from tinytl_hf.data.roles import role_of_table
from tinytl_hf.data.table_files import WHOLE, load_tables
from tinytl_hf.errors import TinyTLError, first_line

logger = logging.getLogger(__name__)

NAMING_IMAGES = (".csv", ".tsv", ".jsonl", ".parquet")  # tables that can have the paths of images


def check_tables_beside(listing: Listing, splits: datasets.DatasetDict, config: DataConfig) -> None:
    """Name a table that has the paths of images which are labelled by their folders.

    Args:
        listing: The files of the folder.
        splits: Its images with the labels of their folders.
        config: The label's column, if that was said.

    Raises:
        TinyTLError: The table has another label for an image than its folder.
    """
    tables = [name for name in listing.tables if suffix_of(name) in NAMING_IMAGES]
    if not tables:
        return
    by_folder: dict[str, str] = {}
    for table in splits.values():
        classes = table.features["label"].names
        for image, number in zip(table["image"][:], table["label"][:], strict=True):
            by_folder[image["path"]] = classes[number]
    column = config.label_column or LABEL
    for name in tables:
        for path, label in _labels_by_path(listing, name, tables, column).items():
            if path in by_folder and not _is_same(as_label(label), by_folder[path]):
                raise TinyTLError(
                    f"data.dataset={listing.root}: {os.path.relpath(path, listing.root)} is {by_folder[path]} by its "
                    f"folder, and {label} by column {column} of {name}; name {to_name(listing, tables, name)} to "
                    f"take those labels, or move {name} away to take the folders'"
                )


def _is_same(label: str, folder: str) -> bool:
    """Whether a table's label is that of a folder: 1.0 of a CSV file may have become 1."""
    one, other = (text.partition(".")[0] if WHOLE.fullmatch(text) else text for text in (label, folder))
    return one == other


def to_name(listing: Listing, tables: list[str], one: str | None = None) -> str:
    """What to name for tables beside images: all of them by a pattern, if they are of several splits.

    Args:
        listing: The files of the folder.
        tables: The tables.
        one: That to name if they are not; None: the first.
    """
    kinds = {os.path.splitext(name)[1] for name in tables}
    folders = {os.path.dirname(name) for name in tables}
    if len(folders) > 1:
        folders = {"/".join("*" for _ in folder.split("/")) for folder in folders if folder}
    if len(kinds) == len(folders) == 1 and len({role_of_table(name) for name in tables} - {None}) > 1:
        return f"these files, '{listing.root / folders.pop() / f'*{kinds.pop()}'}'"
    return str(listing.root / (one or tables[0]))


def _labels_by_path(listing: Listing, name: str, tables: list[str], label_column: str) -> dict[str, str]:
    """The label of each image that a table names; none if it names none or has no such column."""
    file = listing.root / name
    try:
        table = load_tables({"train": [str(file)]}, file.parent)["train"]
        column = next(iter(path_columns(table)), None)
        paths = [] if column is None else [place_of(str(path), file.parent) for path in table[column][:]]
    except Exception as error:  # whatever lies beside images can be no table at all
        logger.info("%s: not used, as it cannot be read (%s)", name, first_line(error))
        return {}
    there = {f"{listing.root}/{image}" for image in listing.images}
    count = len(there.intersection(paths))
    if not count:
        return {}
    if label_column not in table.column_names:
        logger.warning(
            "%s names %s of these images and is not used: the folders are the classes; name %s for its labels",
            *(name, f"{count:,}", to_name(listing, tables, name)),
        )
        return {}
    labels = zip(paths, table[label_column][:], strict=True)
    return {path: str(label) for path, label in labels if label is not None}
