"""What training does to images beyond crop and flip: one operation at random, and blends of two images.

As of crops, the draws depend on the seed, the epoch and the image alone, so a run is the same for any number of
processes and after a resume. torchvision's own mixup and cutmix draw one share for a whole batch, and its
TrivialAugment one operation: here each image, or pair, has its own.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import TrivialAugmentWide

from tinytl_hf.config.run import Config

PLAIN_SHARE = 1 / 5  # of the epochs, the last ones: a network ends on images as it will see them


def changing_epochs(epochs: int) -> int:
    """In how many of the epochs, from the first on, images are changed."""
    return epochs - round(epochs * PLAIN_SHARE)


class Changes:
    """Operations and blends of a run's training images.

    Blends are of neighbours in a batch (the first and second image, the third and fourth, ...), which a batch that is
    split over processes leaves together. Both take the share that is drawn for the first.

    Args:
        images: Number of images in the training set.
        config: The run, with its epochs settled.

    Attributes:
        epochs: In how many epochs they act, from the first on.
    """

    def __init__(self, images: int, config: Config) -> None:
        self.images, self.seed = images, config.seed
        self.mixup, self.cutmix = config.train.mixup, config.train.cutmix
        self.operates, self.mixes = config.data.auto_augment == "trivial", self.mixup > 0 or self.cutmix > 0
        self.epochs = changing_epochs(config.train.plan.epochs) if self.operates or self.mixes else 0
        self._operation = TrivialAugmentWide()
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the numbers of one epoch for each image."""
        self.acts = epoch < self.epochs
        if not self.acts:
            return
        rng = np.random.default_rng((self.seed, epoch, 1))
        self.seeds = rng.integers(2**62, size=self.images)
        by_mixup, by_cutmix = (rng.beta(a or 1, a or 1, self.images) for a in (self.mixup, self.cutmix))
        cuts: np.ndarray = np.zeros(self.images, dtype=bool)
        if self.cutmix > 0:  # with mixup as well, a coin decides
            cuts = (rng.random(self.images) < 0.5) | (self.mixup == 0)
        drawn = [np.where(cuts, by_cutmix, by_mixup), cuts, rng.random(self.images), rng.random(self.images)]
        self.draws = torch.from_numpy(np.stack(drawn, axis=1)).float()

    def operate(self, pixels: Tensor, index: Tensor) -> Tensor:
        """Change each image by one of TrivialAugment's operations.

        Args:
            pixels: Values from 0 to 255, ``[N, 3, H, W]``.
            index: ``[N]`` positions of the images in the training set.

        Returns:
            The same shape, as ``uint8``.
        """
        images = pixels.round().clamp(0, 255).to(torch.uint8)
        before = torch.get_rng_state()
        try:
            for image, position in zip(images, index.tolist(), strict=True):
                torch.default_generator.manual_seed(int(self.seeds[position]))  # of the CPU alone, which draws
                image.copy_(self._operation(image))
        finally:
            torch.set_rng_state(before)
        return images

    def mix(self, images: Tensor, index: Tensor) -> Tensor:
        """Blend each image ``[N, 3, H, W]`` with its neighbour, or put a rectangle of that into it."""
        others = images[self.partners(len(images), images.device)]
        return torch.lerp(others, images, self._kept(index, images.shape[-1]).to(images.dtype))

    def shares(self, index: Tensor, size: int) -> Tensor:
        """How much of each image ``[N]`` is itself after :meth:`mix`; the rest is its neighbour."""
        return self._kept(index, size).mean((1, 2, 3))

    @staticmethod
    def partners(count: int, device: torch.device) -> Tensor:
        """Neighbours ``[N]`` in a batch; the last of an odd number has itself."""
        return (torch.arange(count, device=device) ^ 1).clamp(max=count - 1)

    def _kept(self, index: Tensor, size: int) -> Tensor:
        """How much of each pixel stays, ``[N, 1, size, size]``, or ``[N, 1, 1, 1]`` where all pixels are alike."""
        firsts = index[torch.arange(len(index), device=index.device) // 2 * 2]
        self.draws = self.draws.to(index.device)
        share, cuts, top, left = self.draws[firsts].unbind(1)
        if self.cutmix == 0:
            return share[:, None, None, None]
        inside = self._inside(top, share, size)[:, None, :, None] & self._inside(left, share, size)[:, None, None, :]
        return torch.where(cuts.bool()[:, None, None, None], (~inside).float(), share[:, None, None, None])

    @staticmethod
    def _inside(centre: Tensor, share: Tensor, size: int) -> Tensor:
        """Which pixels of an axis are in the rectangle, ``[N, size]``: its sides are ``sqrt(1 - share)`` of all."""
        half = (1 - share).sqrt() / 2
        position = (torch.arange(size, device=centre.device) + 0.5) / size
        return (position - centre[:, None]).abs() < half[:, None]
