"""``metadata.csv`` and the like: labels of image files by their names."""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow.parquet

from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.almost_splits import say_odd_names
from tinytl_hf.data.columns import LABEL, SPLIT, as_label, is_path
from tinytl_hf.data.csv_files import read_csv
from tinytl_hf.data.folder import Folder, find_splits
from tinytl_hf.data.found import named
from tinytl_hf.data.ids import images_by_id
from tinytl_hf.data.json_files import json_columns, table_of
from tinytl_hf.data.labels import check_one_kind
from tinytl_hf.data.listing import Listing
from tinytl_hf.data.pointers import check_is_here
from tinytl_hf.data.roles import chosen_splits, role_of
from tinytl_hf.data.table_files import class_names, with_whole_numbers
from tinytl_hf.disk import path_of
from tinytl_hf.errors import TinyTLError, first_line

logger = logging.getLogger(__name__)

FILE_NAME = "file_name"
IMAGE = "image"
LIKE_FILE_NAME = re.compile(r"((image|img|photo|picture|file)s?[-_ ]?)?(file|path|name|id)s?|image|img", re.I)


def read_metadata(listing: Listing, config: DataConfig, has_classes: bool) -> tuple[datasets.DatasetDict, str] | None:
    """The images that metadata files label, with the columns of those.

    Args:
        listing: The files; what is left out is added to it.
        config: The label's column, and whether files that are not there are left out.
        has_classes: Whether folders can give the labels; then metadata needs a column for it by name.

    Returns:
        A table for each split, and the name of one of these files; None: the folders give the labels.

    Raises:
        TinyTLError: A file cannot be read, or names images that are not there.
    """
    frames = {path: frame for path in listing.metadata if (frame := _read(listing, path)) is not None}
    if not frames:
        return None
    wanted = config.label_column or LABEL
    frames_with = {path: frame for path, frame in frames.items() if wanted in frame.columns}
    used = frames_with or frames
    name = next(iter(used))
    if not frames_with and has_classes:
        if config.label_column not in (None, LABEL):
            columns = sorted({str(column) for frame in frames.values() for column in frame.columns} - {FILE_NAME})
            raise TinyTLError(f"data.label_column={wanted}: no such column; {name} has {', '.join(columns)}")
        logger.info(
            "%s has no column %s: the class folders are the labels, and --data.label_column names another column",
            name,
            LABEL,
        )
        return None
    table = pd.concat(used.values(), ignore_index=True)
    if table.empty:
        raise TinyTLError(f"{listing.root / name}: names no image; write a line for each, or take it away")
    why_not = {
        image: f"named by {path}, which has no column {wanted}"
        for path, frame in frames.items()
        for image in frame[FILE_NAME]
    }
    _check_files(listing, table, name, config.skip_corrupt, why_not)
    if wanted in table.columns and SPLIT not in table.columns:  # whose test images have often none
        _check_labels(table, name, wanted)
    splits = _split(listing, table, config)
    return with_whole_numbers(splits) if all(_is_csv(path) for path in used) else splits, name


def _read(listing: Listing, path: str) -> pd.DataFrame | None:
    place = listing.root / path
    check_is_here(place)
    try:
        if _is_csv(path):
            frame = read_csv(place)
        elif path.lower().endswith(".jsonl"):
            frame = pd.DataFrame(json_columns([str(place)]), dtype=object)
        else:
            frame = _read_parquet(place)
    except TinyTLError:
        raise
    except Exception as error:  # damaged files can make pandas raise almost anything
        raise TinyTLError(f"{place}: cannot be read ({first_line(error)}); mend it or take it away") from error
    if FILE_NAME not in frame.columns:
        fix = ""
        if (meant := _meant(frame)) is not None:
            listing.almost_metadata[path] = meant
            fix = f"; if {meant} names the images, call it {FILE_NAME}"
        columns = named([str(column) for column in frame.columns])
        logger.warning("%s: not used, as it has no column %s (but %s)%s", path, FILE_NAME, columns, fix)
        return None
    prefix = os.path.dirname(path)
    if unnamed := int((frame[FILE_NAME].isna() & frame.drop(columns=FILE_NAME).notna().any(axis=1)).sum()):
        listing.left_out.add(f"line without a {FILE_NAME}", path, unnamed)
    frame = frame[frame[FILE_NAME].notna()].copy()
    names = [_below_root(listing.root, prefix, str(name)) for name in frame[FILE_NAME]]
    there = set(listing.images)
    if not there.issuperset(names):  # systems write one accented letter, and what is between folders, in two ways
        spelled = {name: images[0] for name, images in images_by_id(listing.images).items() if len(images) == 1}
        spelled |= {as_label(image): image for image in listing.images}
        names = [
            name if name in there else spelled.get(_with_slashes(as_label(name.rstrip())), name) for name in names
        ]
    frame[FILE_NAME] = names
    return frame


def _read_parquet(place: Path) -> pd.DataFrame:
    """A parquet file with the names of classes in place of the numbers that stand for them."""
    frame = pd.read_parquet(place)
    if FILE_NAME in frame.index.names:  # as pandas writes it where it stands for the rows
        frame = frame.reset_index()
    for column, names in class_names(pyarrow.parquet.read_schema(place)).items():
        known = dict(enumerate(names))  # without a label are those of other numbers, such as -1
        frame[column] = [known.get(number) for number in frame[column]]
    return frame


def _meant(frame: pd.DataFrame) -> str | None:
    """The column that was likely meant to be ``file_name``: by its values, else by its name."""
    first = {str(column): next(iter(frame[column].dropna()), None) for column in frame.columns}
    paths = [name for name, value in first.items() if isinstance(value, str) and is_path(value)]
    return next(iter(paths or [name for name in first if LIKE_FILE_NAME.fullmatch(name)]), None)


def _is_csv(path: str) -> bool:
    return path.lower().endswith(".csv")


def _below_root(root: Path, prefix: str, name: str) -> str:
    """The path relative to the data set's folder of an image that a file in the folder ``prefix`` names."""
    name = path_of(name)
    if "://" in name:  # an address, which is shown as it stands there
        return name
    if os.path.isabs(name):
        folder, file = os.path.split(name)
        path = os.path.relpath(os.path.join(os.path.realpath(folder), file), root)
        return name if path.startswith("..") else path.replace(os.sep, "/")
    return os.path.normpath(os.path.join(prefix, name)).replace(os.sep, "/")


def _with_slashes(path: str) -> str:
    return os.path.normpath(path.replace("\\", "/"))


def _check_files(
    listing: Listing, table: pd.DataFrame, metadata: str, skip_missing: bool, why_not: Mapping[str, str]
) -> None:
    """Compare the files that metadata names with those that are there, both ways.

    Args:
        listing: The files; what is left out is added to it.
        table: The metadata.
        metadata: Where that is from.
        skip_missing: Whether images that are not there are left out.
        why_not: Why images are left out that only metadata names which is not used.
    """
    names, there = list(table[FILE_NAME]), set(listing.images)
    if twice := table.loc[table[FILE_NAME].duplicated(), FILE_NAME].tolist():
        others = f" (also {', '.join(listing.metadata[1:])})" if len(listing.metadata) > 1 else ""
        raise TinyTLError(f"{metadata}{others}: names {twice[0]} twice; leave one of the two out")
    missing = [name for name in names if name not in there]
    if missing and not skip_missing:
        raise TinyTLError(
            f"{metadata}: names {named(missing, shown=1)}, and there is no such image in {listing.root}; mend it, "
            "or leave such lines out with --data.skip_corrupt true"
        )
    if missing:
        listing.left_out.add("named by metadata, but not there", missing[0], len(missing))
    labelled = set(names)
    for path in listing.images:
        if path not in labelled:
            listing.left_out.add(why_not.get(path, f"not named by {os.path.basename(metadata)}"), path)


def _check_labels(table: pd.DataFrame, metadata: str, column: str) -> None:
    """Name an image without a label beside others that have one, and two whose labels are of two kinds."""
    check_one_kind(table[column].tolist(), column, table[FILE_NAME].tolist())
    empty = table[column].isna()
    if empty.any() and not empty.all() and not _is_empty_in_whole_folders(table, empty):
        raise TinyTLError(
            f"{metadata}: {table.loc[empty, FILE_NAME].iloc[0]} has no {column}; fill it in, or leave that line out"
        )


def _is_empty_in_whole_folders(table: pd.DataFrame, empty: pd.Series) -> bool:
    """Whether folders have no label at all or one for each image: a test split has often none."""
    shares = empty.groupby(table[FILE_NAME].map(os.path.dirname)).mean()
    return bool(shares.isin([0, 1]).all())


def _split(listing: Listing, table: pd.DataFrame, config: DataConfig) -> datasets.DatasetDict:
    """A table for each split, with the images as paths, in the order of their names."""
    rows = table[table[FILE_NAME].isin(set(listing.images))].sort_values(FILE_NAME, ignore_index=True)
    chosen = chosen_splits(config)
    folders = [path.split("/")[:-1] for path in rows[FILE_NAME]]
    depth = _depth_of_splits(folders, chosen)
    top = pd.Series([folder[depth] if len(folder) > depth else "" for folder in folders], dtype=str)
    tops: dict[str, Folder] = defaultdict(Folder)
    for path, name in zip(rows[FILE_NAME], top, strict=True):
        tops[name].direct.append(path)
    loose = tops.pop("", None)
    splits = find_splits(dict(tops), listing, config, labelled=True)
    parts = {"train": rows}
    if splits is None:
        say_odd_names(list(tops), labelled=True)
    if splits is not None and (loose is None or len(splits) > 1):
        if loose is not None:
            listing.left_out.add("beside the splits", loose.example, len(loose.direct))
        parts = {name: rows[top == folder] for name, folder in splits.items()}
    return datasets.DatasetDict({name: _table(listing.root, part) for name, part in parts.items()})


def _depth_of_splits(folders: list[list[str]], chosen: set[str]) -> int:
    """At which level folders may be splits: below those that all images have in common, as in ``data/train``."""
    depth = 0
    for level in zip(*folders, strict=False):
        if len(set(level)) > 1 or role_of(level[0]) or level[0] in chosen:
            break
        depth += 1
    return depth


def _table(root: Path, rows: pd.DataFrame) -> datasets.Dataset:
    columns: dict[str, list[Any]] = {IMAGE: [f"{root}/{path}" for path in rows[FILE_NAME]]}
    for name in rows.columns:
        if str(name) not in (FILE_NAME, IMAGE):
            columns[str(name)] = rows[name].tolist()
    return table_of(columns).cast_column(IMAGE, datasets.Image(decode=False))
