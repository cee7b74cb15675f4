"""A data set's name to tables, one for each split, from whichever source it is."""

from __future__ import annotations

import glob
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import datasets
import datasets.exceptions
import numpy as np
import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from PIL import Image
from sklearn.datasets import load_digits

from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.columns import images_named
from tinytl_hf.data.find import ARCHIVES, TABLES, Source, find
from tinytl_hf.data.folder import class_folders
from tinytl_hf.data.found import LeftOut, named
from tinytl_hf.data.images import IMAGE_SUFFIXES
from tinytl_hf.data.listing import Listing, list_folder
from tinytl_hf.data.metadata import read_metadata
from tinytl_hf.data.roles import chosen_splits, role_of, role_of_table
from tinytl_hf.data.split_column import by_split_column
from tinytl_hf.data.table_files import is_saved, load_saved, load_tables, saved_below, table_at
from tinytl_hf.data.tables_beside import check_tables_beside
from tinytl_hf.errors import TinyTLError


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
    source = find(config.dataset)
    if config.subset is not None and (source.place in ("digits", "url") and not source.name.startswith("hf://")):
        raise TinyTLError(f"data.subset={config.subset}: {source.name} has no subsets; leave that option out")
    if source.place == "digits":
        return Tables(source, datasets.DatasetDict(train=_digits()))
    where = "no such folder here, and from the Hub: " if source.place == "hub" else ""
    with explained(config.dataset, where):
        if source.place == "local":
            path = Path(source.name)
            tables = _load_folder(source, path, config) if path.is_dir() else _load_files(source, config)
        else:
            splits = _load_url(source.name, config) if source.place == "url" else _load_any(source.name, config)
            tables = Tables(source, splits)
        return replace(tables, splits=by_split_column(tables.splits, config))


@contextmanager
def explained(name: str, where: str = "") -> Iterator[None]:
    """Turn what the library datasets raises into one line, with the cause that it hides."""
    try:
        yield
    except TinyTLError:
        raise
    except Exception as error:  # damaged files can make datasets raise almost anything
        raise TinyTLError(
            f"data.dataset={name}: cannot be loaded ({where}{_reason(error)}); use a Hub id, the path of a folder or "
            "of a .parquet, .csv or .json file, or digits"
        ) from error


def _reason(error: BaseException) -> str:
    """The first line of an error, and of the one that it was raised from."""
    cause = error.__cause__
    while cause is not None and cause.__cause__ is not None:
        cause = cause.__cause__
    parts = []
    for each in (error, cause):
        lines = [line for line in str(each).strip().splitlines() if line.strip()] if each is not None else []
        if each is not None and not (lines and lines[0] in parts):
            is_plain = isinstance(each, (OSError, datasets.exceptions.DatasetsError))
            parts.append(lines[0] if lines and is_plain else f"{type(each).__name__}: {lines[0] if lines else ''}")
    return "; ".join(part.rstrip(": ") for part in parts)


def _load_folder(source: Source, path: Path, config: DataConfig) -> Tables:
    if is_saved(path):
        if config.subset is not None:
            raise TinyTLError(f"data.subset={config.subset}: {path} is a saved data set, which has no subsets")
        loaded = datasets.load_from_disk(str(path))
        splits = loaded if isinstance(loaded, datasets.DatasetDict) else datasets.DatasetDict(train=loaded)
        return Tables(source, splits, path)
    listing = list_folder(path)
    if _holds_images(listing):
        if config.subset is not None:
            raise TinyTLError(f"data.subset={config.subset}: {path} is a folder of images, which has no subsets")
        for name in (*listing.tables, *listing.archives):
            if os.path.splitext(name)[1].lower() in {".parquet", ".arrow", ".tar", *ARCHIVES}:
                listing.left_out.add(os.path.splitext(name)[1].lower(), name)
        splits, metadata = _label_images(listing, config)
        return Tables(source, splits, path, listing.left_out, metadata, _hint(listing))
    if listing.tables:
        splits = _load_tables_of(listing, config)
        tables = splits.values() if listing.images else ()  # else no file is looked for among those that they name
        named = {place for table in tables for place in images_named(table, path)}
        for name in listing.images:
            if str(path / name) not in named:
                listing.left_out.add(os.path.splitext(name)[1].lower(), name)
        return Tables(source, splits, path, listing.left_out)
    aside = f"; {listing.left_out}" if listing.left_out else ""
    what = f"no image, but {listing.archives[0]}; unpack it first" if listing.archives else "no image and no table"
    raise TinyTLError(
        f"data.dataset={path}: cannot be loaded (it holds {what}{aside}); use a folder of images or tables"
    )


def _load_tables_of(listing: Listing, config: DataConfig) -> datasets.DatasetDict:
    if config.subset is not None or _has_configs(listing.root):
        if glob.has_magic(str(listing.root)):
            raise TinyTLError(
                f"data.dataset={listing.root}: its README names files by patterns; take [, ], * and ? out of the path"
            )
        return _load_any(str(listing.root), config)
    if saved := saved_below(listing):
        return load_saved(listing, saved)
    return load_tables(_by_split(listing), listing.root)


def _label_images(listing: Listing, config: DataConfig) -> tuple[datasets.DatasetDict, str | None]:
    """Tables of images with their labels, and the metadata file that these are from, if they are."""
    has_folders = any("/" in path for path in listing.images)
    are_splits = _are_flat_splits(listing)
    metadata = read_metadata(listing, config, has_classes=len(_tops(listing)) > 1 and not are_splits)
    if metadata is not None:
        return metadata.splits, metadata.name
    tables = [name for name in listing.tables if not name.endswith(".json")]
    if tables and (are_splits or not has_folders):
        raise TinyTLError(
            f"data.dataset={listing.root}: its images lie in no class folder ({listing.images[0]}); if {tables[0]} "
            f"has their paths and labels, name {_to_name(listing, tables)}"
        )
    splits = class_folders(listing, chosen_splits(config))
    check_tables_beside(listing, splits, config)
    return splits, None


def _to_name(listing: Listing, tables: list[str]) -> str:
    """What to name for the tables beside images: all of them by a pattern, if they are of several splits."""
    kinds = {os.path.splitext(name)[1] for name in tables}
    folders = {os.path.dirname(name) for name in tables}
    if len(kinds) == len(folders) == 1 and len({role_of_table(name) for name in tables} - {None}) > 1:
        return f"these files, '{listing.root / folders.pop() / f'*{kinds.pop()}'}'"
    return f"that file, {listing.root / tables[0]}"


def _are_flat_splits(listing: Listing) -> bool:
    """Whether all images lie right in folders that are called as two splits or more are: there is no class folder."""
    tops = _tops(listing)
    is_flat = all(path.count("/") == 1 for path in listing.images)
    return is_flat and len({role_of(top) for top in tops}) > 1 and all(role_of(top) for top in tops)


def _holds_images(listing: Listing) -> bool:
    """Whether a folder is one of images: with tables beside them they must lie in class folders or have metadata."""
    large = [
        name for name in listing.tables if os.path.splitext(name)[1].lower() not in {".csv", ".tsv", ".json", ".jsonl"}
    ]
    if not listing.images or not large:
        return bool(listing.images)
    are_folders = bool(listing.metadata) or (len(_tops(listing)) > 1 and not _has_configs(listing.root))
    splits = [name for name in large if role_of_table(name) and name.endswith((".parquet", ".arrow"))]
    if are_folders and not listing.metadata and len({role_of_table(name) for name in splits}) > 1:
        raise TinyTLError(
            f"data.dataset={listing.root}: the folders of its images can be classes ({named(sorted(_tops(listing)))}) "
            f"and {splits[0]} can be the data; name {_to_name(listing, splits)}, or take one of the two away"
        )
    return are_folders


def _tops(listing: Listing) -> set[str]:
    return {path.split("/")[0] for path in listing.images if "/" in path}


def _hint(listing: Listing) -> str:
    """What to try if a folder of images turns out to have one class."""
    tops = _tops(listing)
    below = sorted({path.split("/")[1] for path in listing.images if path.count("/") > 1})
    if len(tops) == 1 and len(below) > 1:
        (top,) = tops
        return f"; if {', '.join(below[:5])} are the classes, name {listing.root / top}"
    tables = [name for name in listing.tables if name.endswith((".csv", ".tsv", ".jsonl", ".parquet"))]
    return f"; if {tables[0]} has the paths and labels of images, name {listing.root / tables[0]}" if tables else ""


def _by_split(listing: Listing) -> dict[str, list[str]]:
    """Table files of one kind, the first of ``TABLES``, by the split that their names say, as on the Hub."""
    present = {TABLES[os.path.splitext(name)[1].lower()] for name in listing.tables}
    kind = next(kind for kind in TABLES.values() if kind in present)
    tables = [name for name in listing.tables if TABLES[os.path.splitext(name)[1].lower()] == kind]
    roles = {name: role_of_table(name) for name in tables}
    if not any(roles.values()):
        roles = dict.fromkeys(tables, "train")
    return _grouped(listing, {name: roles.get(name) for name in listing.tables})


def _grouped(listing: Listing, roles: Mapping[str, str | None]) -> dict[str, list[str]]:
    """Table files by their split; those of none are left out."""
    result: dict[str, list[str]] = defaultdict(list)
    for name, role in roles.items():
        if role is None:
            listing.left_out.add(os.path.splitext(name)[1].lower(), name)
        else:
            result[role].append(str(listing.root / name))
    return dict(result)


def _load_files(source: Source, config: DataConfig) -> Tables:
    """A file, or all files that a pattern matches."""
    if config.subset is not None:
        raise TinyTLError(f"data.subset={config.subset}: {source.name} is a file, which has no subsets")
    is_file = os.path.isfile(source.name)
    files = (
        [source.name] if is_file else sorted(f for f in glob.glob(source.name, recursive=True) if os.path.isfile(f))
    )
    for file in files or [source.name]:
        suffix = os.path.splitext(file)[1].lower()
        if suffix not in TABLES:
            fix = "name the folder of the images" if suffix in IMAGE_SUFFIXES else "name a folder, or such a file"
            fix = "unpack it, and name the folder" if suffix in ARCHIVES else fix
            raise TinyTLError(f"data.dataset={config.dataset}: {file} is no {', '.join(TABLES)} file; {fix}")
    files = sorted({os.path.realpath(file): file for file in reversed(files)}.values())  # links can lead in circles
    base = Path(os.path.commonpath([os.path.dirname(file) for file in files]))
    listing = Listing(base)
    return Tables(source, load_tables(_by_role(files, listing), base), base, listing.left_out)


def _by_role(files: list[str], listing: Listing) -> dict[str, list[str]]:
    """Files by the split that their names say, if they say several; all of them to train on, if not."""
    names = [os.path.relpath(file, listing.root) for file in files]
    roles = {name: role_of_table(name) for name in names}
    return _grouped(listing, roles) if len(set(roles.values()) - {None}) > 1 else {"train": files}


def _load_url(url: str, config: DataConfig) -> datasets.DatasetDict:
    suffix = os.path.splitext(urlparse(url).path)[1].lower()
    if suffix in TABLES:
        return datasets.DatasetDict(train=table_at(url, TABLES[suffix]))
    if url.startswith("hf://"):
        return _load_any(url, config)
    raise TinyTLError(
        f"data.dataset={url}: not the address of a {', '.join(TABLES)} file; download it, and name the folder"
    )


def _load_any(name: str, config: DataConfig) -> datasets.DatasetDict:
    loaded: Any = datasets.load_dataset(name, config.subset)
    return loaded if isinstance(loaded, datasets.DatasetDict) else datasets.DatasetDict(train=loaded)


def _has_configs(folder: Path) -> bool:
    """Whether the README of a data set in the Hub's layout says which files are which split."""
    try:
        head = REGEX_YAML_BLOCK.search((folder / "README.md").read_text(encoding="utf-8-sig"))
        values = yaml.safe_load(head[2]) if head else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(values, dict) and "configs" in values


def _digits() -> datasets.Dataset:
    digits = load_digits()
    images = [Image.fromarray((image / 16 * 255).round().astype(np.uint8)) for image in digits.images]
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[str(name) for name in digits.target_names])
    )
    return datasets.Dataset.from_dict({"image": images, "label": digits.target}, features=features)
