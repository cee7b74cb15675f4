"""Data sets in the layout of the Hub: subsets and splits that a README lists, and files in numbered parts."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.beside import say_splits_not_taken
from tinytl_hf.data.found import named
from tinytl_hf.errors import TinyTLError

logger = logging.getLogger(__name__)

README = "README.md"
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(.*)")  # numbered from 0
SUBSETS = re.compile(r"[Aa]vailable(?: configs)?: \[(.*)\]")  # in errors of the library datasets


def has_configs(folder: Path) -> bool:
    """Whether the README of a data set in the Hub's layout says which files are which split."""
    return _configs(folder) is not None


def _configs(folder: Path) -> Any:
    try:
        head = REGEX_YAML_BLOCK.search((folder / README).read_text(encoding="utf-8-sig"))
        values = yaml.safe_load(head[2]) if head else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return values.get("configs") if isinstance(values, dict) else None


def say_configs_not_taken(folder: Path) -> None:
    """Say if a README lists splits of images, where the folders say none."""
    configs = _configs(folder)
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
