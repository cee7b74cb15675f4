"""Features of a frozen backbone, computed once: all that FT-Last needs of an image."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from tinytl_hf.config.run import Config
from tinytl_hf.data.augment import RandomCropFlip
from tinytl_hf.data.batches import DecodedImages, StreamedImages, make_loader
from tinytl_hf.model import TinyTLModel


class CachedFeatures(Dataset):
    """The head's input for each image of a set, in memory.

    Args:
        views: ``[N, features]`` by name: ``features``, and ``mirrored`` those of the mirrored images.
        labels: ``[N]`` class numbers.

    Attributes:
        in_memory: What the features take, in bytes.
    """

    def __init__(self, views: dict[str, Tensor], labels: Tensor) -> None:
        self.views, self.labels = views, labels
        self.in_memory = sum(features.numel() * features.element_size() for features in views.values())

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, index: list[int]) -> dict[str, Tensor]:
        views = {name: features[index] for name, features in self.views.items()}
        return {**views, "labels": self.labels[index], "index": torch.tensor(index)}


def drawn_view(batch: dict[str, Tensor], augment: RandomCropFlip) -> Tensor:
    """Features ``[N, features]`` of a batch of training, of the mirrored images where the draw says so."""
    if "mirrored" not in batch:
        return batch["features"]
    return torch.where(augment.flips(batch["index"])[:, None], batch["mirrored"], batch["features"])


def compute_features(
    accelerator: Accelerator,
    model: TinyTLModel,
    images: DecodedImages | StreamedImages,
    config: Config,
    mirrored: bool = False,
) -> CachedFeatures:
    """Run the evaluation view of each image through the frozen backbone, once.

    That is a pass of training, in which no frozen layer acts otherwise, as the lean engine's slices are several times
    faster on large batches than a stock evaluation.

    Args:
        accelerator: Processes to share the work; each gets all features.
        model: One that trains by FT-Last.
        images: The set.
        config: The run's config.
        mirrored: Whether to add the mirrored images' features.
    """
    model.to(accelerator.device).train()
    loader = accelerator.prepare(make_loader(images, config.data, batch_size=config.train.global_batch_size))
    found: dict[str, list[Tensor]] = {}
    for batch in tqdm(loader, desc="features", disable=not accelerator.is_main_process, leave=False, mininterval=1):
        view = model.normalise(batch["pixels"], batch["sizes"])
        for name, inputs in {"features": view, **({"mirrored": view.flip(3)} if mirrored else {})}.items():
            features = accelerator.gather_for_metrics(model.features(inputs))
            found.setdefault(name, []).append(features.float().cpu())
    return CachedFeatures({name: torch.cat(features) for name, features in found.items()}, images.labels)
