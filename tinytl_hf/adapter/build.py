"""From an adapter's config to the network it describes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from enum import Enum
from numbers import Real
from typing import Literal

import torch
from torch import Tensor, nn

from tinytl_hf.adapter.delta import (
    adapter_tensors,
    check_complete,
    check_tensors,
    check_values,
    frozen_tensors,
)
from tinytl_hf.adapter.record import AdapterConfig, BackboneRecord, Preprocessing, checked, label_strings
from tinytl_hf.config.check import check, whole_number
from tinytl_hf.config.network import HeadConfig, LiteConfig
from tinytl_hf.disk import StrPath
from tinytl_hf.errors import TinyTLError
from tinytl_hf.network import methods
from tinytl_hf.network.backbones import check_size, check_takes, create_backbone, find_backbone, sha256
from tinytl_hf.network.blocks import TinyTLBlock, convert_blocks
from tinytl_hf.network.head import head_of
from tinytl_hf.network.no_values import NoRandomValues
from tinytl_hf.network.weights import is_weights_file
from tinytl_hf.words import counted

logger = logging.getLogger(__name__)


def new_config(
    name: str,
    weights: StrPath,
    method: str,
    labels: tuple[Iterable[object] | None, int | None],
    sizes: tuple[int, int | None, float | None],
    frozen_weights: Literal["fp32", "int8"],
    trained_blocks: int | Literal["all"] | None,
    lite: LiteConfig | None,
    head: HeadConfig | None,
) -> AdapterConfig:
    """What a new adapter is, from the arguments of ``TinyTLModel.from_backbone``.

    Args:
        name: The backbone.
        weights: Source of its weights.
        method: The method, or an alias.
        labels: Names of the classes, and their number.
        sizes: Of training and evaluation in px, and the share of the crop.
        frozen_weights: How frozen weights are stored.
        trained_blocks: How many of the last blocks train; None: all.
        lite: Options of the lite residuals.
        head: Options of the head.

    Raises:
        TinyTLError: One that does not fit.
    """
    (names, count), (train_size, eval_size, crop_pct) = labels, sizes
    _check_types(name, weights, crop_pct, lite, head)
    found = find_backbone(name, os.fspath(weights))
    config = AdapterConfig(
        backbone=BackboneRecord(found.name, found.weights, frozen_weights=frozen_weights, license=found.license),
        method=methods.by_name(method),
        preprocessing=Preprocessing.of(
            found,
            whole_number("train_size", train_size),
            None if eval_size is None else whole_number("eval_size", eval_size),
            crop_pct,
        ),
        label_names=label_strings(names, None if count is None else whole_number("num_classes", count)),
        trained_blocks=None if trained_blocks in (None, "all") else whole_number("trained_blocks", trained_blocks),
        lite=lite or LiteConfig(),
        head=head or HeadConfig(),
    )
    return checked(config)


def source_of(weights: object, own: str) -> str:
    """The source of weights that an argument names; ``own`` where it is None.

    Raises:
        TinyTLError: It is nothing that can be one.
    """
    if weights is None:
        return own
    text = os.fspath(weights) if isinstance(weights, (str, os.PathLike)) else ""
    check(bool(text.strip()), "weights", weights, f"use {_sources(weights)}")
    return text


def _sources(weights: object) -> str:
    """What to use in place of what is no source: of torchvision's enumerations, the name."""
    own = f", and here {weights.name} as a text" if isinstance(weights, Enum) else ""
    return f"imagenet, a file or none, for example{own}"


def _check_types(name: object, weights: object, crop_pct: object, lite: object, head: object) -> None:
    """Raise for arguments of another type, of which nothing that is called with them would say what is wrong."""
    own = "; a network's own weights are taken from a file of its state_dict(), with weights="
    hint = own if isinstance(name, nn.Module) else ""
    check(isinstance(name, str), "name", name, f"use the name of a backbone, such as mobilenet_v2{hint}")
    check(isinstance(weights, (str, os.PathLike)), "weights", weights, f"use {_sources(weights)}")
    is_share = isinstance(crop_pct, Real) and not isinstance(crop_pct, bool)
    check(crop_pct is None or is_share, "crop_pct", crop_pct, "use a share above 0, at most 1")
    check(lite is None or isinstance(lite, LiteConfig), "lite", lite, "use a LiteConfig of tinytl_hf.config.network")
    check(head is None or isinstance(head, HeadConfig), "head", head, "use a HeadConfig of tinytl_hf.config.network")


def as_it_is(config: AdapterConfig, backbone: nn.Module) -> AdapterConfig:
    """The config with the hash of the frozen tensors as they are now, where they have kept their type.

    Raises:
        TinyTLError: As of :func:`check_complete` and :func:`check_values`; or it has other classes than logits.
    """
    check_complete(backbone)
    tensors = frozen_tensors(backbone)
    check_values({**adapter_tensors(backbone), **tensors})
    if (count := head_of(backbone)[1].out_features) != len(config.label_names):
        raise TinyTLError(
            f"label_names: there are {len(config.label_names)}, and the head has {counted(count, 'logit')}; build a "
            "model with label_names= for other classes"
        )
    floats = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if config.backbone.sha256 is None or config.backbone.frozen_weights == "int8" or floats != {torch.float32}:
        return config
    if (found := sha256(tensors)) != config.backbone.sha256:
        logger.warning(
            "the frozen weights are not those of %s any more: who loads this adapter has to name a file that holds "
            "them, with weights=",
            config.backbone.weights,
        )
    return replace(config, backbone=replace(config.backbone, sha256=found))


def build_network(
    config: AdapterConfig, weights: str | None = None, gradient_checkpointing: bool = False
) -> tuple[nn.Module, dict[str, TinyTLBlock]]:
    """Build the backbone with its head, made to train by the config's method.

    Args:
        config: What to build.
        weights: Source of the backbone's weights; None: the config's own.
        gradient_checkpointing: Whether blocks are computed a second time in the backward pass.

    Returns:
        The network, and its residual blocks by name.

    Raises:
        TinyTLError: A name, source or size that does not fit.
    """
    fits = isinstance(config, AdapterConfig)
    check(fits, "config", config, "build a model with TinyTLModel.from_backbone or from_pretrained")
    name, sizes = config.backbone.name, config.preprocessing
    check_size(name, "data.train_size", sizes.train_size)
    check_size(name, "data.eval_size", sizes.eval_size)
    source = config.backbone.weights if weights is None else weights
    backbone = create_backbone(name, source, len(config.label_names), config.head.dropout)
    methods.parameter_roles(backbone)  # raises where neither another method nor another size would help
    if not next(backbone.parameters()).is_meta:  # what is built without values is built once more, with them
        for key in ("train_size", "eval_size"):
            check_takes(name, backbone, f"data.{key}", getattr(sizes, key))
    blocks = convert_blocks(backbone, gradient_checkpointing)
    methods.apply_method(backbone, blocks, config.method, sizes.train_size, config.lite, config.trained_blocks)
    return backbone, blocks


def network_without_values(name: str, weights: str) -> tuple[str, nn.Module]:
    """A backbone's whole name, and the backbone on the meta device.

    Args:
        name: The backbone.
        weights: Source of its weights, which must be there and are not read.

    Raises:
        TinyTLError: There is none of that name, its weights cannot be had, or no method can train it.
    """
    found = find_backbone(name, weights)
    with torch.device("meta"):
        backbone = create_backbone(found.name, "none", 2)
    methods.parameter_roles(backbone)
    return found.name, backbone


def check_fits(config: AdapterConfig, tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise unless ``tensors`` are what ``config`` describes, before memory is taken for what it describes."""
    with torch.device("meta"), NoRandomValues():
        backbone, _ = build_network(config, "none")
    check_tensors(backbone, tensors, source)
    if config.backbone.sha256 is None and frozen_tensors(backbone):
        raise TinyTLError(
            f"{source}: backbone.sha256 is missing in its adapter_config.json, which says what frozen weights "
            f"{config.method} was trained on; put it back as it was saved"
        )


def recorded(saved: AdapterConfig, source: str) -> str:
    """What an adapter says of its weights, once they were read from ``source``: a name that others know stays."""
    return source if is_weights_file(saved.backbone.weights) else saved.backbone.weights


def check_weights(saved: AdapterConfig, found: str | None, weights: str, source: str) -> None:
    """Raise unless the frozen tensors are those that an adapter was trained on.

    Args:
        saved: The adapter.
        found: Hash of the frozen tensors that ``weights`` gave.
        weights: Where they come from.
        source: The adapter's folder, for the message.
    """
    if found != saved.backbone.sha256:
        raise TinyTLError(
            f"{source} was trained on other weights of {saved.backbone.name} than {weights} holds (sha256 of the "
            f"frozen tensors is {found}, expected {saved.backbone.sha256}); name the right ones with weights= or "
            "--weights"
        )
