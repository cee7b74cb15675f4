"""What splits are called, and what each of them is for: one rule for all sources of data."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from tinytl_hf.config.data import DataConfig

NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_WORDS = {name for names in NAMES.values() for name in names}
HOLDOUT = "holdout"
# Names of columns with a truth or a number in each row, as fastai and scikit-learn have it.
OF_PARTS = re.compile(r"(k|cv)?_?folds?|(is|in)_?(train|training|valid|validation|val|dev|test)(_set)?", re.I)


def role_of(name: str) -> str | None:
    """``train``, ``validation`` or ``test``, if people call such splits so."""
    return next((role for role, names in NAMES.items() if name.lower() in names), None)


def in_order(name: str) -> int:
    """Sorts the names of splits: for training, validation, test, others."""
    return [*NAMES, None].index(role_of(name))


def role_of_table(path: str) -> str | None:
    """The split that a table's path names, as ``train-00000-of-00002.parquet`` or ``test/a.parquet`` do."""
    for part in reversed(path.split("/")):
        words = re.split(r"[-._ 0-9]+", part)
        if roles := [role for word in words if (role := role_of(word))]:
            return roles[0]
    return None


def of_several_splits(paths: Iterable[str]) -> bool:
    """Whether the paths of tables name two splits or more."""
    return len({role_of_table(path) for path in paths} - {None}) > 1


def group_by_split(paths: Iterable[str]) -> dict[str | None, list[str]]:
    """Tables by the split that their paths name, those that name none under None; all to train on if none does."""
    groups: dict[str | None, list[str]] = defaultdict(list)
    for path in paths:
        groups[role_of_table(path)].append(path)
    return {"train": groups[None]} if groups.keys() == {None} else dict(groups)


def chosen_splits(config: DataConfig) -> set[str]:
    """Names that the options use for splits and that nobody else calls so."""
    named = {config.train_split, config.eval_split} - {None, HOLDOUT}
    return {str(name) for name in named if role_of(str(name)) is None}


def asked_splits(config: DataConfig) -> set[str | None]:
    """Names of splits that an option was set to: the default asks for none."""
    return {config.train_split, config.eval_split} - {DataConfig.train_split}


def find_split(wanted: str, names: Iterable[str]) -> str | None:
    """The split of that name, else the only one that people call so (``val`` for ``validation``)."""
    names = list(names)
    if wanted in names:
        return wanted
    role = role_of(wanted)
    same = [name for name in names if role is not None and role_of(name) == role]
    return same[0] if len(same) == 1 else None
