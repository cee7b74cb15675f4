"""The training step of a run, made to be measured: from decoded photos to the changed delta."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from tinytl_hf.config.recipe import resolve
from tinytl_hf.config.run import Config
from tinytl_hf.cuda_graph import training_passes
from tinytl_hf.data.augment import RandomCropFlip
from tinytl_hf.data.changes import Changes
from tinytl_hf.device import view_dtype, wait_for_device
from tinytl_hf.model import TinyTLModel
from tinytl_hf.step import Loss, make_optimizer, training_view


class MeasuredStep:
    """One optimizer step of a run on a batch, which it sees in each of its accumulated passes.

    It crops and resizes the photos, goes forward and back, clips and calls the optimizer, all as the config says, at
    rate 0: no weight changes.

    Args:
        model: The model, in training mode when the step is called.
        pixels: Decoded photos ``[N, 3, H, W]`` on the model's device, all of the whole size.
        labels: Their labels ``[N]``.
        config: The run.
        launched: Never replay its passes from a CUDA graph, whose memory the allocator does not see come and go.
    """

    def __init__(
        self, model: TinyTLModel, pixels: Tensor, labels: Tensor, config: Config, launched: bool = False
    ) -> None:
        count, device = len(pixels), pixels.device
        config = resolve(replace(config, method=model.config.method), count)
        self.model, self.labels, self.options = model, labels, config.train
        self.passes = model if launched else training_passes(model, config)
        sizes = torch.tensor(pixels.shape[-2:], device=device).expand(count, 2)
        index = torch.arange(count, device=device)
        self.batch = {"pixels": pixels, "sizes": sizes, "labels": labels, "index": index}
        self.augment = RandomCropFlip(count, config.seed, config.data.crop_scale, config.data.flip)
        self.changes = Changes(count, config)
        self.loss = Loss(config.train, labels.cpu(), len(model.label_names))
        self.optimizer = make_optimizer(model, config.train)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0

    @property
    def _size(self) -> int:
        return self.model.config.preprocessing.train_size

    @property
    def images(self) -> int:
        """Images that the step trains on."""
        return len(self.labels) * self.options.gradient_accumulation_steps

    def view(self) -> Tensor:
        """What the network gets of the photos."""
        dtype = view_dtype(self.options.mixed_precision)
        return training_view(self.model, self.batch, self.augment, self._size, self.changes, dtype)

    def __call__(self) -> None:
        """Take the step, and wait for the device."""
        passes = self.options.gradient_accumulation_steps
        for _ in range(passes):
            logits = self.passes(self.view())  # no name holds the view longer than the pass needs it, as in a run
            loss = self.loss(logits, self.batch, self._size, self.changes)
            (loss / passes).backward()
        if self.options.max_grad_norm is not None:
            clip_grad_norm_(self.model.trainable_parameters(), self.options.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        wait_for_device(self.labels.device)


def random_batch(
    model: TinyTLModel, batch_size: int, photo_size: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Decoded photos of noise, and labels, that a step can be measured on, on the model's device.

    Args:
        model: The model.
        batch_size: How many.
        photo_size: Their height and width in px; None: both that of the network's input.
    """
    size, device = model.config.preprocessing.train_size, next(model.parameters()).device
    height, width = photo_size or (size, size)
    pixels = torch.randint(256, (batch_size, height, width, 3), dtype=torch.uint8, device=device)
    return pixels.permute(0, 3, 1, 2), torch.randint(len(model.label_names), (batch_size,), device=device)
