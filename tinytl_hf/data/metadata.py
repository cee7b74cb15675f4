"""``metadata.csv`` and the like: labels of image files by their names."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import datasets
import pandas as pd

from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.columns import LABEL
from tinytl_hf.data.folder import Folder, find_splits
from tinytl_hf.data.listing import Listing
from tinytl_hf.data.roles import chosen_splits
from tinytl_hf.errors import TinyTLError

logger = logging.getLogger(__name__)

FILE_NAME = "file_name"
IMAGE = "image"


def read_csv(place: str | Path) -> pd.DataFrame:
    """A CSV or TSV file, on this disk or at a URL, with all columns as texts; only what is empty is missing."""
    separator = "\t" if str(place).lower().endswith(".tsv") else ","
    return pd.read_csv(place, sep=separator, dtype=str, keep_default_na=False, na_values=[""], encoding="utf-8-sig")


def read_metadata(listing: Listing, config: DataConfig, has_classes: bool) -> datasets.DatasetDict | None:
    """The images that metadata files label, with the columns of those.

    Args:
        listing: The files; what is left out is added to it.
        config: The label's column, and whether files that are not there are left out.
        has_classes: Whether folders can give the labels; then metadata needs a column for it by name.

    Returns:
        A table for each split; None: the folders give the labels.

    Raises:
        TinyTLError: A file cannot be read, or names images that are not there.
    """
    frames = [frame for path in listing.metadata if (frame := _read(listing, path)) is not None]
    if not frames:
        return None
    wanted = config.label_column or LABEL
    columns = sorted({str(column) for frame in frames for column in frame.columns} - {FILE_NAME})
    frames_with = [frame for frame in frames if wanted in frame.columns]
    if not frames_with and has_classes:
        if config.label_column not in (None, LABEL):
            raise TinyTLError(
                f"data.label_column={wanted}: no such column; {listing.metadata[0]} has {', '.join(columns)}"
            )
        logger.info(
            "%s has no column %s: the class folders are the labels, and --data.label_column names another column",
            listing.metadata[0],
            LABEL,
        )
        return None
    table = pd.concat(frames_with or frames, ignore_index=True)
    _check_files(listing, table, config.skip_corrupt)
    return _split(listing, table, config)


def _read(listing: Listing, path: str) -> pd.DataFrame | None:
    place = listing.root / path
    try:
        if path.endswith(".csv"):
            frame = read_csv(place)
        elif path.endswith(".jsonl"):
            frame = pd.read_json(place, lines=True, dtype=False, convert_dates=False)
        else:
            frame = pd.read_parquet(place)
    except Exception as error:  # damaged files can make pandas raise almost anything
        raise TinyTLError(f"{place}: cannot be read ({_first_line(error)}); mend it or take it away") from error
    if FILE_NAME not in frame.columns:
        logger.warning("%s: not used, as it has no column %s", path, FILE_NAME)
        return None
    prefix = os.path.dirname(path)
    frame = frame[frame[FILE_NAME].notna()].copy()
    frame[FILE_NAME] = [
        os.path.normpath(os.path.join(prefix, str(name))).replace(os.sep, "/") for name in frame[FILE_NAME]
    ]
    return frame


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _check_files(listing: Listing, table: pd.DataFrame, skip_missing: bool) -> None:
    """Compare the files that metadata names with those that are there, both ways."""
    names, there = list(table[FILE_NAME]), set(listing.images)
    if twice := table.loc[table[FILE_NAME].duplicated(), FILE_NAME].tolist():
        raise TinyTLError(f"{listing.metadata[0]}: names {twice[0]} twice; leave one of the two out")
    missing = [name for name in names if name not in there]
    if missing and not skip_missing:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise TinyTLError(
            f"{listing.metadata[0]}: names {missing[0]}{more}, and there is no such image in {listing.root}; mend it, "
            "or leave such lines out with --data.skip_corrupt true"
        )
    if missing:
        listing.leave_out("named by metadata, but not there", missing[0], len(missing))
    named = set(names)
    if unnamed := [path for path in listing.images if path not in named]:
        listing.leave_out(f"not named by {os.path.basename(listing.metadata[0])}", unnamed[0], len(unnamed))


def _split(listing: Listing, table: pd.DataFrame, config: DataConfig) -> datasets.DatasetDict:
    """A table for each split, with the images as paths, in the order of their names."""
    rows = table[table[FILE_NAME].isin(set(listing.images))].sort_values(FILE_NAME, ignore_index=True)
    tops: dict[str, Folder] = defaultdict(Folder)
    for path in rows[FILE_NAME]:
        tops[path.split("/")[0] if "/" in path else ""].direct.append(path)
    splits = None if "" in tops else find_splits(dict(tops), listing, chosen_splits(config), labelled=True)
    parts = {"train": rows}
    if splits is not None:
        folder = rows[FILE_NAME].str.split("/").str[0]
        parts = {name: rows[folder == top] for name, top in splits.items()}
    return datasets.DatasetDict({name: _table(listing.root, part) for name, part in parts.items()})


def _table(root: Path, rows: pd.DataFrame) -> datasets.Dataset:
    columns: dict[str, Any] = {
        str(name): rows[name].tolist() for name in rows.columns if str(name) not in (FILE_NAME, IMAGE)
    }
    table = datasets.Dataset.from_pandas(pd.DataFrame(columns), preserve_index=False)
    paths = datasets.Dataset.from_dict(
        {IMAGE: [f"{root}/{path}" for path in rows[FILE_NAME]]},
        features=datasets.Features({IMAGE: datasets.Image(decode=False)}),
    )
    return datasets.concatenate_datasets([paths, table], axis=1) if columns else paths
