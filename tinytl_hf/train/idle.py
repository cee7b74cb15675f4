"""Options that were set and change nothing, as other options or the data leave them nothing to do."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from tinytl_hf.config.fit import FitConfig
from tinytl_hf.config.run import Config, flat
from tinytl_hf.config.train import TrainConfig
from tinytl_hf.config.verbs import BenchConfig, MemoryTableConfig
from tinytl_hf.errors import TinyTLError
from tinytl_hf.network.methods import FACTOR_ROLES, METHODS, Role
from tinytl_hf.words import counted

logger = logging.getLogger(__name__)

OF_TRAINING = ("auto_augment", "crop_scale", "flip", "start_size")  # options of data that an evaluation has no use for


class Idle(NamedTuple):
    """When options have nothing to do.

    Attributes:
        names: The options, or groups of them that end with a dot.
        holds: Whether it is so.
        reason: Why, in words.
    """

    names: tuple[str, ...]
    holds: bool
    reason: str


class Facts(NamedTuple):
    """What is known of a run once its data are.

    Attributes:
        steps: Optimizer steps an epoch.
        holds_out: Whether it evaluates on a part of the training split.
        draws: Whether it trains or evaluates on a random subset.
        takes_all: The options of the two that leave nothing out, as there are not so many images.
        alike: Whether all classes have as many training images.
        has_gpu: Whether it runs on CUDA.
        goes_on: Whether it goes on from a checkpoint.
        in_place: Whether it does so in the folder of that checkpoint.
    """

    steps: int
    holds_out: bool = True
    draws: bool = True
    takes_all: tuple[str, ...] = ()
    alike: bool = False
    has_gpu: bool = True
    goes_on: bool = False
    in_place: bool = False


def say_idle(config: Config, rules: Iterable[Idle]) -> None:
    """Log, in one line, the options that were changed and that a rule says have nothing to do."""
    if found := idle_options(config, rules):
        logger.info("set, and of no effect: %s", "; ".join(found))


def idle_options(config: Config, rules: Iterable[Idle]) -> list[str]:
    """The options that are not at their defaults and that a rule says have nothing to do, each with the reason."""
    return [
        f"{', '.join(f'{key}={value}' for key, value in values.items())} ({reason})"
        for values, reason in _idle(config, rules)
    ]


def in_effect(config: Config, rules: Iterable[Idle]) -> Config:
    """``config`` with the options that a rule says have nothing to do at their defaults, for what tells of a run."""
    defaults = flat(Config().to_dict())
    for values, _ in _idle(config, rules):
        for key in values.keys() - {"train.schedule"}:  # whose default would do something
            config = _with(config, key.split("."), defaults[key])
    return config


def _idle(config: Config, rules: Iterable[Idle]) -> list[tuple[dict[str, Any], str]]:
    """Options with their values, and the reason why they do nothing."""
    defaults = flat(Config().to_dict())
    changed = {key: value for key, value in flat(config.to_dict()).items() if value != defaults[key]}
    found = []
    for rule in rules:
        names = [key for key in changed for name in rule.names if key == name or _is_group_of(name, key)]
        if rule.holds and names:
            found.append(({key: changed.pop(key) for key in names}, rule.reason))
    return found


def _with(options: Any, path: Sequence[str], value: Any) -> Any:
    """Frozen options with another value of the one at ``path``."""
    name, *rest = path
    return replace(options, **{name: _with(getattr(options, name), rest, value) if rest else value})


def _is_group_of(name: str, key: str) -> bool:
    return name.endswith(".") and key.startswith(name)


def rules_of_run(config: Config, facts: Facts) -> list[Idle]:
    """What can have nothing to do in a training.

    Args:
        config: The run, with its recipe settled.
        facts: What is known of it besides.
    """
    options, data, method = config.train, config.data, METHODS[config.method]
    epochs, caches = options.plan.epochs, options.cache_features
    idle_factors = tuple(
        f"train.lr_factors.{name}" for name, roles in FACTOR_ROLES.items() if not roles & method.trains
    )
    all_trains = Role.WEIGHT in method.trains and config.trained_blocks == "all"
    lacks_lite = f"{config.method} has no lite residuals"
    return [
        Idle(("lite.",), not method.lite_residual, lacks_lite),
        Idle(idle_factors, True, f"{config.method} trains no such part"),
        Idle(
            ("train.optimizer",), options.optimizer == "muon" and not method.lite_residual, f"adamw, as {lacks_lite}"
        ),
        *_rules_of_optimizer(options),
        Idle(("train.gamma",), options.schedule != "exponential", "of the exponential schedule alone"),
        Idle(
            ("train.schedule", "train.gamma"), options.schedule == "exponential" and epochs == 1, "after an only epoch"
        ),
        Idle(
            ("train.patience",),
            not can_stop_early(options),
            f"no run of train.epochs={epochs} can end earlier by it",
        ),
        Idle(
            ("train.checkpoint_every",),
            options.checkpoint_every >= epochs * facts.steps,
            f"of {counted(epochs * facts.steps, 'step')}, and each epoch ends with a checkpoint",
        ),
        Idle(("train.class_weights",), facts.alike, "all classes have as many training images"),
        Idle(("train.gradient_checkpointing",), config.method == "FT-Last", "FT-Last goes back through no block"),
        Idle(("backbone.frozen_weights",), all_trains, f"{config.method} freezes no weight"),
        Idle(("memory.lean",), all_trains and not facts.has_gpu, f"{config.method} keeps what stock PyTorch keeps"),
        Idle(("memory.backend", "memory.slice_mb"), all_trains, f"{config.method} has no frozen blocks"),
        Idle(("memory.backend", "memory.slice_mb"), not config.memory.lean, "memory.lean is off"),
        Idle(("memory.cuda_graph",), not facts.has_gpu, "of a GPU alone"),
        Idle(facts.takes_all, True, "there are fewer"),
        Idle(("data.crop_scale",), caches, "train.cache_features takes no random crops"),
        Idle(("data.start_size",), data.start_size == data.train_size, "it is data.train_size"),
        Idle(("data.start_size",), epochs == 1, "an only epoch has images of data.train_size"),
        Idle(("data.eval_fraction",), not facts.holds_out, "another split is evaluated on"),
        Idle(("data.split_seed",), not facts.holds_out and not facts.draws, "no images are drawn"),
        Idle(("adapter.keep",), epochs == 1, "an only epoch is the best and the last"),
        Idle(("adapter.init",), facts.goes_on, "a resumed run starts from its checkpoint"),
        Idle(("overwrite",), facts.in_place, "train.resume goes on with the run that is there"),
        Idle(("hub.repo", "hub.private"), not config.hub.push, "hub.push is not on"),
    ]


def rules_of_reading(streams: bool) -> list[Idle]:
    """What can have nothing to do in a training once its images are read.

    Args:
        streams: Whether those of a split are decoded each time they are used.
    """
    return [Idle(("data.workers",), not streams, "all decoded images stay in memory")]


def can_stop_early(options: TrainConfig) -> bool:
    """Whether a run's patience can end before its epochs do."""
    return options.patience is not None and options.patience < options.plan.epochs - 1


def check_trains(config: Config) -> None:
    """Raise if the learning rates by role leave nothing that trains.

    Raises:
        TinyTLError: With the factors that do.
    """
    factors, trains = asdict(config.train.lr_factors), METHODS[config.method].trains
    off = {name: roles for name, roles in FACTOR_ROLES.items() if factors[name] == 0 and roles & trains}
    if trains <= frozenset().union(*off.values()):
        named = ", ".join(f"train.lr_factors.{name}=0" for name in off)
        raise TinyTLError(f"{named}: {config.method} trains nothing else; use a factor above 0")


def rules_of_memory(config: Config, options: MemoryTableConfig) -> list[Idle]:
    """What the verb ``memory`` does not use of a run."""
    return [
        Idle(("method",), options.methods is None, "all methods are measured; --methods names some"),
        Idle(("memory.lean",), True, "both are measured"),
        Idle(("train.global_batch_size",), True, "--batch_size is that of a pass"),
        *_rules_of_steps(config.train, "data.train_size"),
    ]


def rules_of_bench(config: Config, options: BenchConfig) -> list[Idle]:
    """What the verb ``bench`` does not use of a run."""
    sizes = ", ".join(map(str, options.train_sizes))
    return [
        Idle(("memory.lean",), True, "both are timed"),
        Idle(("train.global_batch_size",), True, "--batch_sizes are timed"),
        Idle(("data.train_size",), True, f"--train_sizes are timed: {sizes}"),
        *_rules_of_steps(config.train, "--train_sizes"),
    ]


def rules_of_fit(options: FitConfig) -> list[Idle]:
    """What the verb ``fit`` does not use of a run, or chooses anew."""
    return [
        Idle(("method",), True, f"--methods are tried: {', '.join(options.methods)}"),
        Idle(("trained_blocks", "train.gradient_accumulation_steps"), True, "fit chooses"),
        Idle(("data.train_size",), options.train_sizes is not None, "--train_sizes are tried"),
        Idle(("data.start_size",), True, "the run that is found keeps one size"),
        Idle(("memory.budget_mb",), True, "--memory_mb is the budget"),
    ]


def _rules_of_optimizer(options: TrainConfig) -> list[Idle]:
    return [
        Idle(("train.momentum",), options.optimizer != "sgd", "of sgd alone"),
        Idle(("train.decay_norms_and_biases",), options.weight_decay == 0, "train.weight_decay=0"),
        Idle(("train.max_grad_norm",), options.max_grad_norm == float("inf"), "no norm is above that"),
    ]


def _rules_of_steps(options: TrainConfig, size: str) -> list[Idle]:
    return [
        *_rules_of_optimizer(options),
        Idle(("train.cache_features",), True, "a step is measured with images as they come"),
        Idle(("data.start_size",), True, f"a step is measured at {size}"),
        Idle(("memory.budget_mb",), True, "batches are measured as they are"),
    ]


def say_idle_of_data(given: Collection[str]) -> None:
    """Log the options of data that a verb which trains nothing was given and has no use for."""
    if names := [f"data.{name}" for name in OF_TRAINING if name in given]:
        logger.info("set, and of no effect: %s (of training alone)", ", ".join(names))
