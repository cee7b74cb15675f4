"""A training run as frozen dataclasses: what YAML files and options fill in.

The string under a field is its help text. Each class checks its own values; what only shows once the
backbone, the data or the number of processes is known is checked where it is known.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tinytl_hf.config.check import check, check_text, check_types, expand_paths
from tinytl_hf.config.data import TOTAL_STRIDE, DataConfig
from tinytl_hf.config.engine import LARGEST_SLICE_MB, BackendName, Engine
from tinytl_hf.config.hub import HubConfig
from tinytl_hf.config.network import METHOD_ALIASES, BackboneConfig, HeadConfig, LiteConfig, MethodAlias, MethodName
from tinytl_hf.config.train import TrainConfig
from tinytl_hf.config.yaml12 import dump_yaml
from tinytl_hf.disk import write_text

# Options of version 0.1 that have another name now.
RENAMED = {
    "data.image_size": "data.train_size",
    "data.eval_image_size": "data.eval_size",
    "data.start_image_size": "data.start_size",
    "image_sizes": "train_sizes",
}


@dataclass(frozen=True)
class MemoryConfig:
    """How much training keeps in memory: execution choices that change no name and, the budget aside, no result."""

    lean: bool = Engine.lean
    """Keep only what the gradients need (true), or what stock PyTorch keeps (false)."""
    backend: BackendName = Engine.backend
    """Who computes frozen blocks and lite residuals: auto (the fastest there is), eager (PyTorch's own kernels),
    native (compiled for CPUs) or triton (CUDA)."""
    slice_mb: float | None = Engine.slice_mb
    """Work through frozen blocks in slices of the batch whose widest map takes about this many MB: smaller
    slices need less memory; null: what suits the back-end."""
    cuda_graph: bool = True
    """On a GPU, replay training passes from a CUDA graph, where launching kernels takes longer than running them; it
    keeps a batch of images more. Not with several processes, accumulation or checkpointing."""
    budget_mb: float | None = None
    """Most that a training step of a process may take, in MB of 1e6 bytes, as memory.json measures it. A real step is
    measured before training, and the batch split into as many accumulation steps as keep it within; null: any."""
    report: bool = True
    """Measure a training step at the end and write what it takes to memory.json in output_dir."""

    def __post_init__(self) -> None:
        check_types(self, "memory.")
        fits = self.slice_mb is None or self.slice_mb > 0
        check(fits, "memory.slice_mb", self.slice_mb, "use a number of MB above 0, such as 5, or null")
        fits = self.slice_mb is None or self.slice_mb <= LARGEST_SLICE_MB
        check(fits, "memory.slice_mb", self.slice_mb, "use a finite number of MB, up to 1e9")
        fits = self.budget_mb is None or self.budget_mb > 0
        check(fits, "memory.budget_mb", self.budget_mb, "use a number of MB above 0, such as 64, or null")


@dataclass(frozen=True)
class AdapterOptions:
    """How the adapter is written."""

    dtype: Literal["fp32", "fp16"] = "fp32"
    """Type of the trained tensors on disk; fp16 halves the file and rounds them."""
    keep: Literal["best", "last"] = "best"
    """The epoch whose adapter is the run's result: best on the evaluation split (the first of those with the greatest
    accuracy), or last, whose figures owe nothing to a choice made on that split (unless train.patience ends the
    training)."""
    init: str | None = None
    """Start from the adapter in this folder or of this name on the Hub, trained on these or other data: what the
    method trains and the adapter has goes on, and so do the head's rows of classes that both have."""

    def __post_init__(self) -> None:
        check_types(self, "adapter.")


@dataclass(frozen=True)
class Config:
    """A training run."""

    output_dir: str = "runs/tinytl"
    """Folder that gets everything the run writes."""
    overwrite: bool = False
    """Replace a run that output_dir already holds, unless train.resume goes on with it."""
    seed: int = 0
    """Seed of the new weights, the order of the images, the augmentation and the dropout."""
    method: MethodName | MethodAlias = "TinyTL-L+B"
    """What trains: FT-Last, TinyTL-B, TinyTL-L, TinyTL-L+B, FT-Norm+Last, FT-Full or FT-Layerwise (or a
    name of the old script: finetune, norm+last, deep, bias, low)."""
    trained_blocks: int | Literal["all"] = "all"
    """How many of the backbone's last residual blocks train or get a lite residual, with what follows them: fewer
    need less memory and time. What stands before them runs forward only, with its statistics as they are."""
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """Experiment tracker that gets each epoch's figures."""
    metrics: list[str] = field(default_factory=list)
    """More metrics of the evaluation set: names of the Hub's evaluate modules, or paths of metric scripts."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    lite: LiteConfig = field(default_factory=LiteConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    hub: HubConfig = field(default_factory=HubConfig)

    def __post_init__(self) -> None:
        expand_paths(self, "output_dir", "metrics")
        check_types(self)
        check(0 <= self.seed < 2**32, "seed", self.seed, "use 0 or more, below 2**32")
        check_text("output_dir", self.output_dir)
        for key, value in flat(self.to_dict()).items():
            is_number = not isinstance(value, float) or math.isfinite(value) or key == "train.max_grad_norm"
            check(is_number, key, value, "use a finite number")
        object.__setattr__(self, "method", METHOD_ALIASES.get(self.method, self.method))
        blocks = self.trained_blocks
        known = blocks >= 1 if isinstance(blocks, int) else blocks == "all"
        check(known, "trained_blocks", blocks, "use 1 or more, or all")
        fits = blocks == "all" or self.method != "FT-Last"
        check(fits, "trained_blocks", blocks, "FT-Last trains no block; use all, or another method")
        caches = self.train.cache_features
        fits = not caches or self.method == "FT-Last" or blocks != "all"
        reason = f"{self.method} changes the features; use it with FT-Last, or name trained_blocks"
        check(fits, "train.cache_features", caches, reason)
        start = self.data.start_size
        check(not caches or start is None, "data.start_size", start, "train.cache_features takes one size")
        operates, mixes = self.data.auto_augment, {"mixup": self.train.mixup, "cutmix": self.train.cutmix}
        as_they_are = "train.cache_features computes features of images as they are; turn one of the two off"
        check(not caches or operates == "none", "data.auto_augment", operates, as_they_are)
        for name, value in mixes.items():
            check(not caches or value == 0, f"train.{name}", value, as_they_are)

    @property
    def engine(self) -> Engine:
        """How training passes run."""
        memory = self.memory
        return Engine(memory.lean, memory.backend, memory.slice_mb, self.train.gradient_checkpointing)

    def train_size_in(self, epoch: int) -> int:
        """Side of the training images in px, in an epoch counted from 0."""
        start, end, last = self.data.start_size, self.data.train_size, self.train.plan.epochs - 1
        if start is None or epoch == last:
            return end
        return min(end, TOTAL_STRIDE * round((start + (end - start) * epoch / last) / TOTAL_STRIDE))

    @property
    def spans_epochs(self) -> list[str]:
        """What of the run is spread over all of its epochs, so that another number of them changes the first ones."""
        changes = self.train.mixup or self.train.cutmix or self.data.auto_augment != "none"
        parts = {
            "the cosine schedule": self.train.schedule == "cosine",
            "the growth of the images": self.data.start_size is not None,
            "the changing of the images": changes,
        }
        return [name for name, is_on in parts.items() if is_on]

    def to_dict(self) -> dict[str, Any]:
        """The config as plain values that YAML and JSON can hold."""
        plain = asdict(self)
        plain["data"]["crop_scale"] = list(self.data.crop_scale)
        return plain

    def save(self, path: Path) -> None:
        """Write the config as a YAML file that ``--config`` reads back."""
        write_text(path, dump_yaml(self.to_dict()))


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return result


def with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    """Flat options that version 0.1 wrote, by the names that they have now."""
    return {RENAMED.get(key, key): value for key, value in values.items()}
