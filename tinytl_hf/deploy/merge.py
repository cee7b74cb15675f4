"""Backbone and adapter as one file of weights: the verb ``merge``.

Where an adapter only changes values, that is a state dict of torchvision's or timm's own network. Lite residuals are
layers that they do not have, so with them the file is for :func:`load_merged`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from tinytl_hf.adapter.build import build_network
from tinytl_hf.adapter.delta import frozen_tensors
from tinytl_hf.adapter.format import CONFIG_FILE, each_once
from tinytl_hf.adapter.record import AdapterConfig, config_from
from tinytl_hf.config.check import check
from tinytl_hf.config.verbs import MergeConfig
from tinytl_hf.disk import StrPath, expanded, write_bytes, writing
from tinytl_hf.errors import TinyTLError, one_line, quoted
from tinytl_hf.hub.card import ADAPTER_FILES
from tinytl_hf.hub.transfer import without_paths
from tinytl_hf.lean.int8 import dequantise
from tinytl_hf.model import TinyTLModel
from tinytl_hf.network import proxylessnas
from tinytl_hf.network.backbones import sha256
from tinytl_hf.network.methods import METHODS
from tinytl_hf.network.timm_nets import PREFIX, architecture
from tinytl_hf.network.weights import is_weights_file

ASKS_FOR_VERSION = "mnasnet"  # of torchvision: loads no state dict without the version that its own has beside it
OWN_WEIGHTS = "holds_frozen_weights"  # in the metadata of a file of int8 weights, whose values are nowhere else


def merge(config: MergeConfig) -> str:
    """Write the merged weights, with the adapter's config and the way to load them in the file's metadata.

    Returns:
        What the file is and how to load it.

    Raises:
        TinyTLError: The adapter cannot be loaded, or the file exists or cannot be written.
    """
    path = Path(config.output)
    if path.name in ADAPTER_FILES and (path.parent / CONFIG_FILE).is_file():
        raise TinyTLError(f"output={path}: is a file of the adapter in {path.parent}; name another file")
    if os.path.lexists(path) and not config.overwrite:  # a link that leads nowhere, too
        raise TinyTLError(f"output={path}: exists; name another file, or replace it with --overwrite true")
    model = TinyTLModel.from_pretrained(config.adapter, weights=config.weights, revision=config.revision)
    _check_not_needed(path, model)
    is_int8 = model.config.backbone.frozen_weights == "int8"
    if is_int8:
        dequantise(model.backbone)  # so that the file holds plain layers, with other frozen tensors than before
        found = sha256(frozen_tensors(model.backbone))
        # Nothing else holds these values: an adapter that is saved of them names this file.
        record = replace(model.config.backbone, frozen_weights="fp32", sha256=found, weights=str(path))
        model.config = replace(model.config, backbone=record)
    what, how = _description(model.config, path.name)  # the file says nothing of this disk
    tensors = {name: tensor.contiguous() for name, tensor in model.backbone.state_dict().items()}
    shown = without_paths(model.config).to_json()
    metadata = {"format": "pt", "content": what, "load_with": how, "adapter_config": shown}
    if is_int8:
        metadata[OWN_WEIGHTS] = "true"
    with writing(f"output={path}", "name another file"):
        write_bytes(path, save(tensors, metadata=metadata))
    return f"{path}: {what}; load it with {_description(model.config, str(path))[1]}"


def _check_not_needed(path: Path, model: TinyTLModel) -> None:
    """Raise if a file holds the very weights that the adapter needs, as others may."""
    weights, needed = expanded(model._weights_from), model.config.backbone.sha256 is not None
    if needed and is_weights_file(str(weights)) and path.exists() and weights.exists() and path.samefile(weights):
        raise TinyTLError(
            f"output={path}: holds the backbone's weights, without which the adapter does not load; name another file"
        )


def load_merged(path: StrPath) -> TinyTLModel:
    """Load a file that :func:`merge` wrote, of any method, in evaluation mode; nothing else is needed.

    Raises:
        TinyTLError: No such file, a damaged one, or one of another kind.
    """
    is_path = isinstance(path, (str, os.PathLike)) and bool(os.fspath(path))
    check(is_path, "path", path, "name a file that tinytl-hf merge wrote")
    path = expanded(path)
    if not path.is_file():
        raise TinyTLError(f"{path} is no file; name one that tinytl-hf merge wrote")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        values = json.loads(metadata.get("adapter_config", "null"), object_pairs_hook=each_once)
        tensors = load_file(path)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise TinyTLError(f"{path} cannot be read as a safetensors file: {error}") from error
    if not isinstance(values, dict):
        raise TinyTLError(f"{path} was not written by tinytl-hf merge: it has no adapter_config in its metadata")
    saved = config_from(values, path)
    try:
        with torch.device("meta"):  # first without memory, in case the config asks for more than the file holds
            _fill(build_network(saved, "none")[0], tensors, assign=True)
        if bad := [name for name, tensor in tensors.items() if not tensor.float().isfinite().all()]:
            raise TinyTLError(f"{path}: {bad[0]} has values that are not finite; merge the adapter again")
        model = TinyTLModel(replace(saved, backbone=replace(saved.backbone, weights="none")))
        _fill(model.backbone, tensors)
    except RuntimeError as error:
        raise TinyTLError(f"{path} does not fit the adapter_config in its metadata: {one_line(error)}") from error
    is_itself = OWN_WEIGHTS in metadata or saved.backbone.weights == path.name  # older files say only their name
    record = replace(saved.backbone, weights=str(path.absolute())) if is_itself else saved.backbone
    model.config = replace(saved, backbone=record)
    model._weights_from = record.weights if is_itself else ""  # what the adapter trained is not in them as it was
    return model.eval()


def _fill(network: nn.Module, tensors: Mapping[str, Tensor], assign: bool = False) -> None:
    """Load all that a network has, and nothing else.

    Raises:
        RuntimeError: They are not those of the network.
    """
    state = network.state_dict()  # which holds the version, too, that torchvision's MNASNet asks for
    if missing := sorted(state.keys() - tensors.keys()):
        raise RuntimeError(f"it lacks {', '.join(missing)}")
    state.update(tensors)
    network.load_state_dict(state, assign=assign)


def _description(config: AdapterConfig, file: str) -> tuple[str, str]:
    """What the file is, and the code that loads it."""
    name, classes = config.backbone.name, len(config.label_names)
    library, own_name, build = "torchvision", name, "torchvision.models.get_model"
    if name.startswith(PREFIX):
        library, own_name, build = "timm", architecture(name).removeprefix(PREFIX), "timm.create_model"
    load_merged = f"tinytl_hf.load_merged({quoted(file)})"
    if name == proxylessnas.NAME:
        return f"{name} ({config.method}, {classes} classes), which neither torchvision nor timm has", load_merged
    if METHODS[config.method].lite_residual:
        what = f"{name} with lite residuals ({config.method}, {classes} classes), not a {library} model"
        return what, load_merged
    what = f"{library}'s {own_name} with {classes} classes"
    network = f'{build}("{own_name}", num_classes={classes})'
    tensors = f"safetensors.torch.load_file({quoted(file)})"
    if own_name.startswith(ASKS_FOR_VERSION) and library == "torchvision":
        filled = f"state = network.state_dict(); state.update({tensors}); network.load_state_dict(state)"
        return what, f"network = {network}; {filled}"
    return what, f"{network}.load_state_dict({tensors})"
