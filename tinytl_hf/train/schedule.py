"""Learning-rate schedule of a run."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim.lr_scheduler import LambdaLR

from tinytl_hf.config.recipe import warmup_steps
from tinytl_hf.config.train import TrainConfig


def set_learning_rates(scheduler: LambdaLR) -> None:
    """Give the optimizer the rates of the next step: a checkpoint has those of a run of its own number of epochs."""
    rates = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def learning_rate(scheduler: LambdaLR, options: TrainConfig) -> float:
    """``train.lr`` as the schedule has it at the next step; the rates of roles and depths are multiples of it."""
    return options.plan.lr * scheduler.lr_lambdas[0](scheduler.last_epoch)


def lr_factor(options: TrainConfig, steps_per_epoch: int) -> Callable[[int], float]:
    """The learning rate as a factor of its highest, by optimizer step."""
    total = options.plan.epochs * steps_per_epoch
    warmup = warmup_steps(options, steps_per_epoch)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if options.schedule == "exponential":
            return options.gamma ** (step // steps_per_epoch)
        if options.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
        return 1.0

    return factor
