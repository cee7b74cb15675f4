"""What one training step is made of, for the run that takes it and for the figures that are measured of it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from tinytl_hf.config.train import TrainConfig
from tinytl_hf.data.augment import RandomCropFlip, resample
from tinytl_hf.model import TinyTLModel


def make_optimizer(model: TinyTLModel, options: TrainConfig) -> Optimizer:
    """An optimizer over the parameters that train, and no others."""
    groups = model.parameter_groups(options.lr, options.weight_decay, options.decay_norms_and_biases)
    # One kernel for all of the many small tensors, where there is one.
    fused = next(model.trainable_parameters()).device.type in {"cpu", "cuda"}
    if options.optimizer == "sgd":
        return SGD(groups, lr=options.lr, momentum=options.momentum, fused=fused)
    return (AdamW if options.optimizer == "adamw" else Adam)(groups, lr=options.lr, fused=fused)


def training_view(model: TinyTLModel, batch: Mapping[str, Tensor], augment: RandomCropFlip, size: int) -> Tensor:
    """A batch of decoded photos, cropped, flipped, resized and normalised.

    Args:
        model: For mean, standard deviation and interpolation of its preprocessing.
        batch: ``pixels``, ``sizes`` and ``index``, as :mod:`tinytl_hf.data.batches` describes them.
        augment: What draws the crops.
        size: Side of the result in px.

    Returns:
        ``float32`` ``[N, 3, size, size]``, channels last.
    """
    boxes, flips = augment(batch["sizes"], batch["index"])
    return resample(batch["pixels"], batch["sizes"], boxes, size, *model.config.preprocessing.normal, flips)
