"""Data sets by name or path to labelled splits, each with its role, without decoding an image."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.changed_copies import about_changed_copies
from tinytl_hf.data.columns import NoLabelsError, as_label, byte_sizes, class_order, image_rows
from tinytl_hf.data.copies import about_copies
from tinytl_hf.data.find import Source
from tinytl_hf.data.found import Found, named
from tinytl_hf.data.holding_out import hold_out
from tinytl_hf.data.labels import label_values
from tinytl_hf.data.odd_classes import about_names
from tinytl_hf.data.roles import HOLDOUT, find_split, in_order
from tinytl_hf.data.series import about_series
from tinytl_hf.data.split import READ_WHOLE, Split, contents
from tinytl_hf.data.tables import Tables, load
from tinytl_hf.errors import TinyTLError

logger = logging.getLogger(__name__)


class Opened(NamedTuple):
    """The splits of a run, by their roles.

    Attributes:
        train: To train on.
        evaluation: To evaluate on after each epoch, and to choose the best by.
        test: To evaluate on once, at the end; None: there is no split for it.
        found: What the data set holds.
        source: Where it is.
        warnings: What may surprise the user.
    """

    train: Split
    evaluation: Split
    test: Split | None
    found: Found
    source: Source
    warnings: tuple[str, ...]


def open_data(config: DataConfig) -> Opened:
    """Find the splits of a run, without decoding an image.

    With a validation and a test split, the first is for choosing and the second for the figures of the run.

    Raises:
        TinyTLError: The data set cannot be found or read, or its columns, splits or labels do not fit.
    """
    opened = _open_data(load(config), config)
    evaluated = [split for split in (opened.evaluation, opened.test) if split is not None]
    of_their_own = [split for split in evaluated if not split.held_out]  # held-out images have their copies with them
    about = (*about_copies(opened.train, evaluated), *about_changed_copies(opened.train, of_their_own))
    for line in (*opened.warnings, *about, *about_series(opened.train, evaluated)):
        logger.warning("%s", line)
    logger.info("%s", opened.found)
    return opened


def _open_data(tables: Tables, config: DataConfig) -> Opened:
    train = _train_split(tables, config)
    train, *evaluated = _with_all_names([train, *_eval_splits(tables, train, config)])
    warnings: list[str] = []
    alone: list[str] = []
    if not evaluated:
        if HOLDOUT in tables.splits:
            raise TinyTLError(
                f"the data set has a split {HOLDOUT}, and a part held out of {train.name} is called so as well; give "
                "that split another name, such as test, or name one to evaluate on with --data.eval_split"
            )
        alone = [train.label_names[number] for number in np.flatnonzero(np.bincount(train.labels) == 1)]
        warnings += _about(alone, "a single image, which is trained on and not evaluated")
        kept, held_out = hold_out(train, config)
        train, evaluated = train.select(kept), [replace(train.select(held_out), held_out=True)]
    train = _subset(train, config.max_train_samples, config.split_seed)
    evaluated = [_subset(split, config.max_eval_samples, config.split_seed) for split in evaluated]
    trained = set(train.occurring())
    untrained = [name for name in train.label_names if name not in trained]
    warnings += _about(untrained, "no training images, so no right answer can be learnt")
    for split in evaluated:
        seen = {*split.occurring(), *alone}
        unseen = [name for name in train.label_names if name in trained and name not in seen]
        warnings += _about(unseen, f"images to train on and none in {split.title}, which says nothing of such a class")
    warnings += about_names(train.label_names)
    evaluation, test = evaluated[0], evaluated[1] if len(evaluated) > 1 else None
    found = Found(
        classes=train.label_names,
        images={name: len(tables.splits[name]) for name in sorted(tables.splits, key=in_order)},
        labels=f"{train.label_column} of {tables.metadata}" if tables.metadata else train.label_column,
        left_out=tables.left_out,
        train=(train.name, len(train.labels)),
        evaluation=(evaluation.title, len(evaluation.labels)),
        test=None if test is None else (test.title, len(test.labels)),
    )
    return Opened(train, evaluation, test, found, tables.source, tuple(warnings))


def _train_split(tables: Tables, config: DataConfig) -> Split:
    names = list(tables.splits)
    name = find_split(config.train_split, names)
    if name is None:
        fix = f"; --data.train_split {names[0]} trains on {'it' if len(names) == 1 else 'the first'}"
        fix = f" ({tables.left_out})" if tables.left_out else fix
        raise TinyTLError(f"data.train_split={config.train_split}: the data set has {', '.join(names)}{fix}")
    train = _labelled(tables, name, config)
    if len(classes := train.occurring()) < 2:
        aside = f" ({tables.left_out})" if tables.left_out else ""
        raise TinyTLError(f"split {name} has one class ({classes[0]}); use two or more{tables.hint}{aside}")
    return train


def _eval_splits(tables: Tables, train: Split, config: DataConfig) -> list[Split]:
    """The split to choose by and that to report; one if they are the same, none if there is no other with labels."""
    others = [name for name in tables.splits if name != train.name]
    wanted = config.eval_split
    if wanted not in (None, HOLDOUT, *others) and find_split(str(wanted), [train.name]) is not None:
        raise TinyTLError(f"data.eval_split={wanted}: it is trained on; use {', '.join([*others, HOLDOUT])}")
    names = _eval_names(others, config.eval_split)
    found = (_labelled_or_none(tables, name, _with_columns_of(train, config)) for name in names)
    splits = [split for split in found if split is not None]
    for split in splits:
        if not set(split.occurring()) & set(train.occurring()):
            raise TinyTLError(
                f"split {split.name} has the classes {named(split.occurring())} alone, and split {train.name} none of "
                f"them, but {named(train.occurring())}; give them the same names, or name another split to evaluate "
                f"on, as --data.eval_split {HOLDOUT}"
            )
    return splits


def _eval_names(names: Sequence[str], wanted: str | None) -> list[str]:
    """Names of the splits to choose by and to report, out of those that are not trained on."""
    if wanted == HOLDOUT:
        return []
    if wanted is not None:
        found = find_split(wanted, names)
        if found is None:
            raise TinyTLError(f"data.eval_split={wanted}: use {', '.join([*names, HOLDOUT])}")
        return [found]
    return [name for role in ("validation", "test") if (name := find_split(role, names)) is not None]


def _load_and_say(config: DataConfig) -> Tables:
    """The data set, where nothing trains; says what was left out of it."""
    tables = load(config)
    if tables.left_out:
        logger.info("%s", tables.left_out)
    return tables


def open_train_split(config: DataConfig) -> Split:
    """The split to train on, where nothing trains: what only a training wants to know is not said.

    Raises:
        TinyTLError: As :func:`open_data`.
    """
    return _open_data(_load_and_say(config), config).train


def open_eval_split(config: DataConfig, whole: bool) -> Split:
    """Find the split to evaluate on, which may be the only one that there is.

    Args:
        config: The data to evaluate on.
        whole: Whether a data set without a test or validation split is used whole; else only the part of it that is
            held out of training.

    Raises:
        TinyTLError: As :func:`open_data`.
    """
    tables = _load_and_say(config)
    if config.eval_split == HOLDOUT:
        split = None
    elif config.eval_split is None:
        split = _first_with_labels(tables, config, whole)
    else:
        names = list(tables.splits)
        name = find_split(config.eval_split, names)
        if name is None:
            raise TinyTLError(f"data.eval_split={config.eval_split}: use {', '.join([*names, HOLDOUT])}")
        split = _labelled(tables, name, _with_columns_of_training(tables, config))
    if split is None:
        return _open_data(tables, replace(config, eval_split=HOLDOUT)).evaluation
    return _subset(split, config.max_eval_samples, config.split_seed)


def _first_with_labels(tables: Tables, config: DataConfig, whole: bool) -> Split | None:
    """The test split, else that for validation, else, of data taken whole, the training split."""
    names = list(tables.splits)
    same_columns = _with_columns_of_training(tables, config)
    for role in ("test", "validation"):
        name = find_split(role, names)
        if name is not None and (split := _labelled_or_none(tables, name, same_columns)) is not None:
            return split
    return _labelled(tables, find_split("train", names) or names[0], config) if whole else None


def _with_columns_of_training(tables: Tables, config: DataConfig) -> DataConfig:
    """Options that name the columns that training takes, which a small split may not tell."""
    name = find_split(config.train_split, list(tables.splits))
    if name is None:
        return config
    try:
        return _with_columns_of(_labelled(tables, name, config), config)
    except TinyTLError:  # as a set to evaluate on alone can have
        return config


def _with_columns_of(split: Split, config: DataConfig) -> DataConfig:
    return replace(config, image_column=split.image_column, label_column=split.label_column)


def find_training_split(config: DataConfig, train_sha256: str | None) -> Split | None:
    """The images of ``config.dataset`` that a model was trained on, or None if it was trained on others.

    Args:
        config: The data, with the columns, split, fraction and seed of the training.
        train_sha256: Hash of the training images; None: they are taken to be these.
    """
    try:
        train = _open_data(load(config), config).train
    except TinyTLError:
        return None
    return train if train_sha256 is None or has_hash(train, train_sha256) else None


def with_label_names(split: Split, label_names: Sequence[str]) -> Split:
    """Number the classes of ``split`` as in ``label_names``.

    Raises:
        TinyTLError: The split has images of a class that is not among them.
    """
    if split.label_names == list(label_names):
        return split
    known = {as_label(name): number for number, name in enumerate(label_names)}
    unknown = [name for name in split.occurring() if as_label(name) not in known]
    if unknown:
        raise TinyTLError(
            f"split {split.name} has the class {unknown[0]!r}, which is not among the {len(label_names)} known "
            f"classes ({named(label_names)}); use data with the same classes"
        )
    numbers = np.array([known.get(as_label(name), -1) for name in split.label_names])
    return replace(split, labels=numbers[split.labels], label_names=list(label_names))


def sha256(split: Split) -> str:
    """Hash of a split's labels, of the size of each of its image files, and of the files themselves.

    Of a split of more than :data:`READ_WHOLE` bytes, a sample of the files is read: all of them would take as long as
    decoding some epochs of it.
    """
    sizes = byte_sizes(split.rows)
    rows = np.arange(len(sizes)) if sizes.sum() <= READ_WHOLE else sample_rows(split)
    return _hash(split, rows, sizes.tobytes())


def earlier_sha256(split: Split) -> str:
    """The hash that earlier versions recorded: of the labels and the sample alone."""
    return _hash(split, sample_rows(split), b"")


def has_hash(split: Split, recorded: str) -> bool:
    """Whether a hash that was recorded, by this or an earlier version, is that of ``split``."""
    return recorded in (sha256(split), earlier_sha256(split))


def _hash(split: Split, rows: np.ndarray, sizes: bytes) -> str:
    digest = hashlib.sha256("\0".join(split.label_names).encode())
    digest.update(split.labels.tobytes() + sizes)
    for content in contents(split, rows):
        digest.update(content)
    return digest.hexdigest()


def _labelled(tables: Tables, name: str, config: DataConfig) -> Split:
    table = tables.splits[name]
    if len(table) == 0:
        raise NoLabelsError(f"split {name} of {config.dataset} has no rows; use another split or data set")
    image_column, rows = image_rows(table, config, tables.base, name if len(tables.splits) > 1 else None)
    label_column, labels, names = label_values(table, name, config, image_column)
    return Split(name, rows, labels, names, image_column, label_column, np.arange(len(labels)))


def _labelled_or_none(tables: Tables, name: str, config: DataConfig) -> Split | None:
    """A split; None for one without labels that the user did not name."""
    label = config.label_column
    try:
        if label is not None and label not in tables.splits[name].column_names:
            raise NoLabelsError(f"it has no column {label}")
        return _labelled(tables, name, config)
    except NoLabelsError as error:
        if config.eval_split is not None:
            raise
        logger.warning("split %s is not used: %s", name, error)
        return None


def _with_all_names(splits: Sequence[Split]) -> list[Split]:
    """Splits whose classes are numbered alike, as the training split has them and with those that only others have."""
    names = splits[0].label_names
    new = {name for split in splits[1:] for name in split.occurring()} - set(names)
    names = class_order({*names, *new}) if new else names
    return [with_label_names(split, names) for split in splits]


def _about(classes: Sequence[str], what: str) -> list[str]:
    return [f"{named(classes)} {'has' if len(classes) == 1 else 'have'} {what}"] if classes else []


def _subset(split: Split, count: int | None, seed: int) -> Split:
    if count is None or count >= len(split.labels):
        return split
    return split.select(np.sort(np.random.default_rng(seed).permutation(len(split.labels))[:count]))


def sample_rows(split: Split) -> np.ndarray:
    """Some of a split's images, spread evenly."""
    return np.linspace(0, len(split.labels) - 1, min(32, len(split.labels))).astype(int)
