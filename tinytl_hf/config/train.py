"""The training loop of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tinytl_hf.config.check import check, expand_paths
from tinytl_hf.config.engine import Engine


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
    """Compute once what does not change, of each image's evaluation view and, with data.flip, of that mirrored: for
    FT-Last the features that the head gets, with trained_blocks the maps before the first of them. Training on those
    is many times faster, without random crops. Keeps 2 bytes a value and view, on the disk (TMPDIR) if that is more
    than data.memory_limit_mb."""
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
