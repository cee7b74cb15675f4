"""Everything that the training loop works with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from evaluate import EvaluationModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tinytl_hf.adapter.record import DataRecord
from tinytl_hf.config.run import Config
from tinytl_hf.data.augment import RandomCropFlip
from tinytl_hf.data.batches import DecodedImages, ShuffledBatches, StreamedImages
from tinytl_hf.data.changes import Changes
from tinytl_hf.measure.memory import DataMemory
from tinytl_hf.measure.results import Evaluated
from tinytl_hf.model import TinyTLModel
from tinytl_hf.step import Loss
from tinytl_hf.train.progress import Progress
from tinytl_hf.train.time_left import TimeLeft


@dataclass
class EvalSet:
    """A split that the run evaluates on.

    Attributes:
        evaluated: What its figures are of, for the results.
        images: Its images.
        loader: Their batches or, where features are cached, those of the features.
    """

    evaluated: Evaluated
    images: DecodedImages | StreamedImages
    loader: DataLoader


@dataclass
class Run:
    """Everything that the loop works with."""

    config: Config
    accelerator: Accelerator
    model: TinyTLModel
    prepared: nn.Module
    passes: Callable[[Tensor], Tensor]  # in training, in place of the prepared model
    optimizer: AcceleratedOptimizer
    scheduler: AcceleratedScheduler
    train_loader: DataLoader
    evaluation: EvalSet  # after each epoch
    test: EvalSet | None  # at the end, where it is another split
    found: dict[str, Any]  # what the data set holds, for the results
    data_memory: DataMemory
    record: DataRecord
    batches: ShuffledBatches
    augment: RandomCropFlip
    changes: Changes
    loss: Loss
    time_left: TimeLeft
    progress: Progress
    metrics: dict[str, EvaluationModule]  # of config.metrics
    hashes: dict[str, str | None]  # of the frozen backbone and the data
