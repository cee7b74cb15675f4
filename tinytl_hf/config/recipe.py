"""What a run trains with where its options leave that open: configs/README.md says what was tried."""

from __future__ import annotations

from dataclasses import replace

from tinytl_hf.config.network import MethodName
from tinytl_hf.config.run import Config

LEARNING_RATES: dict[MethodName, float] = {
    "FT-Last": 1e-3,
    "TinyTL-B": 2e-3,
    "TinyTL-L": 2e-3,
    "TinyTL-L+B": 2e-3,
    "FT-Norm+Last": 3e-3,
    "FT-Full": 5e-4,
    "FT-Layerwise": 1e-3,
}
IMAGES = 20_000  # to see in training, some of them many times
FEWEST_EPOCHS, MOST_EPOCHS = 6, 20


def epochs_for(images: int) -> int:
    """Passes over a training set of so many images."""
    return min(MOST_EPOCHS, max(FEWEST_EPOCHS, round(IMAGES / images)))


def resolve(config: Config, images: int) -> Config:
    """``config`` with a learning rate that suits its method and epochs that suit its number of training images.

    Args:
        config: What was set stays as it is.
        images: Number of training images.
    """
    options = config.train
    lr = LEARNING_RATES[config.method] if options.lr is None else options.lr  # type: ignore[index]
    epochs = epochs_for(images) if options.epochs is None else options.epochs
    return replace(config, train=replace(options, lr=lr, epochs=epochs))


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
    by_images = f" (suits {images:,} images)" if before.train.epochs is None else ""
    return (
        f"lr {plan.lr:g}{by_method}, {plan.epochs} epochs{by_images} of {steps:,} steps, {options.schedule}, warm-up "
        f"{options.warmup_epochs:g} epochs"
    )
