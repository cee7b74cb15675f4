"""What ``adapter_config.json`` says of an adapter, and the strict way from its values to a record."""

from __future__ import annotations

import json
import logging
import math
import types
import typing
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from packaging.version import InvalidVersion, Version

from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.network import HeadConfig, LiteConfig, MethodName
from tinytl_hf.data.find import Source
from tinytl_hf.errors import TinyTLError, one_line
from tinytl_hf.network.backbones import IMAGENET_MEAN, IMAGENET_STD, Backbone, Interpolation
from tinytl_hf.version import __version__

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
# Options that say which images of a data set are trained on, and which are evaluated.
OF_SPLITS = (
    "subset",
    "image_column",
    "label_column",
    "train_split",
    "eval_split",
    "eval_fraction",
    "split_seed",
    "max_train_samples",
    "max_eval_samples",
)
LONGEST_PATH = 4096  # characters, on Linux
LONGEST = 60  # characters of a file's own text that a message quotes


@dataclass(frozen=True)
class BackboneRecord:
    """The backbone an adapter was trained on.

    Attributes:
        name: torchvision's name, or timm's as ``timm/NAME`` with the tag of the weights, if any.
        weights: Source of the weights; on the Hub ``hf-hub:user/repo@commit``.
        sha256: Hash of the frozen tensors as they came; None where the method trains everything.
        frozen_weights: How frozen convolution weights are stored in memory, ``fp32`` or ``int8``.
        license: Licence of the weights as their author names it; None where it is not known.
    """

    name: str
    weights: str
    sha256: str | None = None
    frozen_weights: Literal["fp32", "int8"] = "fp32"
    license: str | None = None

    def __post_init__(self) -> None:
        for key, value in (("name", self.name), ("weights", self.weights)):
            if len(value) > LONGEST_PATH:
                raise TinyTLError(f"backbone.{key} has {len(value):,} characters, and no name or path has so many")


@dataclass(frozen=True)
class Preprocessing:
    """From an image to the network's input: resize, centre crop, normalise.

    Attributes:
        train_size: Side of the training images in px, to which lite residuals are fitted.
        eval_size: Side of the images at evaluation and in use in px.
        crop_pct: Side of the centre crop as a share of the image's shorter side.
        mean: Mean of each RGB channel, on a scale of 0 to 1.
        std: Standard deviation of each RGB channel, on the same scale.
        interpolation: How images are resized, in training too.
    """

    train_size: int
    eval_size: int
    crop_pct: float = 0.875
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: Interpolation = "bilinear"

    @classmethod
    def of(cls, backbone: Backbone, train_size: int, eval_size: int | None, crop_pct: float | None) -> Preprocessing:
        """That of a backbone's weights, at these sizes; None: ``train_size``, and the backbone's own share."""
        share = backbone.crop_pct if crop_pct is None else crop_pct
        as_trained = (backbone.mean, backbone.std, backbone.interpolation)
        return cls(train_size, train_size if eval_size is None else eval_size, share, *as_trained)

    @property
    def normal(self) -> tuple[tuple[float, float, float], tuple[float, float, float], Interpolation]:
        """Mean, standard deviation and interpolation, as :func:`tinytl_hf.data.augment.resample` takes them."""
        return self.mean, self.std, self.interpolation

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)) or min(self.std) <= 0:
            raise TinyTLError(f"mean={self.mean}, std={self.std}: use finite numbers, and a std above 0")
        if not 0 < self.crop_pct <= 1:
            raise TinyTLError(f"crop_pct={self.crop_pct}: use a share above 0, at most 1")


@dataclass(frozen=True)
class DataRecord:
    """The data an adapter was trained and evaluated on: what ``eval`` uses unless told otherwise.

    The fields are those of :class:`~tinytl_hf.config.data.DataConfig` and, of adapters of today, these:

    Attributes:
        source: Whether ``dataset`` is a path on the disk where it was trained, a name on the Hub, a URL, or
            scikit-learn's digits.
        train_sha256: Hash of the images that it was trained on, by which the same data are known under another name.
        eval_sha256: Hash of those that it was evaluated on after each epoch.
        test_sha256: Hash of those that it was evaluated on at the end, if they were others.
    """

    dataset: str
    subset: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    train_split: str = "train"
    eval_split: str | None = None
    eval_fraction: float = 0.1
    split_seed: int = 0
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    skip_corrupt: bool = False
    source: Literal["local", "hub", "url", "digits"] | None = None
    train_sha256: str | None = None
    eval_sha256: str | None = None
    test_sha256: str | None = None

    @classmethod
    def of(cls, data: DataConfig, source: Source, **hashes: str | None) -> DataRecord:
        """Keep what says which images were used, where they were found, and the hashes of the splits."""
        values = {name: value for name, value in vars(data).items() if name in _names(cls)}
        return cls(**{**values, **hashes, "dataset": source.name, "source": source.place})

    def options(self) -> dict[str, Any]:
        """The fields that are options of :class:`~tinytl_hf.config.data.DataConfig`."""
        return {name: value for name, value in vars(self).items() if name in _names(DataConfig)}

    def as_trained(self, data: DataConfig) -> DataConfig:
        """``data``, with its columns, splits and samples replaced by those used in training."""
        return replace(data, **{name: getattr(self, name) for name in OF_SPLITS})

    def fill_in(self, data: DataConfig, given: Collection[str] = ()) -> DataConfig:
        """``data``, with those of these options that it leaves at their defaults and that were not ``given`` so."""
        defaults = DataConfig()
        left = [name for name in OF_SPLITS if name not in given and getattr(data, name) == getattr(defaults, name)]
        return replace(data, **{name: getattr(self, name) for name in left})


def _names(kind: type) -> set[str]:
    return {field.name for field in fields(kind)}


@dataclass(frozen=True)
class InitRecord:
    """The adapter that the training went on from.

    Attributes:
        method: The method it was trained by.
        label_names: Its classes.
        source: Its name on the Hub; None: it was a folder, whose path means nothing elsewhere.
        train_sha256: Hash of the images that it was trained on.
    """

    method: MethodName
    label_names: list[str]
    source: str | None = None
    train_sha256: str | None = None


@dataclass(frozen=True)
class AdapterConfig:
    """What ``adapter_config.json`` holds.

    Attributes:
        backbone: The frozen network.
        method: What trained.
        preprocessing: From an image to the network's input.
        label_names: Names of the classes, in the order of the logits.
        trained_blocks: How many of the last blocks trained, with what follows them; None: all.
        lite: The lite residuals.
        head: The classifier.
        data: What it was trained on.
        dtype: Type of the tensors in the file.
        format_version: Version of this format.
        tinytl_hf_version: Version of the package that wrote it.
    """

    backbone: BackboneRecord
    method: MethodName
    preprocessing: Preprocessing
    label_names: list[str]
    trained_blocks: int | None = None
    lite: LiteConfig = field(default_factory=LiteConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    data: DataRecord | None = None
    init: InitRecord | None = None
    dtype: Literal["fp32", "fp16"] = "fp32"
    format_version: int = FORMAT_VERSION
    tinytl_hf_version: str = __version__

    def __post_init__(self) -> None:
        if self.data is not None and not isinstance(self.data, DataRecord):
            raise TinyTLError(f"data={_short(self.data)}: use a DataRecord of tinytl_hf.adapter.record")
        twice = [name for name, count in Counter(self.label_names).items() if count > 1]
        if not self.label_names or twice:
            found = f"{_short(twice[0])} is there more than once" if twice else "there is none"
            raise TinyTLError(f"label_names: {found}; use one name or more, each once")
        if bad := [name for name in self.label_names if not _is_text(name)]:
            raise TinyTLError(f"label_names: {_short(bad[0])} is no UTF-8 text; rename the class (its folder, say)")

    def to_json(self) -> str:
        """Sorted, indented JSON."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"


def checked(config: AdapterConfig) -> AdapterConfig:
    """The record as it will be read from its file.

    Raises:
        TinyTLError: A value is of a type that no file holds, or that would be refused there.
    """
    record: AdapterConfig = _build(AdapterConfig, _plain(asdict(config)), "", False, Path())
    return record


def _plain(value: Any) -> Any:
    """Values as JSON gives them back; what it cannot hold stays, to be named with its key."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def label_strings(names: Iterable[object] | None, num_classes: int | None) -> list[str]:
    """Names of classes as the strings that an adapter holds.

    Args:
        names: Strings or numbers, in a list, an array or the like; None: the numbers of the classes.
        num_classes: How many there are, where ``names`` does not say it.

    Raises:
        TinyTLError: No list of those, or another number of them.
    """
    if names is None:
        if num_classes is None or num_classes < 1:
            raise TinyTLError(f"num_classes={num_classes}: use 1 or more, or name the classes with label_names")
        names = range(num_classes)
    if isinstance(names, (str, bytes, Mapping, Set)) or not isinstance(names, Iterable):
        raise TinyTLError(f"label_names={_short(names)}: use a list of names, in the order of the class numbers")
    plain = [name.item() if isinstance(name, np.generic) else name for name in names]
    if bad := [name for name in plain if not isinstance(name, (str, int, float)) or name != name]:
        raise TinyTLError(f"label_names: {_short(bad[0])} is no name; use strings or numbers")
    if not plain or (num_classes is not None and num_classes != len(plain)):
        raise TinyTLError(f"num_classes={num_classes}, with {len(plain)} label_names: give one, or both alike")
    return [str(name) for name in plain]


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:  # half a character, as in the name of a folder that is not UTF-8
        return False
    return True


def config_from(values: Any, path: Path) -> AdapterConfig:
    """The record that a file's ``values`` describe.

    A key that is not known here is an error, unless a newer version of this package wrote the file: then it is
    left out, with a warning.

    Args:
        values: What the file holds, of any format version up to ours.
        path: The file, for messages.

    Raises:
        TinyTLError: They are not those of an adapter.
    """
    version = values.get("format_version") if isinstance(values, dict) else None
    if type(version) is not int or version < 1:
        raise TinyTLError(f"{path} is not a tinytl_hf adapter: it has no format_version")
    if version > FORMAT_VERSION:
        raise TinyTLError(
            f"{path} has format_version {version}, and this tinytl_hf reads up to {FORMAT_VERSION}: "
            "pip install --upgrade tinytl-hf"
        )
    if version == 1:
        values = _from_format_1(values)
    newer = _is_newer(values.get("tinytl_hf_version"))
    try:
        return _build(AdapterConfig, values, "", newer, path)
    except (TinyTLError, TypeError, OverflowError) as error:
        raise TinyTLError(f"{path} is not a valid adapter config: {error}") from error


def _from_format_1(values: Mapping[str, Any]) -> dict[str, Any]:
    """What format 1 says, as format 2 says it: there one size had two names, and the other stood for both."""
    sizes = values.get("preprocessing")
    new = {**values, "format_version": FORMAT_VERSION}
    if isinstance(sizes, dict) and "image_size" in sizes:
        eval_size = sizes["image_size"]
        rest = {key: value for key, value in sizes.items() if key not in ("image_size", "train_image_size")}
        train_size = sizes.get("train_image_size")
        new["preprocessing"] = {
            **rest,
            "eval_size": eval_size,
            "train_size": eval_size if train_size is None else train_size,
        }
    return new


def _is_newer(version: object) -> bool:
    try:
        return Version(str(version)) > Version(__version__)
    except InvalidVersion:
        return False


def _build(kind: type, values: Any, key: str, newer: bool, path: Path) -> Any:
    """An instance of the dataclass ``kind``; ``key`` says where in the file its values stand."""
    if not isinstance(values, dict):
        raise TinyTLError(f"{key} is {_short(values)}, not an object")
    hints = typing.get_type_hints(kind)
    prefix = f"{key}." if key else ""
    for name in values.keys() - hints.keys():
        if not newer:
            raise TinyTLError(f"{prefix}{one_line(name)[:LONGEST]} is no setting")
        logger.warning("%s: %s%s is of a newer tinytl_hf and left out", path, prefix, one_line(name)[:LONGEST])
    needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(needed - values.keys()):
        raise TinyTLError(f"{prefix}{missing[0]} is missing")
    known = {name: value for name, value in values.items() if name in hints}
    return kind(**{name: _value(hints[name], v, prefix + name, newer, path) for name, v in known.items()})


def _value(kind: Any, value: Any, key: str, newer: bool, path: Path) -> Any:
    """``value`` if it is of the type ``kind``, with JSON's lists as tuples where those are wanted."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        if value is None and type(None) in typing.get_args(kind):
            return None
        (kind,) = (each for each in typing.get_args(kind) if each is not type(None))
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind):
        return _build(kind, value, key, newer, path)  # type: ignore[arg-type]
    if origin is Literal:
        fits = isinstance(value, str) and value in options
    elif origin in (list, tuple):
        fits = isinstance(value, list) and (origin is list or len(value) == len(options))
        if fits:
            return origin(_value(options[0], item, key, newer, path) for item in value)
    elif kind is float:
        fits = type(value) in (int, float)
    else:
        fits = type(value) is kind
    if not fits:
        wanted = " or ".join(map(repr, options)) if origin is Literal else getattr(kind, "__name__", str(kind))
        raise TinyTLError(f"{key} is {_short(value)}, not {wanted}")
    return float(value) if kind is float else value


def _short(value: Any) -> str:
    """A value of a file as text of a bounded length."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
