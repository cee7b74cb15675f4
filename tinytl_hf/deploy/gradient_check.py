"""Whether a device's training step gives PyTorch's gradients."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tinytl_hf.deploy.executorch import EXTRA
from tinytl_hf.deploy.exported import require
from tinytl_hf.errors import TinyTLError

TOLERANCE = 1e-5  # of a gradient, relative to its norm
TRIES = 4  # single images, until one is within that


@dataclass(frozen=True)
class GradientCheck:
    """How far a step's gradients are from PyTorch's: the largest difference of one, relative to its norm.

    Of millions of activations some are within rounding of a ReLU's edge. On which side they fall makes more than the
    tolerance, in PyTorch's own gradients as well. So a batch that is off by more is measured next to those, and single
    images are tried until one has no such activation.

    Attributes:
        count: Gradients.
        batch: The difference with a batch of images.
        rounding: That of PyTorch's own gradients from those in float64, with the same batch.
        single: The difference with one image in all places of the batch; None where the batch is within the tolerance.
    """

    count: int
    batch: float
    rounding: float
    single: float | None

    def __str__(self) -> str:
        """The figures in words."""
        start = f"{self.count} gradients, largest relative difference"
        if self.single is None:
            return f"{start} {self.batch:.1e}"
        return (
            f"{start} {self.single:.1e} with one image in all places of the batch, {self.batch:.1e} with a batch of "
            f"several, where activations lie at a ReLU's edge (PyTorch's own from float64's: {self.rounding:.1e})"
        )

    def check(self) -> None:
        """Raise unless the differences are those of rounding.

        Raises:
            TinyTLError: They are larger.
        """
        if not self.batch <= max(TOLERANCE, 2 * self.rounding):  # not a number fails this, too
            raise TinyTLError(
                f"ExecuTorch's gradients differ by {self.batch:.1e} from PyTorch's, those by {self.rounding:.1e} from "
                "float64's; nothing was written"
            )


class GradientsBeside:
    """A step's gradients in ExecuTorch, in PyTorch, and in PyTorch in float64.

    Args:
        content: The .pte file.
        step: The same in PyTorch: images and labels to the loss and the classes.
        labels: Class numbers of a batch, ``[N]``.
    """

    def __init__(self, content: bytes, step: nn.Module, labels: Tensor) -> None:
        training = require("executorch.extension.training", EXTRA)
        self._module = training._load_for_executorch_for_training_from_buffer(content)
        self._step, self._exact, self._labels = step, deepcopy(step).double(), labels

    def compare(self, images: Tensor) -> GradientCheck:
        """Measure the differences.

        Args:
            images: Normalised images ``[M, 3, S, S]``, no fewer than a batch has.

        Raises:
            TinyTLError: ExecuTorch cannot run the step, or gives gradients of something else.
        """
        batch = images[: len(self._labels)]
        ours = _gradients(self._step, batch, self._labels)
        difference = largest_difference(self._on_device(batch), ours)
        rounding = largest_difference(_gradients(self._exact, batch.double(), self._labels), ours)
        single = None if difference <= TOLERANCE else self._of_single_images(images)
        return GradientCheck(len(ours), difference, rounding, single)

    def _on_device(self, batch: Tensor) -> dict[str, Tensor]:
        try:
            self._module.forward_backward("forward", [batch, self._labels])
        except RuntimeError as error:
            raise TinyTLError(f"ExecuTorch cannot run the step ({error}); its lines above say why") from error
        return self._module.named_gradients()

    def _of_single_images(self, images: Tensor) -> float:
        """The smallest difference with one image, of those that rounding changes least."""
        label, rounding = self._labels[:1], []
        for image in images.split(1):
            exact = _gradients(self._exact, image.double(), label)
            rounding.append(largest_difference(exact, _gradients(self._step, image, label)))
        best = float("inf")
        for i in sorted(range(len(images)), key=rounding.__getitem__)[:TRIES]:
            batch = images[[i] * len(self._labels)]
            ours = _gradients(self._step, batch, self._labels)
            best = min(best, largest_difference(self._on_device(batch), ours))
            if best <= TOLERANCE:
                break
        return best


def _gradients(step: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """PyTorch's gradients of what trains, by name."""
    wanted = {name: p for name, p in step.named_parameters() if p.requires_grad}
    loss, _ = step(images, labels)
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))


def largest_difference(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> float:
    """The largest difference of a gradient, relative to the norm of ours.

    Raises:
        TinyTLError: They are gradients of other parameters.
    """
    if theirs.keys() != ours.keys():
        raise TinyTLError(f"ExecuTorch gives {len(theirs)} gradients in place of {len(ours)}; nothing was written")
    scale = max(float(gradient.norm()) for gradient in ours.values())
    # One that is zero but for rounding is compared with the largest.
    floors = {name: max(float(gradient.norm()), 1e-3 * scale) for name, gradient in ours.items()}
    differences = [float((theirs[name] - gradient).norm()) / floors[name] for name, gradient in ours.items()]
    return float(np.max(differences))  # where Python's max forgets what is not a number
