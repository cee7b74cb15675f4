"""Features at the boundary, computed once: all that what trains needs of an image where crops are off.

For FT-Last these are what the head gets; where only the last blocks train, the maps in front of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from tinytl_hf.config.run import Config
from tinytl_hf.data.augment import RandomCropFlip
from tinytl_hf.data.batches import STREAMS, DecodedImages, StreamedImages, make_loader
from tinytl_hf.data.shared import can_share, decode_in_shares
from tinytl_hf.errors import TinyTLError
from tinytl_hf.model import TinyTLModel


class CachedFeatures(Dataset):
    """The boundary's features of each image of a set.

    Args:
        rows: The features of each image's views as bytes, in memory or in a file that is mapped.
        shape: ``[views, ...]`` of an image's features.
        dtype: Their type.
        labels: ``[N]`` class numbers.
        in_file: Whether they are in a file.

    Attributes:
        in_memory: What the features take in bytes, or ``STREAMS``.
    """

    def __init__(
        self, rows: Sequence[Tensor], shape: tuple[int, ...], dtype: torch.dtype, labels: Tensor, in_file: bool
    ) -> None:
        self.rows, self.shape, self.dtype, self.labels = rows, shape, dtype, labels
        self.in_memory = STREAMS if in_file else sum(row.numel() for row in rows)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, index: list[int]) -> dict[str, Tensor]:
        rows = torch.stack([self.rows[i] for i in index]).view(self.dtype).view(len(index), *self.shape)
        views = dict(zip(("features", "mirrored"), rows.float().unbind(1), strict=False))
        return {**views, "labels": self.labels[index], "index": torch.tensor(index)}


def drawn_view(batch: dict[str, Tensor], augment: RandomCropFlip) -> Tensor:
    """Features ``[N, ...]`` of a batch of training, of the mirrored images where the draw says so."""
    features = batch["features"]
    if "mirrored" not in batch:
        return features
    flips = augment.flips(batch["index"]).view(-1, *[1] * (features.ndim - 1))
    return torch.where(flips, batch["mirrored"], features)


def compute_features(
    accelerator: Accelerator,
    model: TinyTLModel,
    images: DecodedImages | StreamedImages,
    config: Config,
    trains: bool,
) -> CachedFeatures:
    """Run the evaluation view of each image through what does not train, once.

    That is a pass of training, in which no frozen layer acts otherwise, as the lean engine's slices are several times
    faster on large batches than a stock evaluation.

    Args:
        accelerator: Processes to share the work; each gets all features, those of a machine from the same memory.
        model: One that trains by FT-Last, or its last blocks only.
        images: The set.
        config: The run's config.
        trains: Whether it is the training set: then features are fp16, and with ``data.flip`` those of the mirrored
            images are added. An evaluation's are fp32, so that its figures are those of the images.

    Raises:
        TinyTLError: The model's prefix cannot run by itself, fp16 cannot hold its features, or the disk is full.
    """
    model.to(accelerator.device).train()
    dtype = torch.float16 if trains else torch.float32
    mirrors = trains and config.data.flip

    def rows_of(index: np.ndarray) -> Iterator[Tensor]:
        if index.size == 0:  # there are more processes than images
            return
        batches = np.array_split(index, -(-len(index) // config.train.global_batch_size))
        loader = make_loader(images, config.data, batch_sampler=[batch.tolist() for batch in batches])
        shown = accelerator.is_main_process
        for batch in tqdm(loader, desc="features", disable=not shown, leave=False, mininterval=1):
            view = model.normalise(batch["pixels"].to(accelerator.device), batch["sizes"].to(accelerator.device))
            with accelerator.autocast():
                found = [_at_the_boundary(model, each) for each in ([view, view.flip(3)] if mirrors else [view])]
            features = torch.stack(found, dim=1).to(dtype).cpu().contiguous()
            if not features.isfinite().all():
                raise TinyTLError("train.cache_features: fp16 cannot hold these features; train without it")
            yield from features.flatten(1).view(torch.uint8)

    shape = _shape_of_features(model, accelerator, views=2 if mirrors else 1)
    in_file = len(images) * math.prod(shape) * dtype.itemsize > config.data.memory_limit_mb * 1e6
    whole = np.arange(len(images))
    rows = decode_in_shares(len(images), rows_of) if in_file or can_share() else list(rows_of(whole))
    return CachedFeatures([row for row in rows if row is not None], shape, dtype, images.labels, in_file)


def _shape_of_features(model: TinyTLModel, accelerator: Accelerator, views: int) -> tuple[int, ...]:
    size = model.config.preprocessing.eval_size
    features = _at_the_boundary(model, torch.zeros(1, 3, size, size, device=accelerator.device))
    return views, *features.shape[1:]


def _at_the_boundary(model: TinyTLModel, images: Tensor) -> Tensor:
    """What the first part that trains gets of normalised images ``[N, 3, H, W]``."""
    if model.config.method == "FT-Last":
        return model.features(images)
    if model.prefix is None:
        raise TinyTLError(f"train.cache_features: {model.config.backbone.name} cannot run a part of its blocks alone")
    return model.prefix.maps(images)
