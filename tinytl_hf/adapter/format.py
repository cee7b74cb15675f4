"""The delta on disk: a folder that describes itself and loads strictly or not at all.

``adapter_config.json`` says what to rebuild, ``adapter_model.safetensors`` holds exactly the trained
tensors and the buffers that training can have changed, under the backbone's own names.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tinytl_hf.adapter.delta import is_finite
from tinytl_hf.adapter.record import LONGEST, AdapterConfig, checked, config_from
from tinytl_hf.config.check import check
from tinytl_hf.data.pointers import check_is_here
from tinytl_hf.disk import encoded, expanded, write_together
from tinytl_hf.errors import TinyTLError
from tinytl_hf.network.weights import without_folder
from tinytl_hf.version import __version__

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
MAX_CONFIG_BYTES = 16_000_000
INSTEAD = "name the adapter that it was exported from"
URLS = ("http://", "https://", "hf://", "hf-hub:")


def folder_named(key: str, name: object) -> Path:
    """The folder that an argument ``key`` names, with ``~`` for the user's home.

    Raises:
        TinyTLError: It is no path that a folder can have, or an empty one, which would be the current folder.
    """
    check(isinstance(name, (str, os.PathLike)), key, name, "use the path of a folder, or user/name on the Hub")
    text = os.fspath(name)  # type: ignore[call-overload]
    check(bool(text.strip()), key, name, "it is empty, as of a variable that is not set; name a folder")
    check(not text.startswith(URLS), key, name, "is an address; a repository on the Hub is named as user/name")
    path = expanded(text)
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path
    except (OSError, ValueError) as error:  # too long, a NUL, half a character
        raise TinyTLError(f"{key}: no folder can be called so ({error})") from error
    return path


def write_adapter(folder: Path, config: AdapterConfig, tensors: Mapping[str, Tensor], card: str) -> None:
    """Write an adapter folder; its files appear together or not at all, and other files there stay.

    Args:
        folder: The folder, which is made if there is none.
        config: What the adapter says of itself; the version of this package is put into it.
        tensors: The delta by the backbone's own names.
        card: Its model card; empty to leave the one that is there.

    Raises:
        TinyTLError: The folder cannot be written or holds an adapter of another library, or a value is not finite or
            does not fit ``config.dtype``.
    """
    config = checked(replace(config, tinytl_hf_version=__version__))  # not that of an adapter it was loaded from
    stored = {name: _to_disk(name, tensor, config.dtype) for name, tensor in tensors.items()}
    try:
        _check_ours(folder / CONFIG_FILE)
        files = {TENSORS_FILE: save(stored, metadata={"format": "pt"}), CARD_FILE: encoded(card)}
        files[CONFIG_FILE] = encoded(config.to_json())
        write_together({folder / name: content for name, content in files.items() if content})
    except OSError as error:
        raise TinyTLError(f"cannot write the adapter to {folder}: {error}") from error


def _check_ours(path: Path) -> None:
    """Raise if a config is there that no version of this package wrote: PEFT calls its files by the same names."""
    if path.is_file() and b'"format_version"' not in path.read_bytes():
        raise TinyTLError(f"{path} is not of this package, and would be replaced; save to another folder")


def read_config(folder: Path) -> AdapterConfig:
    """Read ``adapter_config.json``.

    Raises:
        TinyTLError: No such folder, or a file that is no adapter config of a version known here.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise TinyTLError(f"{folder} is no adapter: it has no {CONFIG_FILE}{_why_not(folder)}")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise TinyTLError(f"{path} is not an adapter config: it has {path.stat().st_size / 1e6:.0f} MB")
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=each_once)
    except (OSError, ValueError, RecursionError) as error:
        raise TinyTLError(f"{path} is not valid JSON: {error}") from error
    return config_from(values, path)


def _why_not(folder: Path) -> str:
    if folder.is_dir():
        is_for_timm = all((folder / name).is_file() for name in ("config.json", "model.safetensors"))
        return f", as it is a model for timm; {INSTEAD}" if is_for_timm else ""
    if not folder.is_file():
        return ", as there is no such folder"
    if folder.suffix == ".onnx":
        return f", as it is an exported file, which predict alone takes; {INSTEAD}"
    is_in_one = (folder.parent / CONFIG_FILE).is_file()
    if folder.suffix == ".pte":
        return f", as it is an exported file for ExecuTorch; {INSTEAD}"
    if folder.suffix == ".safetensors" and not is_in_one:
        return ", as it is a file of weights; name the adapter, or load what merge wrote with tinytl_hf.load_merged"
    return f", as it is a file; name {folder.parent if is_in_one else 'the folder of an adapter'}"


def each_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, of whose values for one key Python would take the last."""
    if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise ValueError(f"{twice[0][:LONGEST]!r} is there more than once")
    return dict(pairs)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read ``adapter_model.safetensors`` as float32 (counters stay integers).

    Raises:
        TinyTLError: The file is absent, truncated, a pointer of Git LFS or not safetensors.
    """
    path = folder / TENSORS_FILE
    if not path.is_file():
        raise TinyTLError(f"{folder} has no {TENSORS_FILE}: the adapter is incomplete")
    try:
        tensors = load(path.read_bytes())  # not by its path, which the library takes in UTF-8 only
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, SafetensorError):
            check_is_here(path)
        raise TinyTLError(f"{path} is truncated or not a safetensors file: {error}") from error
    return {name: _as_read(tensor) for name, tensor in tensors.items()}


def _as_read(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def holds(folder: Path, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a folder holds this very adapter, in whatever type, wherever the file of the backbone's weights is."""
    try:
        saved, found = read_config(folder), read_tensors(folder)
        own = {name: _as_read(_to_disk(name, tensor, saved.dtype)) for name, tensor in tensors.items()}
    except TinyTLError:  # it was taken away, or is damaged by now; or a value is none that a file holds
        return False
    same_names = _as_trained(saved) == _as_trained(config) and found.keys() == own.keys()
    return same_names and all(torch.equal(found[name], own[name]) for name in own)


def _as_trained(config: AdapterConfig) -> AdapterConfig:
    """A config without what is said only where it is saved."""
    backbone = replace(config.backbone, weights=without_folder(config.backbone.weights))
    return replace(config, backbone=backbone, dtype="fp32", data=None, tinytl_hf_version="")


def _to_disk(name: str, tensor: Tensor, dtype: str) -> Tensor:
    tensor = _as_read(tensor.detach().cpu().contiguous().clone())  # whatever the model was cast to
    if not is_finite(tensor):
        raise TinyTLError(f"{name} has values that are not finite, which no adapter can have; nothing was written")
    # Statistics stay fp32: they are few, and a variance can exceed fp16's range.
    if dtype == "fp32" or not tensor.is_floating_point() or "running_" in name.rpartition(".")[2]:
        return tensor
    if tensor.abs().max() > torch.finfo(torch.float16).max:
        raise TinyTLError(f"adapter.dtype=fp16: {name} has values beyond its range; use fp32")
    return tensor.half()
