"""Features of a frozen backbone, computed once: all that FT-Last needs of an image."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from tinytl_hf.config import Config
from tinytl_hf.data import DecodedImages, StreamedImages, make_loader
from tinytl_hf.model import TinyTLModel


class CachedFeatures(Dataset):
    """The head's input for each image of a set, in memory.

    Args:
        features: ``[N, features]``.
        labels: ``[N]`` class numbers.
    """

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, index: list[int]) -> dict[str, Tensor]:
        return {"features": self.features[index], "labels": self.labels[index]}


def compute_features(
    accelerator: Accelerator, model: TinyTLModel, images: DecodedImages | StreamedImages, config: Config
) -> CachedFeatures:
    """Run the evaluation view of each image through the frozen backbone, once.

    That is a pass of training, in which no frozen layer acts otherwise, as the lean engine's slices are several times
    faster on large batches than a stock evaluation.

    Args:
        accelerator: Processes to share the work; each gets all features.
        model: One that trains by FT-Last.
        images: The set.
        config: The run's config.
    """
    model.to(accelerator.device).train()
    loader = accelerator.prepare(make_loader(images, config.data, batch_size=config.train.global_batch_size))
    found = []
    for batch in tqdm(loader, desc="features", disable=not accelerator.is_main_process, leave=False, mininterval=1):
        features = model.features(model.normalise(batch["pixels"], batch["sizes"]))
        found.append(accelerator.gather_for_metrics(features).float().cpu())
    return CachedFeatures(torch.cat(found), images.labels)
