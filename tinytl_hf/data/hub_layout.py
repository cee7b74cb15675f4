"""Data sets in the layout of the Hub: subsets and splits that a README lists, and files in numbered parts."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.beside import say_splits_not_taken
from tinytl_hf.data.found import named
from tinytl_hf.disk import check_is_file
from tinytl_hf.errors import TinyTLError

logger = logging.getLogger(__name__)

README = "README.md"
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(.*)")  # numbered from 0
SUBSETS = re.compile(r"[Aa]vailable(?: configs)?: \[(.*)\]")  # in errors of the library datasets


def has_configs(folder: Path) -> bool:
    """Whether the README of a data set in the Hub's layout says which files are which split."""
    return _head(folder, "configs") is not None


def _head(folder: Path, field: str) -> Any:
    """A field of the metadata at the head of a folder's README."""
    try:
        check_is_file(folder / README)
        head = REGEX_YAML_BLOCK.search((folder / README).read_text(encoding="utf-8-sig"))
        values = yaml.safe_load(head[2]) if head else None
    except Exception:  # no such date, too many digits, too deep: what a value's constructor makes of it
        return None
    return values.get(field) if isinstance(values, dict) else None


def with_named_classes(folder: Path, splits: datasets.DatasetDict) -> datasets.DatasetDict:
    """Tables whose columns of numbers are classes, with names, where the README has ``dataset_info`` of them.

    Raises:
        TinyTLError: A column has other numbers than those of the names.
    """
    for column, names in _named_classes(folder).items():
        for split, table in splits.items():
            if column in table.column_names and pa.types.is_integer(table.features[column].pa_type):
                splits[split] = _with_names(table, column, names, f"{folder / README}: names the classes of {column}")
    return splits


def _with_names(table: datasets.Dataset, column: str, names: list[str], what: str) -> datasets.Dataset:
    numbers = pc.unique(table.data.column(column)).drop_null().to_pylist()
    if odd := [number for number in numbers if not -1 <= number < len(names)]:  # -1 is the Hub's word for none
        raise TinyTLError(f"{what} 0 to {len(names) - 1}, and there is {odd[0]}; write all names, or none, there")
    return table.cast_column(column, datasets.ClassLabel(names=names))


def _named_classes(folder: Path) -> dict[str, list[str]]:
    """The names of each column's classes, by number; without those on which subsets differ."""
    info = _head(folder, "dataset_info")
    found: dict[str, list[list[str]]] = defaultdict(list)
    of_all = [each.get("features") for each in (info if isinstance(info, list) else [info]) if isinstance(each, dict)]
    for feature in (feature for features in of_all if isinstance(features, list) for feature in features):
        dtype = feature.get("dtype") if isinstance(feature, dict) else None
        label = dtype.get("class_label") if isinstance(dtype, dict) else None
        names = label.get("names") if isinstance(label, dict) else None
        if isinstance(names, dict) and names.keys() == {str(number) for number in range(len(names))}:
            names = [names[str(number)] for number in range(len(names))]
        if names and isinstance(names, list):
            found[str(feature.get("name"))].append([str(name) for name in names])
    return {column: each[0] for column, each in found.items() if each.count(each[0]) == len(each)}


def say_configs_not_taken(folder: Path) -> None:
    """Say if a README lists splits of images, where the folders say none."""
    configs = _head(folder, "configs")
    for config in configs if isinstance(configs, list) else []:
        files = config.get("data_files") if isinstance(config, dict) else None
        splits = {each.get("split") for each in files if isinstance(each, dict)} if isinstance(files, list) else set()
        if len(splits) > 1:
            return say_splits_not_taken([README])


def check_subset(error: Exception, config: DataConfig) -> None:
    """Raise if an error of the library datasets is that a subset is to be named.

    Raises:
        TinyTLError: With the names that there are.
    """
    found = SUBSETS.search(str(error))
    names = re.findall(r"'(.+?)'", found[1]) if found else []
    if names == ["default"]:
        raise TinyTLError(
            f"data.subset={config.subset}: the data set has no subsets; leave that option out"
        ) from error
    if names:
        what = f"data.dataset={config.dataset}: has several subsets"
        what = what if config.subset is None else f"data.subset={config.subset}: no such subset"
        raise TinyTLError(f"{what}; name one ({named(names)}), as --data.subset {names[0]}") from error


def say_missing_parts(tables: Iterable[str]) -> None:
    """Say which parts are not there that the names of others count, as ``train-00000-of-00002.parquet`` does."""
    numbers: dict[tuple[str, str], set[int]] = defaultdict(set)
    examples: dict[tuple[str, str], str] = {}
    for table in tables:
        if part := PART.fullmatch(table):
            numbers[part[1], part[3]].add(int(part[2]))
            examples[part[1], part[3]] = table
    for (name, count), found in numbers.items():
        if missing := sorted(set(range(int(count))) - found):
            listed = named([f"{name}-{number:0{len(count)}}-of-{count}" for number in missing])
            logger.warning(
                "%s: of the %s parts of this table %s missing (%s): the data set is not whole",
                *(examples[name, count], f"{int(count):,}", "1 is" if len(missing) == 1 else f"{len(missing):,} are"),
                listed,
            )
