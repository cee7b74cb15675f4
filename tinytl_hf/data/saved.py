"""Data sets that ``save_to_disk`` of the library datasets wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets

from tinytl_hf.data.listing import Listing
from tinytl_hf.data.pointers import check_is_here
from tinytl_hf.data.roles import group_by_split


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` of the library datasets wrote a folder: files of other things have such names, too."""
    if _is_split(folder):
        return True
    try:
        values = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))
    except OSError:
        return False
    except ValueError:
        return True  # a damaged one, as reading it will say
    return isinstance(values, dict) and isinstance(values.get("splits"), list)


def open_saved(folder: Path) -> datasets.DatasetDict:
    """The splits of a saved data set; a single one is to train on."""
    if _is_split(folder):
        return datasets.DatasetDict(train=_split_at(folder))
    names = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    return datasets.DatasetDict({name: _split_at(folder / name) for name in names})


def _is_split(folder: Path) -> bool:
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def _split_at(folder: Path) -> datasets.Dataset:
    """A saved split; of ``select([])`` no file of rows is saved, and the library datasets cannot read that."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    for file in state.get("_data_files") or []:
        check_is_here(folder / file["filename"])
    if state.get("_data_files") != []:
        return datasets.Dataset.load_from_disk(str(folder))
    features = datasets.DatasetInfo.from_directory(str(folder)).features
    return datasets.Dataset.from_dict({name: [] for name in features}, features=features)


def saved_below(listing: Listing) -> list[str]:
    """Folders below that hold saved data sets; files of a cache lie in them as well, and are no rows."""
    folders = sorted({os.path.dirname(name) for name in listing.tables if name.endswith(".arrow")})
    return [folder for folder in folders if is_saved(listing.root / folder)]


def load_saved(listing: Listing, folders: list[str]) -> datasets.DatasetDict:
    """Saved data sets in several folders, by the split that the folders' names say."""
    groups = group_by_split(folders)
    for folder in groups.pop(None, []):
        listing.left_out.add("saved data set", folder)
    splits = datasets.DatasetDict()
    for split, group in groups.items():
        parts = [_split_at(listing.root / folder) for folder in group]
        splits[split] = datasets.concatenate_datasets(parts)
    return splits
