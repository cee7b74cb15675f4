"""The delta on disk: a folder that describes itself and loads strictly or not at all.

``adapter_config.json`` says what to rebuild, ``adapter_model.safetensors`` holds exactly the trained
tensors and the buffers that training can have changed, under the backbone's own names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from tinytl_hf.config.run import DataConfig, HeadConfig, LiteConfig, MethodName
from tinytl_hf.disk import write_bytes, write_text
from tinytl_hf.errors import TinyTLError
from tinytl_hf.network.torchvision_nets import IMAGENET_MEAN, IMAGENET_STD
from tinytl_hf.version import __version__

FORMAT_VERSION = 2
CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
MAX_CONFIG_BYTES = 16_000_000


@dataclass(frozen=True)
class BackboneRecord:
    """The backbone an adapter was trained on.

    Attributes:
        name: torchvision's name.
        weights: Source of the weights.
        sha256: Hash of the frozen tensors as they came; null where the method trains everything.
        frozen_weights: How frozen convolution weights are stored in memory, ``fp32`` or ``int8``.
    """

    name: str
    weights: str
    sha256: str | None = None
    frozen_weights: Literal["fp32", "int8"] = "fp32"


@dataclass(frozen=True)
class Preprocessing:
    """From an image to the network's input: resize, centre crop, normalise.

    Attributes:
        train_size: Side of the training images in px, to which lite residuals are fitted.
        eval_size: Side of the images at evaluation and in use in px.
        crop_pct: Side of the centre crop as a share of the image's shorter side.
        mean: Mean of each RGB channel, on a scale of 0 to 1.
        std: Standard deviation of each RGB channel, on the same scale.
    """

    train_size: int
    eval_size: int
    crop_pct: float = 0.875
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)) or min(self.std) <= 0:
            raise TinyTLError(f"mean={self.mean}, std={self.std}: use finite numbers, and a std above 0")
        if not 0 < self.crop_pct <= 1:
            raise TinyTLError(f"crop_pct={self.crop_pct}: use a share above 0, at most 1")


@dataclass(frozen=True)
class DataRecord:
    """The data an adapter was trained and evaluated on: what ``eval`` uses unless told otherwise."""

    dataset: str
    subset: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    train_split: str = "train"
    eval_split: str | None = None
    eval_fraction: float = 0.1
    split_seed: int = 0
    max_eval_samples: int | None = None
    skip_corrupt: bool = False

    @classmethod
    def of(cls, data: DataConfig) -> DataRecord:
        """Keep what says which images were used."""
        return cls(**{name: getattr(data, name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class AdapterConfig:
    """What ``adapter_config.json`` holds."""

    backbone: BackboneRecord
    method: MethodName
    preprocessing: Preprocessing
    label_names: list[str]
    lite: LiteConfig = field(default_factory=LiteConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    data: DataRecord | None = None
    dtype: Literal["fp32", "fp16"] = "fp32"
    format_version: int = FORMAT_VERSION
    tinytl_hf_version: str = __version__

    def __post_init__(self) -> None:
        if not self.label_names or len(set(self.label_names)) < len(self.label_names):
            raise TinyTLError(f"label_names: {len(self.label_names)} names; use one or more, each once")

    def to_json(self) -> str:
        """Sorted, indented JSON."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"


def write_adapter(folder: Path, config: AdapterConfig, tensors: Mapping[str, Tensor], card: str) -> None:
    """Write an adapter folder; each file appears whole or not at all, and other files there stay.

    Raises:
        TinyTLError: The folder cannot be written, or a value does not fit ``config.dtype``.
    """
    stored = {name: _to_disk(name, tensor, config.dtype) for name, tensor in tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / TENSORS_FILE, save(stored, metadata={"format": "pt"}))
        if card:
            write_text(folder / CARD_FILE, card)
        write_text(folder / CONFIG_FILE, config.to_json())
    except OSError as error:
        raise TinyTLError(f"cannot write the adapter to {folder}: {error}") from error


def read_config(folder: Path) -> AdapterConfig:
    """Read ``adapter_config.json``.

    Raises:
        TinyTLError: No such folder, or a file that is no adapter config of a version known here.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise TinyTLError(f"{folder} is no adapter: it has no {CONFIG_FILE}")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise TinyTLError(f"{path} is not an adapter config: it has {path.stat().st_size / 1e6:.0f} MB")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TinyTLError(f"{path} is not valid JSON: {error}") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if type(version) is not int or version < 1:
        raise TinyTLError(f"{path} is not a tinytl_hf adapter: it has no format_version")
    if version > FORMAT_VERSION:
        raise TinyTLError(
            f"{path} has format_version {version}, and this tinytl_hf reads up to {FORMAT_VERSION}: "
            "pip install --upgrade tinytl-hf"
        )
    return config_from(values if version == FORMAT_VERSION else _from_format_1(values), path)


def config_from(values: dict[str, Any], path: Path) -> AdapterConfig:
    """The config that a file's ``values`` describe.

    Raises:
        TinyTLError: They are not those of an adapter.
    """
    _check_structure(values, path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(AdapterConfig, "adapter")
    try:
        return parser.instantiate(parser.parse_object({"adapter": values}))["adapter"]
    except Exception as error:
        reason = " ".join(str(error).replace("adapter.", "").split())
        raise TinyTLError(f"{path} is not a valid adapter config: {reason}") from error


def _from_format_1(values: dict[str, Any]) -> dict[str, Any]:
    """What format 1 says, as format 2 says it: there one size had two names, and the other stood for both."""
    sizes = values.get("preprocessing")
    if not isinstance(sizes, dict) or "image_size" not in sizes:
        return values
    sizes = dict(sizes)
    eval_size, train_size = sizes.pop("image_size"), sizes.pop("train_image_size", None)
    sizes |= {"eval_size": eval_size, "train_size": eval_size if train_size is None else train_size}
    return {**values, "preprocessing": sizes, "format_version": FORMAT_VERSION}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read ``adapter_model.safetensors`` as float32 (counters stay integers).

    Raises:
        TinyTLError: The file is absent, truncated or not safetensors.
    """
    path = folder / TENSORS_FILE
    if not path.is_file():
        raise TinyTLError(f"{folder} has no {TENSORS_FILE}: the adapter is incomplete")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise TinyTLError(f"{path} is truncated or not a safetensors file: {error}") from error
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def _to_disk(name: str, tensor: Tensor, dtype: str) -> Tensor:
    tensor = tensor.detach().cpu().contiguous().clone()
    # Statistics stay fp32: they are few, and a variance can exceed fp16's range.
    if dtype == "fp32" or not tensor.is_floating_point() or "running_" in name.rpartition(".")[2]:
        return tensor
    if tensor.abs().max() > torch.finfo(torch.float16).max:
        raise TinyTLError(f"adapter.dtype=fp16: {name} has values beyond its range; use fp32")
    return tensor.half()


GROUPS: dict[str, type] = {
    **{"backbone": BackboneRecord, "preprocessing": Preprocessing},
    **{"lite": LiteConfig, "head": HeadConfig, "data": DataRecord},
}


def _check_structure(values: dict[str, Any], path: Path) -> None:
    """Raise unless ``values`` are known names with plain values: the parser could read more into anything else."""
    names = {field.name for field in fields(AdapterConfig)}
    for key, value in values.items():
        group = value if key in GROUPS else {key: value}
        known = {field.name for field in fields(GROUPS[key])} if key in GROUPS else names
        if value is None and key == "data":
            continue
        if not isinstance(group, dict):
            raise TinyTLError(f"{path} is not a valid adapter config: {key} is {value!r}, not an object")
        for name, plain in group.items():
            nested = any(isinstance(item, (dict, list)) for item in (plain if isinstance(plain, list) else [plain]))
            if name not in known or nested:
                what = "is no setting" if name not in known else "holds more than a value or a list of values"
                raise TinyTLError(f"{path} is not a valid adapter config: {name} {what}")
