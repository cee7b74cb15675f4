"""Data sets by name or path to labelled splits, without decoding an image."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetsError
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from tinytl_hf.config.data import DataConfig
from tinytl_hf.errors import TinyTLError

EVAL_SPLITS = ("test", "validation")
HOLDOUT = "holdout"


@dataclass(frozen=True)
class Split:
    """Encoded images and their class numbers.

    Attributes:
        name: The split's name, for messages.
        rows: The images, undecoded, in the column ``image``.
        labels: Class number of each image.
        label_names: Names of the classes.
        numbers: Number of each image's row in the split as the data set has it.
        held_out: Whether it is the part of that split which is held out of training.
    """

    name: str
    rows: datasets.Dataset
    labels: np.ndarray
    label_names: list[str]
    numbers: np.ndarray
    held_out: bool = False

    @property
    def title(self) -> str:
        """What to write in ``data.eval_split`` to get this split."""
        return HOLDOUT if self.held_out else self.name

    def select(self, index: np.ndarray) -> Split:
        """The images at ``index``."""
        return replace(self, rows=self.rows.select(index), labels=self.labels[index], numbers=self.numbers[index])


def open_splits(config: DataConfig) -> tuple[Split, Split]:
    """Find the training and the evaluation split, without decoding an image.

    Raises:
        TinyTLError: The data set cannot be found or read, or its columns, splits or labels do not fit.
    """
    return _open_splits(_load(config), config)


def _open_splits(tables: datasets.DatasetDict, config: DataConfig) -> tuple[Split, Split]:
    if config.train_split not in tables:
        raise TinyTLError(f"data.train_split={config.train_split}: the data set has {', '.join(tables)}")
    train = _labelled(tables[config.train_split], config.train_split, config)
    eval_name = config.eval_split or next((name for name in EVAL_SPLITS if name in tables), HOLDOUT)
    if eval_name == HOLDOUT:
        train, held_out = _hold_out(train, config)
    elif eval_name not in tables or eval_name == config.train_split:
        others = [name for name in tables if name != config.train_split]
        raise TinyTLError(f"data.eval_split={eval_name}: use {', '.join([*others, HOLDOUT])}")
    else:
        held_out = with_label_names(_labelled(tables[eval_name], eval_name, config), train.label_names)
    return (
        _subset(train, config.max_train_samples, config.split_seed),
        _subset(held_out, config.max_eval_samples, config.split_seed),
    )


def open_eval_split(config: DataConfig, whole: bool) -> Split:
    """Find the split to evaluate on, which may be the only one that there is.

    Args:
        config: The data to evaluate on.
        whole: Whether a data set without a test or validation split is used whole; else only the part of it that is
            held out of training.

    Raises:
        TinyTLError: As :func:`open_splits`.
    """
    tables = _load(config)
    name = config.eval_split or next((name for name in EVAL_SPLITS if name in tables), None)
    if name == HOLDOUT or (name is None and not whole):
        return _open_splits(tables, config)[1]
    name = name or next(iter(tables))
    if name not in tables:
        raise TinyTLError(f"data.eval_split={name}: use {', '.join([*tables, HOLDOUT])}")
    return _subset(_labelled(tables[name], name, config), config.max_eval_samples, config.split_seed)


def find_training_split(config: DataConfig, train_sha256: str | None) -> Split | None:
    """The images of ``config.dataset`` that a model was trained on, or None if it was trained on others.

    Args:
        config: The data, with the columns, split, fraction and seed of the training.
        train_sha256: Hash of the training images; None: they are taken to be these.
    """
    try:
        train, _ = open_splits(config)
    except TinyTLError:
        return None
    return train if train_sha256 in (None, sha256(train)) else None


def local_path(name: str) -> Path:
    """The path that a name can stand for, with ``~`` for the user's home."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~other, where there is no such user
        return Path(name)


def is_same_place(one: str, other: str) -> bool:
    """Whether two names of a data set are one name, or two spellings of the path of one file or folder."""
    first, second = local_path(one), local_path(other)
    return one == other or (first.exists() and first.resolve() == second.resolve())


def with_label_names(split: Split, label_names: Sequence[str]) -> Split:
    """Number the classes of ``split`` as in ``label_names``.

    Raises:
        TinyTLError: The split has a class that is not among them.
    """
    if split.label_names == list(label_names):
        return split
    unknown = [name for name in split.label_names if name not in label_names]
    if unknown:
        raise TinyTLError(
            f"split {split.name} has the class {unknown[0]!r}, which is not among the {len(label_names)} known "
            f"classes ({', '.join(label_names[:5])}, ...); use data with the same classes"
        )
    numbers = np.array([label_names.index(name) for name in split.label_names])
    return replace(split, labels=numbers[split.labels], label_names=list(label_names))


def sha256(split: Split) -> str:
    """Hash of a split's labels and of a sample of its image files."""
    digest = hashlib.sha256("\0".join(split.label_names).encode())
    digest.update(split.labels.tobytes())
    for image in split.rows[sample_rows(split)]["image"]:
        if image is not None and image["bytes"] is not None:
            digest.update(image["bytes"])
        elif image is not None and Path(image["path"]).is_file():
            digest.update(Path(image["path"]).read_bytes())
    return digest.hexdigest()


def _load(config: DataConfig) -> datasets.DatasetDict:
    if not config.dataset:
        raise TinyTLError(
            "data.dataset: missing; name a folder of images or a data set, as --data.dataset path/to/images"
        )
    name, path = config.dataset, local_path(config.dataset)
    if name == "digits":
        return datasets.DatasetDict(train=_digits())
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        elif name.endswith(".parquet"):
            loaded = datasets.load_dataset("parquet", data_files=str(path))
        else:
            loaded = datasets.load_dataset(str(path) if path.is_dir() else name, config.subset)
    except Exception as error:  # damaged files can make datasets raise almost anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        reason = reason if isinstance(error, (DatasetsError, OSError)) else f"{type(error).__name__}: {reason}"
        raise TinyTLError(
            f"data.dataset={name}: cannot be loaded ({reason}); use a Hub id, the path of a folder or .parquet "
            "file, or digits"
        ) from error
    return loaded if isinstance(loaded, datasets.DatasetDict) else datasets.DatasetDict(train=loaded)


def _digits() -> datasets.Dataset:
    digits = load_digits()
    images = [Image.fromarray((image / 16 * 255).round().astype(np.uint8)) for image in digits.images]
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[str(name) for name in digits.target_names])
    )
    return datasets.Dataset.from_dict({"image": images, "label": digits.target}, features=features)


def _labelled(table: datasets.Dataset, name: str, config: DataConfig) -> Split:
    """Find the columns of a split and number its labels."""
    if len(table) == 0:
        raise TinyTLError(f"split {name} of {config.dataset} has no rows; use another split or data set")
    image_column = _column(table, "image_column", config.image_column, (datasets.Image,))
    label_column = _column(table, "label_column", config.label_column, (datasets.ClassLabel, str))
    rows = table.select_columns([image_column]).rename_columns(
        {image_column: "image"} if image_column != "image" else {}
    )
    if not isinstance(rows.features["image"], datasets.Image):
        raise TinyTLError(f"data.image_column={image_column}: it holds {rows.features['image']}, not images")
    rows = rows.cast_column("image", datasets.Image(decode=False))
    feature = table.features[label_column]
    if not isinstance(feature, (datasets.ClassLabel, datasets.Value)):
        raise TinyTLError(f"data.label_column={label_column}: it holds {feature}, not a label for each image")
    values = table.with_format("numpy")[label_column][:]
    missing = [i for i, value in enumerate(values) if value is None or value != value]
    if missing:
        raise TinyTLError(f"row {missing[0]} of split {name} has no label in {label_column}; drop such rows")
    if isinstance(feature, datasets.ClassLabel):
        labels, names = np.asarray(values, dtype=np.int64), list(feature.names)
        outside = np.flatnonzero((labels < 0) | (labels >= len(names)))
        if outside.size:
            raise TinyTLError(
                f"row {outside[0]} of split {name} has label {labels[outside[0]]}, outside 0 to "
                f"{len(names) - 1}; this split may be unlabelled, use another (data.eval_split)"
            )
    else:
        classes, labels = np.unique(np.asarray(values), return_inverse=True)
        names, labels = [str(value) for value in classes], labels.astype(np.int64)
    if len(names) < 2:
        raise TinyTLError(f"data.label_column={label_column}: split {name} has one class; use two or more")
    return Split(name, rows, labels, names, np.arange(len(labels)))


def _column(table: datasets.Dataset, key: str, chosen: str | None, kinds: tuple[type, ...]) -> str:
    """The chosen column, or the only one of the first of ``kinds`` that occurs."""
    columns = ", ".join(table.column_names)
    if chosen is not None:
        if chosen not in table.column_names:
            raise TinyTLError(f"data.{key}={chosen}: no such column; the data set has {columns}")
        return chosen
    for kind in kinds:
        found = [name for name, feature in table.features.items() if _is_kind(feature, kind)]
        if len(found) == 1:
            return found[0]
        if found:
            raise TinyTLError(f"data.{key}: {', '.join(found)} all fit; name one, as --data.{key} {found[0]}")
    raise TinyTLError(f"data.{key}: no column of {columns} fits by its type; name one with --data.{key}")


def _is_kind(feature: Any, kind: type) -> bool:
    if kind is str:
        return isinstance(feature, datasets.Value) and feature.dtype in {"string", "large_string"}
    return isinstance(feature, kind)


def _hold_out(split: Split, config: DataConfig) -> tuple[Split, Split]:
    try:
        kept, held_out = train_test_split(
            np.arange(len(split.labels)),
            test_size=config.eval_fraction,
            random_state=config.split_seed,
            stratify=split.labels,
        )
    except ValueError as error:
        raise TinyTLError(
            f"data.eval_fraction={config.eval_fraction}: cannot hold out a part of {len(split.labels)} images "
            f"with every class in both parts ({error}); use another fraction or more images"
        ) from error
    return split.select(np.sort(kept)), replace(split.select(np.sort(held_out)), held_out=True)


def _subset(split: Split, count: int | None, seed: int) -> Split:
    if count is None or count >= len(split.labels):
        return split
    return split.select(np.sort(np.random.default_rng(seed).permutation(len(split.labels))[:count]))


def sample_rows(split: Split) -> np.ndarray:
    """Some of a split's images, spread evenly."""
    return np.linspace(0, len(split.labels) - 1, min(32, len(split.labels))).astype(int)
