"""From an adapter's config to the network it describes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tinytl_hf.adapter.delta import check_tensors
from tinytl_hf.adapter.record import AdapterConfig
from tinytl_hf.config.engine import Engine
from tinytl_hf.errors import TinyTLError
from tinytl_hf.network import methods
from tinytl_hf.network.backbones import check_size, create_backbone
from tinytl_hf.network.blocks import TinyTLBlock, convert_blocks
from tinytl_hf.network.weights import is_weights_file


def build_network(
    config: AdapterConfig, weights: str, engine: Engine | None = None
) -> tuple[nn.Module, dict[str, TinyTLBlock]]:
    """Build the backbone with its head, made to train by the config's method.

    Args:
        config: What to build.
        weights: Source of the backbone's weights.
        engine: Only its ``gradient_checkpointing`` is used here; None means off.

    Returns:
        The network, and its residual blocks by name.

    Raises:
        TinyTLError: A name, source or size that does not fit.
    """
    name, sizes = config.backbone.name, config.preprocessing
    check_size(name, "train_size", sizes.train_size)
    check_size(name, "eval_size", sizes.eval_size)
    backbone = create_backbone(name, weights, len(config.label_names), config.head.dropout)
    blocks = convert_blocks(backbone, engine is not None and engine.gradient_checkpointing)
    methods.apply_method(backbone, blocks, config.method, sizes.train_size, config.lite, config.trained_blocks)
    return backbone, blocks


def check_fits(config: AdapterConfig, tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise unless ``tensors`` are what ``config`` describes, before memory is taken for what it describes."""
    with torch.device("meta"):
        backbone, _ = build_network(config, "none")
    check_tensors(backbone, tensors, source)


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
