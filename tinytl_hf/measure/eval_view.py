"""How a trained model sees images: at the size and with the crop of its evaluation, or of another."""

from __future__ import annotations

from dataclasses import replace

from tinytl_hf.adapter.record import AdapterConfig
from tinytl_hf.config.data import DataConfig
from tinytl_hf.errors import TinyTLError
from tinytl_hf.model import TinyTLModel
from tinytl_hf.network.backbones import check_size, check_takes


def with_view(model: TinyTLModel, data: DataConfig) -> AdapterConfig:
    """A model's config with the size and the crop that options of data name.

    Raises:
        TinyTLError: The network cannot see that size, or another one to train at is named.
    """
    config, trained = model.config, model.config.preprocessing
    if data.train_size != trained.train_size:
        raise TinyTLError(
            f"data.train_size={data.train_size}: the adapter was trained at {trained.train_size} px; choose the size "
            "in use with --data.eval_size"
        )
    eval_size = data.eval_size or trained.train_size
    check_size(config.backbone.name, "data.eval_size", eval_size)
    check_takes(config.backbone.name, model.backbone, "data.eval_size", eval_size)
    crop_pct = data.crop_pct or trained.crop_pct
    return replace(config, preprocessing=replace(trained, eval_size=eval_size, crop_pct=crop_pct))
