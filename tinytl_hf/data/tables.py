"""A data set's name to tables, one for each split, from whichever source it is."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import datasets
import datasets.exceptions
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from tinytl_hf.config.check import check
from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.columns import images_named
from tinytl_hf.data.find import ARCHIVES, TABLES, Source, find, suffix_of
from tinytl_hf.data.folder import class_folders
from tinytl_hf.data.found import LeftOut, named
from tinytl_hf.data.hub_layout import (
    check_subset,
    has_configs,
    say_configs_not_taken,
    say_missing_parts,
    with_named_classes,
)
from tinytl_hf.data.images import IMAGE_SUFFIXES, allow_megapixels
from tinytl_hf.data.listing import Listing, list_folder
from tinytl_hf.data.lists_beside import say_lists_beside
from tinytl_hf.data.metadata import read_metadata
from tinytl_hf.data.pointers import check_is_here
from tinytl_hf.data.roles import group_by_split, role_of, role_of_table
from tinytl_hf.data.saved import is_saved, load_saved, open_saved, saved_below
from tinytl_hf.data.split_column import by_split_column
from tinytl_hf.data.table_files import WITH_CLASSES, check_alike, load_tables, state_of, table_at
from tinytl_hf.data.tables_beside import check_tables_beside, is_to_hand_in, labelling_tables, to_name
from tinytl_hf.errors import TinyTLError

logger = logging.getLogger(__name__)

SHEETS = (".xlsx", ".xls", ".ods")
TEXTS = (".csv", ".tsv", ".json", ".jsonl")  # tables that hold no images themselves


@dataclass(frozen=True)
class Tables:
    """A data set as it was found.

    Attributes:
        source: Where it is.
        splits: A table for each split.
        base: Folder that paths in the tables are relative to; None: they are not on this disk.
        left_out: The files that were left out.
        metadata: The file beside the images that has the labels, or None.
        hint: What may have gone wrong if there is one class only.
    """

    source: Source
    splits: datasets.DatasetDict
    base: Path | None = None
    left_out: LeftOut = field(default_factory=LeftOut)
    metadata: str | None = None
    hint: str = ""


def load(config: DataConfig) -> Tables:
    """Find and open a data set, without decoding an image.

    Raises:
        TinyTLError: It cannot be found or read.
    """
    if config.max_megapixels is not None:
        allow_megapixels(config.max_megapixels)
    source = find(config.dataset)
    try:
        tables = _open(source, config)
        return replace(tables, splits=by_split_column(tables.splits, config))
    except TinyTLError:
        raise
    except Exception as error:  # damaged files can make datasets raise almost anything
        check_subset(error, config)
        where = "no such folder here, and from the Hub: " if source.place == "hub" else ""
        raise TinyTLError(
            f"data.dataset={config.dataset}: cannot be loaded ({where}{_reason(error)}); use a Hub id, the path of a "
            "folder or of a .parquet, .csv or .json file, or digits"
        ) from error


def _open(source: Source, config: DataConfig) -> Tables:
    if source.place == "digits":
        _check_no_subset(config, "digits is a single table")
        return Tables(source, datasets.DatasetDict(train=_digits()))
    if source.place == "url":
        return Tables(source, _load_url(source.name, config))
    if source.place == "hub":
        return Tables(source, _load_any(source.name, config))
    return _load_folder(source, config) if os.path.isdir(source.name) else _load_files(source, config)


def _check_no_subset(config: DataConfig, what: str) -> None:
    check(config.subset is None, "data.subset", config.subset, f"{what}, which has no subsets; leave that option out")


def _reason(error: BaseException) -> str:
    """The first line of an error, and of the one that it was raised from."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    parts: list[str] = []
    for each in dict.fromkeys((error, cause)):
        line = next(iter(str(each).strip().splitlines()), "")
        if line and line in parts:
            continue
        is_plain = line and isinstance(each, (OSError, datasets.exceptions.DatasetsError))
        parts.append(line if is_plain else f"{type(each).__name__}: {line}")
    return "; ".join(part.rstrip(": ") for part in parts)


def _load_folder(source: Source, config: DataConfig) -> Tables:
    path = Path(source.name)
    if is_saved(path):
        _check_no_subset(config, f"{path} is a saved data set")
        return Tables(source, open_saved(path), path)
    listing = list_folder(path)
    if _holds_images(listing):
        _check_no_subset(config, f"{path} is a folder of images")
        return _label_images(source, listing, config)
    if listing.tables:
        return _load_tables_in(source, listing, config)
    aside = f"; {listing.left_out}" if listing.left_out else ""
    what = f"no image, but {listing.archives[0]}; unpack it first" if listing.archives else "no image and no table"
    raise TinyTLError(
        f"data.dataset={path}: cannot be loaded (it holds {what}{aside}); use a folder of images or tables"
    )


def _holds_images(listing: Listing) -> bool:
    """Whether a folder is one of images: with large tables beside them, they need metadata or class folders."""
    large = [name for name in listing.tables if suffix_of(name) not in TEXTS]
    if not listing.images or not large or listing.metadata:
        return bool(listing.images)
    if len(_tops(listing)) < 2 or has_configs(listing.root):
        return False
    splits = [name for name in large if role_of_table(name) and TABLES[suffix_of(name)] in WITH_CLASSES]
    if len({role_of_table(name) for name in splits}) > 1:
        raise TinyTLError(
            f"data.dataset={listing.root}: the folders of its images can be classes ({named(sorted(_tops(listing)))}) "
            f"and {splits[0]} can be the data; name {to_name(listing, splits)}, or take one of the two away"
        )
    return True


def _label_images(source: Source, listing: Listing, config: DataConfig) -> Tables:
    """Images with the labels of their metadata, or else of their folders."""
    for name in (*listing.tables, *listing.archives):
        if suffix_of(name) not in TEXTS:
            listing.left_out.add(suffix_of(name), name)
    tops, are_splits, hint = _tops(listing), _are_flat_splits(listing), _hint(listing)
    if labelled := read_metadata(listing, config, has_classes=len(tops) > 1 and not are_splits):
        splits, metadata = labelled
        return Tables(source, splits, listing.root, listing.left_out, metadata, hint)
    if listing.almost_metadata:
        hint = f"; {_fix_of_metadata(listing)}"
        if are_splits or not tops:
            raise TinyTLError(
                f"data.dataset={listing.root}: its images lie in no class folder ({listing.images[0]}){hint}"
            )
        listing.tables += listing.almost_metadata if len(tops) > 1 else {}
    tables = [name for name in listing.tables if suffix_of(name) != ".json"]
    if tables and (are_splits or not tops):
        fix = "write a metadata.csv with columns file_name and label"
        if labelling := [name for name in tables if not is_to_hand_in(name)]:
            fix = f"if {labelling[0]} has their paths and labels, name {to_name(listing, labelling)}"
        raise TinyTLError(
            f"data.dataset={listing.root}: its images lie in no class folder ({listing.images[0]}); {fix}"
        )
    splits = class_folders(listing, config)
    check_tables_beside(listing, splits, config)
    if splits.keys() == {"train"}:
        say_lists_beside(listing)
        say_configs_not_taken(listing.root)
    return Tables(source, splits, listing.root, listing.left_out, hint=hint)


def _fix_of_metadata(listing: Listing) -> str:
    """What to do about metadata without a column ``file_name``."""
    name, column = next(iter(listing.almost_metadata.items()))
    return f"{name} has no column file_name: if its column {column} names the images, call that file_name"


def _are_flat_splits(listing: Listing) -> bool:
    """Whether all images lie right in folders that are called as two splits or more are: there is no class folder."""
    roles = {role_of(top) for top in _tops(listing)}
    return all(path.count("/") == 1 for path in listing.images) and len(roles) > 1 and None not in roles


def _tops(listing: Listing) -> set[str]:
    """Names of the first folders of images."""
    return {path.split("/")[0] for path in listing.images if "/" in path}


def _hint(listing: Listing) -> str:
    """What to try if a folder of images turns out to have one class."""
    folders = [path.split("/")[:-1] for path in listing.images]
    common = os.path.commonpath([f"/{'/'.join(folder)}" for folder in folders]).strip("/")
    depth = len(Path(common).parts)
    below = sorted({folder[depth] for folder in folders if len(folder) > depth})
    if common and len(below) > 1:
        what = "splits" if all(role_of(name) for name in below) else "classes"
        return f"; if {named(below)} are the {what}, name {listing.root / common}"
    tables = labelling_tables(listing)
    return f"; if {tables[0]} has the paths and labels of images, name {to_name(listing, tables)}" if tables else ""


def _load_tables_in(source: Source, listing: Listing, config: DataConfig) -> Tables:
    """The tables of a folder; images that lie beside them are left out, unless the tables name them."""
    say_missing_parts(listing.tables)
    if config.subset is not None or has_configs(listing.root):
        if glob.has_magic(source.name):
            raise TinyTLError(
                f"data.dataset={listing.root}: its README names files by patterns; take [, ], * and ? out of the path"
            )
        for name in listing.tables:
            check_is_here(listing.root / name)
        cache = _cache_of(listing)
        builder = datasets.load_dataset_builder(source.name, config.subset, cache_dir=cache)
        check_alike([str(file) for files in (builder.config.data_files or {}).values() for file in files])
        splits = _load_any(source.name, config, cache)
    elif saved := saved_below(listing):
        splits = load_saved(listing, saved)
    else:
        splits = with_named_classes(listing.root, load_tables(_files_by_split(listing), listing.root))
    if listing.images:
        used = {place for table in splits.values() for place in images_named(table, listing.root)}
        for name in listing.images:
            if str(listing.root / name) not in used:
                listing.left_out.add(suffix_of(name), name)
    return Tables(source, splits, listing.root, listing.left_out)


def _files_by_split(listing: Listing) -> dict[str, list[str]]:
    """Table files of one kind, the first of ``TABLES``, by the split that their names say, as on the Hub."""
    present = {TABLES[suffix_of(name)] for name in listing.tables}
    kind = next(kind for kind in TABLES.values() if kind in present)
    groups = group_by_split(name for name in listing.tables if TABLES[suffix_of(name)] == kind)
    return _whole_paths(groups, listing, listing.tables)


def _load_files(source: Source, config: DataConfig) -> Tables:
    """A file, or all that a pattern matches: by the splits that their names say, if several, else all to train on."""
    _check_no_subset(config, f"{source.name} is a file")
    files = [source.name]
    if not os.path.isfile(source.name):
        files = sorted(file for file in glob.glob(source.name, recursive=True) if os.path.isfile(file))
    if not files and suffix_of(source.name) in TABLES:  # a pipe would be waited for, for ever
        raise TinyTLError(f"data.dataset={config.dataset}: is no file, but a pipe, a device or the like; name a file")
    for file in files or [source.name]:
        suffix = suffix_of(file)
        if suffix not in TABLES:
            fix = "name the folder of the images" if suffix in IMAGE_SUFFIXES else "name a folder, or such a file"
            fix = "unpack it, and name the folder" if suffix in ARCHIVES else fix
            fix = "save it as a .csv file, and name that" if suffix in SHEETS else fix
            raise TinyTLError(f"data.dataset={config.dataset}: {file} is no {', '.join(TABLES)} file; {fix}")
    files = sorted({os.path.realpath(file): file for file in reversed(files)}.values())  # links can lead in circles
    listing = Listing(Path(os.path.commonpath([os.path.dirname(file) for file in files])))
    names = [os.path.relpath(file, listing.root) for file in files]
    groups = group_by_split(names)
    if len(groups.keys() - {None}) < 2:
        if len(groups) == 2:
            logger.warning(
                "%s files are read as one split, though %s is called as a split is and %s is not; name those alone "
                "that belong together",
                *(f"{len(names):,}", next(group[0] for split, group in groups.items() if split), groups[None][0]),
            )
        groups = {"train": names}
    splits = load_tables(_whole_paths(groups, listing, names), listing.root)
    return Tables(source, splits, listing.root, listing.left_out)


def _whole_paths(
    groups: Mapping[str | None, list[str]], listing: Listing, names: Iterable[str]
) -> dict[str, list[str]]:
    """The files of each split by their whole paths; of ``names``, those that are of none are left out."""
    files = {split: group for split, group in groups.items() if split is not None}
    used = {name for group in files.values() for name in group}
    for name in names:
        if name not in used:
            listing.left_out.add(suffix_of(name), name)
    return {split: [str(listing.root / name) for name in group] for split, group in files.items()}


def _load_url(url: str, config: DataConfig) -> datasets.DatasetDict:
    suffix = suffix_of(urlparse(url).path)
    if page := re.match(r"(https?://(?:huggingface\.co/datasets|github\.com)/[^/]+/[^/]+/)blob(/.*)", url):
        fix = f"{page[1]}{'resolve' if 'huggingface' in page[1] else 'raw'}{page[2]}"
        raise TinyTLError(f"data.dataset={url}: is a page about a file; name the file, {fix}")
    if suffix in TABLES:
        _check_no_subset(config, f"{url} is a file")
        return datasets.DatasetDict(train=table_at(url, TABLES[suffix]))
    if url.startswith("hf://"):
        return _load_any(url, config)
    if page := re.match(r"https?://huggingface\.co/datasets/([\w.-]+(?:/(?!tree|viewer)[\w.-]+)?)", url):
        raise TinyTLError(f"data.dataset={url}: is a page of the Hub; name the data set, as --data.dataset {page[1]}")
    raise TinyTLError(
        f"data.dataset={url}: not the address of a {', '.join(TABLES)} file; download it, and name the folder"
    )


def _load_any(name: str, config: DataConfig, cache: str | None = None) -> datasets.DatasetDict:
    return _as_splits(datasets.load_dataset(name, config.subset, cache_dir=cache))


def _cache_of(listing: Listing) -> str:
    """Where to keep what is read of a folder whose README names the files: else by the folder's last name alone."""
    also = [listing.root / name for name in ("README.md", "dataset_infos.json") if (listing.root / name).is_file()]
    files = [listing.root / name for name in (*listing.tables, *listing.metadata, *listing.images)]
    return os.path.join(datasets.config.HF_DATASETS_CACHE, state_of([*also, *files]))


def _as_splits(loaded: Any) -> datasets.DatasetDict:
    return loaded if isinstance(loaded, datasets.DatasetDict) else datasets.DatasetDict(train=loaded)


def _digits() -> datasets.Dataset:
    digits = load_digits()
    images = [Image.fromarray((image / 16 * 255).round().astype(np.uint8)) for image in digits.images]
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[str(name) for name in digits.target_names])
    )
    return datasets.Dataset.from_dict({"image": images, "label": digits.target}, features=features)
