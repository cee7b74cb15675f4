"""The verb ``fit``: what trains best within a budget of memory and time, by real training steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path

from tinytl_hf.adapter.build import network_without_values
from tinytl_hf.config.fit import FitConfig
from tinytl_hf.config.recipe import LEARNING_RATES, resolve
from tinytl_hf.config.run import Config
from tinytl_hf.config.yaml12 import dump_yaml
from tinytl_hf.data.batches import STREAMS
from tinytl_hf.data.sets import Opened, open_data
from tinytl_hf.device import device_of_figures, memory_limit
from tinytl_hf.disk import write_text
from tinytl_hf.errors import TinyTLError
from tinytl_hf.lean.backend import has_bf16
from tinytl_hf.measure.data_memory import data_memory
from tinytl_hf.measure.memory import MB
from tinytl_hf.measure.peak import process_high_water
from tinytl_hf.measure.results import check_output_file
from tinytl_hf.network.backbones import check_size, check_takes, takes
from tinytl_hf.network.blocks import convert_blocks
from tinytl_hf.network.methods import METHODS, possible_methods
from tinytl_hf.train.fresh_step import TRAINING, FreshStep, measure_step, quick_processes
from tinytl_hf.train.plans import Plan, families, passes_of, sizes_to_try
from tinytl_hf.train.search import Budget, DataFacts, Family, Row, search
from tinytl_hf.train.warm_start import has_place_for, trained_by

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fit:
    """What fits a budget.

    Attributes:
        rows: Plans that fit the memory, each with its measured step, in the order of the ranking.
        budget: What there is.
        epochs: Of a whole training.
        recommended: The best row whose training fits the time.
        recommended_epochs: For how many epochs it trains: fewer where none fits the time as a whole.
        facts: Of the data, by size of the images.
        config: The run that is recommended.
    """

    rows: list[Row]
    budget: Budget
    epochs: int
    recommended: Row
    recommended_epochs: int
    facts: dict[int, DataFacts]
    config: Config


def fit(config: Config, options: FitConfig) -> Fit:
    """Measure what fits a budget, recommend one way to train, and write its config to ``options.output``.

    Args:
        config: The run; its method, trained blocks, image size, accumulation, storage of frozen weights, checkpointing
            and, where that is open, precision are varied.
        options: The budget, and what may be tried.

    Raises:
        TinyTLError: Nothing fits, with the least that works; or there is no budget, or bad data or weights.
    """
    if options.output is not None:
        check_output_file("output", Path(options.output))
    process = _process_budget(options)
    if options.memory_mb is None and process is None:
        raise TinyTLError("fit: no budget; name --memory_mb, for a training step, or --process_mb")
    if config.train.cache_features:
        logger.info("train.cache_features is not used: steps are measured with images as they come")
    if not passes_of(config):
        batch = f"train.global_batch_size={config.train.global_batch_size}"
        raise TinyTLError(f"{batch}: mixup and cutmix blend pairs; use an even number")
    options, blocks = fitted_to_backbone(options, config)
    opened = open_data(config.data)
    epochs = resolve(config, len(opened.train.labels)).train.plan.epochs
    facts = {size: facts_of(opened, config, size) for size in sizes_to_try(options, config.data.train_size)}
    say_what_streams(facts, config.data.memory_limit_mb)
    import_module(TRAINING)  # so that this process has resident what a training has
    seconds = None if options.minutes is None else options.minutes * 60
    step = None if options.memory_mb is None else options.memory_mb * MB
    budget = Budget(step, process, seconds, base=process_high_water())
    tried = make_families(config, options, blocks, facts, budget)
    rows = list(search(tried, lambda row: row.training(epochs)))
    if not rows:
        rows = [_least(tried)]
    rows.sort(key=lambda row: (-row.plan.points, row.seconds))
    row, its_epochs = recommend(rows, epochs, seconds)
    run = _run_of(row.plan, config, options, its_epochs if its_epochs < epochs else config.train.epochs)
    if said := about_lr(config, row.plan.method):
        logger.info(said)
    if options.output is not None and config.output_dir == Config().output_dir:  # it replaces no run of the defaults
        run = replace(run, output_dir=f"runs/{Path(options.output).stem}")
    found = Fit(rows, budget, epochs, row, its_epochs, facts, run)
    if options.output is not None:
        write_text(Path(options.output), f"# Recommended by tinytl-hf fit: {row.plan}\n{dump_yaml(run.to_dict())}")
    return found


def about_lr(config: Config, method: str) -> str:
    """That a learning rate was set for another method than the one that is recommended; else empty."""
    lr = config.train.lr
    if lr is None or method == config.method or lr == LEARNING_RATES[method]:  # type: ignore[index]
        return ""
    return f"train.lr={lr:g} is kept, which was set for {config.method}; --train.lr null takes what suits {method}"


def recommend(rows: list[Row], epochs: int, seconds: float | None) -> tuple[Row, int]:
    """The row with the most points whose training keeps the time, and its epochs.

    Where none does, the row that gets furthest in it, for as many epochs as it can.

    Args:
        rows: What fits the memory, best first.
        epochs: Of a whole training.
        seconds: The time; None: any.

    Raises:
        TinyTLError: The time is too short for an epoch.
    """
    in_time = [row for row in rows if seconds is None or row.training(epochs) <= seconds]
    if in_time:
        return in_time[0], epochs
    assert seconds is not None
    row = min(rows, key=lambda row: row.training(1))
    if row.training(1) > seconds:
        raise TinyTLError(
            f"minutes={seconds / 60:g}: the quickest that fits the memory takes {row.training(1) / 60:.2g} minutes "
            f"for an epoch ({row.plan}); give it that much, or train on fewer images with --data.max_train_samples"
        )
    return row, int((seconds - row.seconds_last) / row.seconds)


def make_families(
    config: Config, options: FitConfig, blocks: int, facts: dict[int, DataFacts], budget: Budget
) -> list[Family]:
    """What to try, each with what takes a step of it in a process of its own; says what is left out.

    Args:
        config: The run.
        options: What may be tried.
        blocks: Residual blocks of its backbone.
        facts: Of the data, by size of the images in px.
        budget: What there is.

    Raises:
        TinyTLError: None of the methods can train this run's backbone.
    """
    context = quick_processes()

    def take(plan: Plan, repeats: int) -> FreshStep | None:
        known = facts[plan.train_size]
        step = measure_step(plan.of(config), known.classes, known.photo_size, context, repeats)
        logger.info("measured: %s: %s", plan, "no memory" if step is None else f"{step.peak.total / MB:.1f} MB")
        return step

    possible = possible_methods(blocks > 0)
    if left_out := [method for method in options.methods if method not in possible]:
        named, backbone = ", ".join(left_out), config.backbone.name
        logger.info(
            "methods: left out, as %s has no residual blocks of a kind that is known here: %s", backbone, named
        )
    found = _that_can_be_built(config, list(families(config, options, blocks, has_bf16(device_of_figures()))))
    if config.adapter.init is not None:
        found = _that_go_on_from(config.adapter.init, config, found)
    tried = [Family(plans, facts, budget, config.train.global_batch_size, take) for plans in found if plans]
    if not tried:
        raise TinyTLError(
            f"methods={options.methods}: {config.backbone.name} has no residual blocks; add FT-Last or TinyTL-B"
        )
    return tried


def _that_can_be_built(config: Config, found: list[list[Plan]]) -> list[list[Plan]]:
    """Those of the plans whose lite residuals fit the widths of the blocks; says of the others why they do not.

    Raises:
        TinyTLError: None does.
    """
    kept, refused = [], None
    for plans in found:
        try:
            if plans and METHODS[plans[0].method].lite_residual:
                has_place_for(plans[0].of(config), frozenset())
        except TinyTLError as error:
            refused = error
            blocks = plans[0].trained_blocks
            logger.info("methods: %s of %s blocks is left out: %s", plans[0].method, blocks, error)
        else:
            kept.append(plans)
    if refused is not None and not any(kept):
        raise refused
    return kept


def _that_go_on_from(init: str, config: Config, found: list[list[Plan]]) -> list[list[Plan]]:
    """Those of the plans that have a place for all that the adapter ``init`` trained.

    Raises:
        TinyTLError: None has.
    """
    tensors = trained_by(init, config.backbone.name)
    has_place = cache(
        lambda method, blocks, norm: has_place_for(
            replace(config, method=method, trained_blocks=blocks, lite=replace(config.lite, norm=norm)), tensors
        )
    )
    kept = [
        [plan for plan in plans if has_place(plan.method, plan.trained_blocks, plan.of(config).lite.norm)]
        for plans in found
    ]
    ways = [
        list(dict.fromkeys((plan.method, plan.trained_blocks) for plans in of for plan in plans))
        for of in (found, kept)
    ]
    if left := [f"{method}, {blocks} blocks" for method, blocks in ways[0] if (method, blocks) not in ways[1]]:
        logger.info("adapter.init=%s: no place for what it trained, so not tried: %s", init, "; ".join(left))
    if not any(kept):
        raise TinyTLError(
            f"adapter.init={init}: none of the methods to try has a place for all that it trained; add its own to "
            "--methods"
        )
    return kept


def facts_of(opened: Opened, config: Config, size: int) -> DataFacts:
    """What a budget needs to know of a data set, for training images of this size in px."""
    memory = data_memory(opened, replace(config.data, train_size=size, start_size=None))
    in_memory = sum(part for part in memory.parts.values() if isinstance(part, int))
    train, evaluated = opened.train, len(opened.evaluation.labels)
    last = evaluated + (0 if opened.test is None else len(opened.test.labels))
    streams = STREAMS in memory.parts.values()
    return DataFacts(len(train.labels), evaluated, len(train.label_names), memory.photo_size, in_memory, last, streams)


def say_what_streams(facts: Mapping[int, DataFacts], limit_mb: int) -> None:
    """Log for which sizes of the images the figures lack something, as images are decoded while the training goes on.

    Args:
        facts: Of the data, by size of the images.
        limit_mb: What the decoded images of a split may take in MB.
    """
    if sizes := [str(size) for size, known in facts.items() if known.streams]:
        logger.info(
            "at %s px, the images of a split take more than data.memory_limit_mb=%d and are decoded in each epoch: "
            "what that takes is in no figure of time or memory",
            *(", ".join(sizes), limit_mb),
        )


def fitted_to_backbone(options: FitConfig, config: Config) -> tuple[FitConfig, int]:
    """The options with the sizes to try that a run's backbone takes, where they name none; and its residual blocks.

    Raises:
        TinyTLError: The backbone does not take a size that they name, or as of
            :func:`~tinytl_hf.adapter.build.network_without_values`.
    """
    name, network = network_without_values(config.backbone.name, config.backbone.weights)
    for size in options.train_sizes or []:
        check_size(name, "train_sizes", size)
        check_takes(name, network, "train_sizes", size)
    if options.train_sizes is None:
        largest = config.data.train_size
        sizes = sizes_to_try(options, largest)
        taken = [size for size in sizes if takes(name, network, size)]
        if taken != sizes:
            out = ", ".join(str(size) for size in sizes if size not in taken)
            logger.info("train_sizes: %s px are left out, as %s takes no images of that size", out, name)
        options = replace(options, train_sizes=taken or [largest])
    return options, len(convert_blocks(network))


def _process_budget(options: FitConfig) -> float | None:
    """The budget of the whole process in bytes; says where the container's limit decides."""
    asked, limit = options.process_mb, memory_limit()
    if limit is None or (asked is not None and asked * MB <= limit):
        return None if asked is None else asked * MB
    logger.info("process_mb: %s MB, the limit of the container, decides", f"{limit / MB:,.0f}")
    return limit


def _least(tried: list[Family]) -> Row:
    """The plan that should take least, if its measured step fits after all.

    Raises:
        TinyTLError: It does not; with what it takes.
    """
    able = [family for family in tried if family.rows]
    if not able:
        raise TinyTLError("fit: this machine has not enough memory for the smallest step of any method")
    family = min(able, key=lambda family: family.excess(family.smallest()))
    row = family.measure(family.smallest(), repeats=2)
    if row is None:
        raise TinyTLError(f"fit: this machine has not enough memory for {family.smallest()}")
    if row.fits(family.budget):
        return row
    budget = family.budget
    over = budget.step is not None and row.step.peak.total > budget.step
    name, asked = ("memory_mb", budget.step) if over else ("process_mb", budget.process)
    needs = row.step.peak.total if over else row.process
    raise TinyTLError(
        f"{name}={(asked or 0) / MB:g}: nothing fits; the smallest that works takes {needs / MB:.1f} MB ({row.plan})"
    )


def _run_of(plan: Plan, config: Config, options: FitConfig, epochs: int | None) -> Config:
    run = plan.of(config)
    warmup = run.train.warmup_epochs if epochs is None else min(run.train.warmup_epochs, epochs / 2)
    return replace(
        run,
        train=replace(run.train, epochs=epochs, warmup_epochs=warmup),
        memory=replace(run.memory, budget_mb=options.memory_mb),
    )
