"""What an epoch of training adds up to: its loss and accuracy, and their curve within the epoch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PARTS = 20  # points of an epoch's curve

Sums = list[list[list[float]]]
"""A row a process and part of an epoch: loss in nats, right answers, images."""


class EpochSums:
    """Sums over the batches of an epoch on this process, which no step waits for.

    Args:
        batches: Forward passes of the epoch.
        device: Where the training runs.
        before: What a checkpoint within the epoch holds, of all processes; empty at its start.
        process: Number of this process.
    """

    def __init__(self, batches: int, device: torch.device, before: Sums, process: int) -> None:
        self.batches = batches
        start = before[process] if before else [[0.0, 0.0, 0.0]] * min(PARTS, batches)
        self.parts = torch.tensor(start, device=device)

    def add(self, batch: int, loss: Tensor, right: Tensor) -> None:
        """Count a batch, the epoch's ``batch``-th from 0; ``right`` is 1 or 0 for an image, or a share of 1."""
        images = torch.ones_like(loss) * len(right)
        part = batch * len(self.parts) // self.batches
        self.parts[part] += torch.stack([loss.detach() * images, right.sum(), images])

    def accuracy(self) -> float:
        """Accuracy of this process so far; waits for the device."""
        _, right, images = self.parts.sum(0).tolist()
        return right / images


def shared_out(sums: Sums, processes: int) -> Sums:
    """The same sums for another number of processes: the first has them all."""
    parts: list[list[float]] = np.sum(sums, axis=0).tolist()
    return [parts, *([[0.0] * len(part) for part in parts] for _ in range(processes - 1))]


def figures(sums: Sums) -> dict[str, float]:
    """Loss and accuracy of the epoch."""
    loss, right, images = np.sum(sums, axis=(0, 1)).tolist()
    return {"loss": loss / images, "accuracy": right / images}


def curve(sums: Sums) -> dict[str, list[float]]:
    """Loss and accuracy of each part of the epoch, in its order."""
    loss, right, images = np.sum(sums, axis=0).T
    return {"loss": (loss / images).round(4).tolist(), "accuracy": (right / images).round(4).tolist()}
