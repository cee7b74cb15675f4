"""The training loop of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal, NamedTuple

from tinytl_hf.config.check import check, check_types, expand_paths
from tinytl_hf.config.engine import Engine

MOST_EPOCHS = 1_000_000  # more than anybody trains: a slip, as of a finger


class Plan(NamedTuple):
    """What a run is about to do.

    Attributes:
        lr: Learning rate at its highest.
        epochs: Passes over the training set.
    """

    lr: float
    epochs: int


@dataclass(frozen=True)
class LrFactors:
    """Learning rates by role, as multiples of train.lr (FT-Layerwise's own by depth come on top)."""

    head: float = 1.0
    """The classifier."""
    lite: float = 1.0
    """Lite residuals, without their last norm."""
    lite_last_norm: float = 1.0
    """The last norm of each lite residual, whose scale starts at zero."""
    biases: float = 1.0
    """Biases of the backbone, of norms and others."""

    def __post_init__(self) -> None:
        check_types(self, "train.lr_factors.")
        for name, factor in asdict(self).items():
            check(factor >= 0, f"train.lr_factors.{name}", factor, "use 0 or more")


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    epochs: int | None = None
    """Passes over the training set; null: as many as show 20,000 images, each of them several times, but no fewer than
    6 and no more than 20 (2,000 images: 10 epochs)."""
    global_batch_size: int = 32
    """Images an optimizer step, over all processes and accumulation steps together. The last step of an epoch is
    filled up with images that it has seen."""
    gradient_accumulation_steps: int = 1
    """Forward and backward passes an optimizer step: more of them need less memory."""
    optimizer: Literal["adamw", "adam", "sgd", "muon"] = "adamw"
    """adamw, adam, sgd (with train.momentum), or muon: Muon (Jordan et al. 2024) at ten times train.lr for the
    convolutions of lite residuals, AdamW for the rest."""
    lr: float | None = None
    """Learning rate at its highest; null: what suits the method at the other defaults, see configs/README.md."""
    lr_factors: LrFactors = field(default_factory=LrFactors)
    momentum: float = 0.9
    """Momentum of sgd."""
    weight_decay: float = 1e-4
    """Weight decay of the weights that train: apart from the gradient in adamw and muon, added to it in adam and
    sgd."""
    decay_norms_and_biases: bool = False
    """Apply weight decay to biases and norm scales too."""
    schedule: Literal["exponential", "cosine", "constant"] = "cosine"
    """exponential (times train.gamma after each epoch), cosine (down to 0 after the last step), constant."""
    gamma: float = 0.9
    """Factor of the exponential schedule, per epoch."""
    warmup_epochs: float = 0.5
    """Epochs (or a part of one) in which the learning rate rises linearly, from its first part on."""
    label_smoothing: float | None = None
    """Share of the target spread evenly over all classes; null: what suits the method, see configs/README.md."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: an image weighs the less in the loss the more images its class has, so that all classes weigh the
    same."""
    mixup: float = 0.0
    """Blend images in pairs, each pair by a share drawn from Beta(a, a) with this a (Zhang et al. 2018), and their
    labels likewise; 0: off. Not in the last fifth of the epochs, which see images as they are (in all of one or two
    epochs)."""
    cutmix: float = 0.0
    """As train.mixup, but put a rectangle of one image into the other (Yun et al. 2019); with both, a coin decides for
    each pair."""
    patience: int | None = None
    """Stop after so many epochs in a row without a better accuracy on the evaluation set; null: train all epochs."""
    max_grad_norm: float | None = None
    """Clip the gradients' total norm to this; null: do not clip."""
    cache_features: bool = False
    """Compute once what does not change, of each image's evaluation view and, with data.flip, of that mirrored: for
    FT-Last the features that the head gets, with trained_blocks the maps before the first of them. Training on those
    is many times faster, without random crops. Keeps 2 bytes a value and view, and 4 of the images to evaluate on, on
    the disk (TMPDIR) where a set takes more than data.memory_limit_mb."""
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
        expand_paths(self, "resume")
        check_types(self, "train.")
        at_least_one = ("epochs", "global_batch_size", "gradient_accumulation_steps", "keep_checkpoints", "patience")
        for name in at_least_one:
            value = getattr(self, name)
            check(value is None or value >= 1, f"train.{name}", value, "use 1 or more")
        fits = self.epochs is None or self.epochs <= MOST_EPOCHS
        check(fits, "train.epochs", self.epochs, f"use at most {MOST_EPOCHS:,}; train.patience can end them earlier")
        check(self.checkpoint_every >= 0, "train.checkpoint_every", self.checkpoint_every, "use 0 or more steps")
        check(
            self.global_batch_size % self.gradient_accumulation_steps == 0,
            "train.gradient_accumulation_steps",
            self.gradient_accumulation_steps,
            f"use a divisor of train.global_batch_size={self.global_batch_size}",
        )
        check(self.lr is None or self.lr > 0, "train.lr", self.lr, "use a number above 0, such as 1e-3")
        check(0 <= self.momentum < 1, "train.momentum", self.momentum, "use a number from 0 to below 1")
        check(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "use 0 or more")
        check(0 < self.gamma <= 1, "train.gamma", self.gamma, "use a factor above 0, at most 1")
        check(
            self.warmup_epochs >= 0 and (self.epochs is None or self.warmup_epochs < self.epochs),
            "train.warmup_epochs",
            self.warmup_epochs,
            f"use 0 or more, and less than train.epochs={self.epochs}",
        )
        check(
            self.label_smoothing is None or 0 <= self.label_smoothing < 1,
            "train.label_smoothing",
            self.label_smoothing,
            "use a share from 0 to below 1",
        )
        check(self.threads is None or self.threads >= 1, "train.threads", self.threads, "use 1 or more, or null")
        for name in ("mixup", "cutmix"):
            check(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "use 0 (off) or more, such as 0.2")
        clips = self.max_grad_norm is None or self.max_grad_norm > 0
        check(clips, "train.max_grad_norm", self.max_grad_norm, "use a number above 0, or null")

    @property
    def plan(self) -> Plan:
        """Learning rate and epochs; :func:`tinytl_hf.config.recipe.resolve` settles what is left open."""
        assert self.lr is not None and self.epochs is not None
        return Plan(self.lr, self.epochs)

    @property
    def smoothing(self) -> float:
        """Label smoothing; none where it is left open and :func:`tinytl_hf.config.recipe.resolve` did not run."""
        return self.label_smoothing or 0.0
