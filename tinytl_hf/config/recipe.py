"""What a run trains with where its options leave that open: configs/README.md says what was tried."""

from __future__ import annotations

from dataclasses import replace

from tinytl_hf.config.network import MethodName
from tinytl_hf.config.run import Config
from tinytl_hf.config.train import TrainConfig
from tinytl_hf.words import counted

LEARNING_RATES: dict[MethodName, float] = {
    "FT-Last": 1e-3,
    "TinyTL-B": 2e-3,
    "TinyTL-L": 2e-3,
    "TinyTL-L+B": 2e-3,
    "FT-Norm+Last": 3e-3,
    "FT-Full": 5e-4,
    "FT-Layerwise": 1e-3,
}
LABEL_SMOOTHING: dict[str, float] = {"TinyTL-L": 0.1, "TinyTL-L+B": 0.1}  # of other methods: none
IMAGES = 20_000  # to see in training, some of them many times
FEWEST_EPOCHS, MOST_EPOCHS = 6, 20


def epochs_for(images: int) -> int:
    """Passes over a training set of so many images."""
    return min(MOST_EPOCHS, max(FEWEST_EPOCHS, round(IMAGES / images)))


def resolve(config: Config, images: int) -> Config:
    """``config`` with a learning rate and a label smoothing that suit its method, and epochs that suit its images.

    Args:
        config: What was set stays as it is.
        images: Number of training images.
    """
    options = config.train
    lr = LEARNING_RATES[config.method] if options.lr is None else options.lr  # type: ignore[index]
    epochs = epochs_for(images) if options.epochs is None else options.epochs
    smoothing = options.label_smoothing
    if smoothing is None:
        smoothing = LABEL_SMOOTHING.get(config.method, 0.0)
    return replace(config, train=replace(options, lr=lr, epochs=epochs, label_smoothing=smoothing))


def describe(before: Config, after: Config, images: int, steps: int) -> str:
    """The recipe in words: what was chosen, and by what.

    Args:
        before: As the options have it.
        after: What :func:`resolve` made of it.
        images: Number of training images.
        steps: Optimizer steps an epoch.
    """
    options, plan = after.train, after.train.plan
    by_method = f" (suits {after.method})" if before.train.lr is None else ""
    by_images = f" (suits {counted(images, 'image')})" if before.train.epochs is None else ""
    smoothed = f", label smoothing {options.smoothing:g}" if options.smoothing else ""
    smoothed += f" (suits {after.method})" if smoothed and before.train.label_smoothing is None else ""
    warmup = f"warm-up {counted(options.warmup_epochs, 'epoch')}"
    if options.warmup_epochs and not warmup_steps(options, steps):
        warmup = f"no warm-up ({counted(options.warmup_epochs, 'epoch')}: less than a step)"
    return (
        f"lr {plan.lr:g}{by_method}, {counted(plan.epochs, 'epoch')}{by_images} of {counted(steps, 'step')}, "
        f"{options.schedule}, {warmup}{smoothed}"
    )


def warmup_steps(options: TrainConfig, steps_per_epoch: int) -> int:
    """Optimizer steps in which the learning rate rises: the last step of a run is none of them."""
    return min(round(options.warmup_epochs * steps_per_epoch), options.plan.epochs * steps_per_epoch - 1)
