"""The settings of a run, as its card tells them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.network import LiteConfig
from tinytl_hf.config.recipe import warmup_steps
from tinytl_hf.config.run import Config
from tinytl_hf.data.roles import HOLDOUT
from tinytl_hf.network.methods import METHODS
from tinytl_hf.train.idle import Facts, in_effect, rules_of_run
from tinytl_hf.words import counted


def recipe(
    config: Config, results: dict[str, Any], epochs_done: int | None = None, planned: Sequence[int] = ()
) -> dict[str, Any]:
    """What the card's table of settings says, from a run's config and its results.

    What many runs leave at its default is there only where it is not, and what had nothing to do is not.

    Args:
        config: The run, with its recipe settled.
        results: Its figures and their conditions.
        epochs_done: How many epochs it trained for; None: all of them.
        planned: How many its schedule spanned, in turn.
    """
    steps = -(-results["data"]["trained_on"][1] // config.train.global_batch_size)
    config = in_effect(config, rules_of_run(config, Facts(steps)))
    options, data = config.train, config.data
    gamma = f", gamma {options.gamma:g}" if options.schedule == "exponential" else ""
    low, high = data.crop_scale
    warms_up = warmup_steps(options, steps) > 0
    warmup = f"warmup {counted(options.warmup_epochs, 'epoch')}" if warms_up else "no warmup"
    is_whole = epochs_done in (None, options.epochs)
    crop = "none, features computed once" if options.cache_features else f"{low:g} to {high:g} of the area"
    epochs = options.epochs if is_whole else f"{epochs_done} of {options.epochs}, as patience ended the run"
    if len(planned) > 1:
        epochs = f"{epochs}; its schedule was for {', then for '.join(map(str, planned))}"
    return {
        "method": config.method,
        "trained blocks": "all" if config.trained_blocks == "all" else f"the last {config.trained_blocks}",
        "epochs": epochs,
        "batch size": options.global_batch_size,
        "optimizer": options.optimizer,
        "learning rate": f"{options.lr:g}, {options.schedule}{gamma}, {warmup}",
        "weight decay": f"{options.weight_decay:g}",
        "label smoothing": f"{options.smoothing:g}",
        "head dropout": f"{config.head.dropout:g}",
        "image size": _sizes(data),
        "adapter": _epoch(config, results),
        "random crop": f"{crop}{', flipped' if data.flip else ''}",
        "training images": _images(results["data"], data.max_train_samples, results["split"] == HOLDOUT),
        "precision": "fp32" if results["precision"] == "no" else results["precision"],
        "seed": config.seed,
        **_off_default(config),
    }


def _images(data: dict[str, Any], most: int | None, holds_out: bool) -> str:
    """How many images the run trained on, of how many, and why not on the others.

    Args:
        data: What the data set holds.
        most: How many were to be drawn.
        holds_out: Whether it evaluated on a part of those that were there to train on.
    """
    name, used = data["trained_on"]
    lost = data.get("unreadable", {}).get(name, 0)
    every = data["images"].get(name, used)
    if used == every:
        return f"all {used:,}"
    reasons = []
    if used + lost < every:
        reasons.append("some held out" if holds_out and most != used + lost else "drawn at random")
    if lost:
        reasons.append(f"{lost:,} unreadable")
    return f"{used:,} of {every:,}, {', '.join(reasons)}"


def _off_default(config: Config) -> dict[str, str]:
    """Settings that are off, or of no effect, in a run that does not name them."""
    options, lite = config.train, config.lite
    roles = {role.replace("_", " "): factor for role, factor in vars(options.lr_factors).items() if factor != 1}
    accumulated = options.gradient_accumulation_steps
    in_words = f"kernel {lite.kernel_size}, groups {lite.groups}, expand {lite.expand:g}, {lite.norm} norm"
    rows = {
        "momentum": f"{options.momentum:g}" if options.optimizer == "sgd" else "",
        "learning rates by role": ", ".join(f"{role} times {factor:g}" for role, factor in roles.items()),
        "norms and biases": "decay too" if options.decay_norms_and_biases else "",
        "class weights": options.class_weights if options.class_weights != "none" else "",
        "mixup": f"{options.mixup:g}" if options.mixup else "",
        "cutmix": f"{options.cutmix:g}" if options.cutmix else "",
        "augmentation": "TrivialAugment" if config.data.auto_augment == "trivial" else "",
        "gradients clipped to": f"{options.max_grad_norm:g}" if options.max_grad_norm is not None else "",
        "patience": counted(options.patience, "epoch") if options.patience is not None else "",
        "accumulation steps": str(accumulated) if accumulated > 1 else "",
        "lite residuals": in_words if METHODS[config.method].lite_residual and lite != LiteConfig() else "",
        "frozen weights": "int8" if config.backbone.frozen_weights == "int8" else "",
    }
    return {name: value for name, value in rows.items() if value}


def _epoch(config: Config, results: dict[str, Any]) -> str:
    """Which epoch's adapter it is, and on what it was chosen."""
    chosen_on, is_last = results["best_epoch_chosen_on"], config.adapter.keep == "last"
    if chosen_on is None:
        return "of the last epoch"
    again = ", as the figures are" if chosen_on == results["split"] else ""
    which = "last epoch, after which patience ended the run by the figures" if is_last else "epoch that was best"
    return f"of the {which} on {chosen_on}{again}"


def _sizes(data: DataConfig) -> str:
    start = "" if data.start_size is None else f"{data.start_size} px growing to "
    evaluated = "" if data.eval_size is None else f", evaluated at {data.eval_size} px"
    return f"{start}{data.train_size} px{evaluated}"
