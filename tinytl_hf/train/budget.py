"""``memory.budget_mb``: as many accumulation steps as keep a training step within a budget, found before training."""

from __future__ import annotations

import logging
from dataclasses import replace
from multiprocessing import get_context

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from tinytl_hf.config.fit import FitConfig
from tinytl_hf.config.run import Config
from tinytl_hf.cuda_graph import describe_passes
from tinytl_hf.data.sets import Opened
from tinytl_hf.errors import TinyTLError
from tinytl_hf.measure.memory import MB
from tinytl_hf.network.methods import METHODS
from tinytl_hf.train.finish import MEASURED_ON
from tinytl_hf.train.fit import facts_of, fitted_to_backbone, make_families
from tinytl_hf.train.fresh_step import FreshStep, measure_step
from tinytl_hf.train.plans import Plan, passes_of, sizes_to_try
from tinytl_hf.train.search import BYTES, Budget, Family, Row, search
from tinytl_hf.train.warm_start import has_place_for, trained_by

logger = logging.getLogger(__name__)

NEARLY = 1.02  # times the budget: what a step should take at most for its measure to be worth the time


def within_budget(config: Config, accelerator: Accelerator, opened: Opened) -> Config:
    """``config`` with the fewest accumulation steps, no fewer than it has, whose measured step keeps the budget.

    Args:
        config: The run, with its recipe settled.
        accelerator: All processes of the run: the first measures for all.
        opened: Its data.

    Raises:
        TinyTLError: No split of the batch keeps it, with what would; or the device does not tell its peak.
    """
    if config.memory.budget_mb is None:
        return config
    found: list[Config | TinyTLError] = [config]
    if accelerator.is_main_process:
        try:
            found = [_split(config, accelerator, opened)]
        except TinyTLError as error:  # the other processes wait for it
            found = [error]
    (result,) = broadcast_object_list(found)
    if isinstance(result, TinyTLError):
        raise result
    accelerator.gradient_accumulation_steps = result.train.gradient_accumulation_steps
    return result


def _split(config: Config, accelerator: Accelerator, opened: Opened) -> Config:
    """The same, on one process."""
    device, name = accelerator.device.type, f"memory.budget_mb={config.memory.budget_mb:g}"
    if device not in MEASURED_ON:
        devices = " and ".join(MEASURED_ON)
        raise TinyTLError(f"{name}: peaks are measured on {devices}, not on {device}; leave it out")
    if config.train.cache_features:
        logger.info("%s: the step is measured without train.cache_features, which takes less", name)
    family = _family(config, accelerator.num_processes, opened)
    whole, smallest = family.plans[0], family.plans[-1]
    first = row = family.measure(whole)
    if row is None or not row.fits(family.budget):
        row = (family.best(family.plans) if family.rows else None) or family.measure(smallest)
        row = with_more_images(family, row) if row is not None and row.fits(family.budget) else row
    if row is None:
        raise TinyTLError(
            f"{name}: the step that is measured before training did not end: this machine has not enough memory for "
            'it, or a script that trains has no `if __name__ == "__main__":`'
        )
    if not row.fits(family.budget):
        raise TinyTLError(f"{name}: {_in_words(row)}; {_what_would_fit(config, opened, family.budget)}")
    before = config.train.gradient_accumulation_steps
    steps = before * whole.batch // row.plan.batch
    split = replace(config, train=replace(config.train, gradient_accumulation_steps=steps))
    said = _in_words(row)
    if steps > before:
        said += "" if first is None else f", where {_in_words(first)}"
        said += describe_passes(split, accelerator.device, accelerator.num_processes) + _what_differs(config)
    logger.info("%s: %s", name, said)
    return split


def _family(config: Config, processes: int, opened: Opened) -> Family:
    """The run as it is, with fewer and fewer images a pass; of several processes, the part of one."""
    options = config.train
    share = replace(config, train=replace(options, global_batch_size=options.global_batch_size // processes))
    if processes > 1:  # whose passes no graph holds
        share = replace(share, memory=replace(share.memory, cuda_graph=False))
    whole = share.train.global_batch_size // options.gradient_accumulation_steps
    plan = Plan(
        method=config.method,
        trained_blocks=config.trained_blocks,
        share=1.0,  # for the ranking, which has nothing to choose here
        train_size=config.data.train_size,
        batch=whole,
        int8=config.backbone.frozen_weights == "int8",
        checkpointing=options.gradient_checkpointing,
    )
    fewest = 2 if _has_batch_norms(config) and whole > 1 else 1  # images: of one, a batch norm can have no statistics
    plans = [replace(plan, batch=batch) for batch in passes_of(share) if whole % batch == 0 and batch >= fewest]
    facts = facts_of(opened, config, plan.train_size)
    assert config.memory.budget_mb is not None
    budget = Budget(step=config.memory.budget_mb * MB, process=None, seconds=None, base=0)
    context = get_context("spawn")

    def take(plan: Plan, repeats: int) -> FreshStep | None:
        step = measure_step(plan.of(share), facts.classes, facts.photo_size, context, repeats)
        if step is None or processes == 1 or plan.batch == share.train.global_batch_size:
            return step
        # Several processes that accumulate add their gradients up in memory of its own.
        return replace(step, peak=replace(step.peak, gradient_buckets=BYTES * step.trained_parameters))

    return Family(plans, {plan.train_size: facts}, budget, share.train.global_batch_size, take)


def _has_batch_norms(config: Config) -> bool:
    method = METHODS[config.method]
    return method.batch_statistics or (method.lite_residual and config.lite.norm == "batch")


def with_more_images(family: Family, row: Row) -> Row:
    """A row with more images a pass than ``row``, if one that should take a trifle too much keeps the budget.

    Args:
        family: Its plans differ in that alone, most images first.
        row: What fits.
    """
    measured = {each.plan for each in family.rows} | family.failed
    for plan in reversed(family.plans[: family.plans.index(row.plan)]):
        if plan in measured or family.excess(plan) > NEARLY:
            break
        larger = family.measure(plan)
        if larger is None or not larger.fits(family.budget):
            break
        row = larger
    return row


def _in_words(row: Row) -> str:
    return f"a step with {row.plan.images_a_pass} takes {row.step.peak.total / MB:.1f} MB"


def _what_differs(config: Config) -> str:
    """Why the result is not that of whole batches; nothing where it is, up to rounding."""
    reasons = []
    if _has_batch_norms(config):
        reasons.append("batch norms see the images of a pass alone")
    if config.head.dropout:
        reasons.append("dropout draws other features")
    return f"; the result differs from that of whole batches, as {' and '.join(reasons)}" if reasons else ""


def _goes_on(config: Config) -> bool:
    """Whether a run has a place for all of the adapter that it goes on from, if it goes on from one."""
    init = config.adapter.init
    return init is None or has_place_for(config, trained_by(init, config.backbone.name))


def _what_would_fit(config: Config, opened: Opened, budget: Budget) -> str:
    """Another way to train, by the same method or the last layer alone, whose measured step keeps the budget."""
    command = f"`tinytl-hf fit --memory_mb {config.memory.budget_mb:g}` with this run's data"
    fitted, blocks = fitted_to_backbone(FitConfig(), config)
    whole = replace(config, trained_blocks="all")
    for method in dict.fromkeys([config.method, "FT-Last"]):
        if not _goes_on(replace(whole, method=method)):
            continue
        options = replace(fitted, methods=[method])  # type: ignore[list-item]
        facts = {size: facts_of(opened, config, size) for size in sizes_to_try(options, config.data.train_size)}
        row = next(search(make_families(config, options, blocks, facts, budget), lambda _: 0.0), None)
        if row is not None:
            return f"{row.step.peak.total / MB:.1f} MB takes: {row.plan}; {command} shows more"
    return f"nothing that was tried fits; {command} says what the smallest takes"
