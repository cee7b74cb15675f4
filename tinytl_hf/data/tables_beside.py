"""Tables that lie beside class folders: whether they say other labels than the folders do."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping

import datasets

from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.beside import say_not_used, say_splits_not_taken
from tinytl_hf.data.columns import LABEL, as_label, is_string, path_columns, place_of
from tinytl_hf.data.find import suffix_of
from tinytl_hf.data.ids import images_by_id, images_by_name
from tinytl_hf.data.json_beside import check_json_beside
from tinytl_hf.data.listing import Listing
from tinytl_hf.data.roles import of_several_splits
from tinytl_hf.data.split_column import says_splits
from tinytl_hf.data.table_files import WHOLE, load_tables
from tinytl_hf.errors import TinyTLError, first_line

logger = logging.getLogger(__name__)

# Tables that can have the paths of images; .json files, which can hold anything, are for json_beside.py.
NAMING_IMAGES = (".csv", ".tsv", ".jsonl", ".parquet")
TO_HAND_IN = re.compile(r"sample[-_ ]?sub(mission)?", re.I)  # as Kaggle calls it


def check_tables_beside(listing: Listing, splits: datasets.DatasetDict, config: DataConfig) -> None:
    """Name tables and JSON files that name images which are labelled by their folders.

    Args:
        listing: The files of the folder.
        splits: Its images with the labels of their folders.
        config: The label's column, if that was said.

    Raises:
        TinyTLError: One has another label for an image than its folder.
    """
    if not listing.tables:
        return
    by_folder: dict[str, str] = {}
    for split in splits.values():
        classes = split.features["label"].names
        for image, number in zip(split["image"][:], split["label"][:], strict=True):
            by_folder[image["path"]] = classes[number]
    has_splits = splits.keys() != {"train"}
    _check_tables(listing, labelling_tables(listing), by_folder, config, has_splits)
    check_json_beside(listing, by_folder, config, has_splits)


def _check_tables(
    listing: Listing, tables: list[str], by_folder: Mapping[str, str], config: DataConfig, has_splits: bool
) -> None:
    column = config.label_column or LABEL
    unused: dict[str, int] = {}
    naming: list[str] = []
    with_splits: list[str] = []
    for name in tables:
        table, count, labels = _labels_by_path(listing, name, column)
        if count and not labels:
            unused[name] = count
        naming += [name] if count else []
        with_splits += [name] if count and table is not None and says_splits(table, config) else []
        for path, label in labels.items():
            if path in by_folder and not _is_same(as_label(label), by_folder[path]):
                raise TinyTLError(
                    f"data.dataset={listing.root}: {os.path.relpath(path, listing.root)} is {by_folder[path]} by its "
                    f"folder, and {label} by column {column} of {name}; name {to_name(listing, tables, name)} to "
                    f"take those labels, or move {name} away to take the folders'"
                )
    if unused:
        name = to_name(listing, list(unused))
        say_not_used(unused, f"name {name} for {'its' if len(unused) == 1 else 'their'} labels")
    if of_several_splits(naming):
        with_splits = naming
    if with_splits and not has_splits:
        say_splits_not_taken(with_splits, f"name {to_name(listing, with_splits)} for that")


def labelling_tables(listing: Listing) -> list[str]:
    """Tables that can have the labels of images."""
    return [name for name in listing.tables if suffix_of(name) in NAMING_IMAGES and not is_to_hand_in(name)]


def is_to_hand_in(name: str) -> bool:
    """Whether a table is a sample of what is to be handed in, in which all images have one label."""
    return TO_HAND_IN.search(os.path.basename(name)) is not None


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
    if len(kinds) == len(folders) == 1 and of_several_splits(tables):
        return f"these files, '{listing.root / folders.pop() / f'*{kinds.pop()}'}'"
    return str(listing.root / (one or tables[0]))


def _labels_by_path(
    listing: Listing, name: str, label_column: str
) -> tuple[datasets.Dataset | None, int, dict[str, str]]:
    """A table, how many images it names, and the label that it has for each; none if it has no such column."""
    file = listing.root / name
    try:
        table = load_tables({"train": [str(file)]}, file.parent)["train"]
        paths = _places(listing, name, table, label_column)
    except Exception as error:  # whatever lies beside images can be no table at all
        logger.info("%s: not used, as it cannot be read (%s)", name, first_line(error))
        return None, 0, {}
    there = {f"{listing.root}/{image}" for image in listing.images}
    count = len(there.intersection(paths))
    if not count or label_column not in table.column_names:
        return table, count, {}
    labels = zip(paths, table[label_column][:], strict=True)
    return table, count, {path: str(label) for path, label in labels if path in there and label is not None}


def _places(listing: Listing, name: str, table: datasets.Dataset, label_column: str) -> list[str | None]:
    """Where the images are that a table names: by their paths, else by their names without suffix or folder."""
    base = (listing.root / name).parent
    columns = path_columns(table)
    if columns:
        places: list[str | None] = [place_of(str(path), base) for path in table[columns[0]][:]]
        if any(place and os.path.isfile(place) for place in places):
            return places
    texts = [column for column, feature in table.features.items() if is_string(feature) and column != label_column]
    known = images_by_name(listing.images) if columns else images_by_id(listing.images)
    for column in columns[:1] or texts:
        values = table[column][:]
        found = {value: known[value][0] for value in values if len(known.get(value, ())) == 1}
        if 2 * len(found) > len(values) and not all(value.isdecimal() for value in found):  # rows are numbered, too
            return [f"{listing.root}/{found[value]}" if value in found else None for value in values]
    return []
