"""What fits a budget, found by real steps.

Of each family of plans, a method with a number of trained blocks, two steps are measured. From those, the best plan
that should fit is worked out, and its own step measured, which decides: no row of the table is a prediction.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tinytl_hf.train.fresh_step import FreshStep
from tinytl_hf.train.plans import Plan

logger = logging.getLogger(__name__)

FIRST_BATCH = 8  # images a pass of the first two steps of a family
TRIES = 4  # measured steps of a family, until one fits
HOPELESS = 3.0  # times the budget: a family's larger first step is not tried where so much is expected
SHARE_OF_INT8 = 0.27  # of frozen weights in fp32: a byte a weight, and norms and scales
GUESSED_SHARE = 0.5  # of activations, with checkpointing or in bf16, until it is measured
BYTES = 4  # a gradient


@dataclass(frozen=True)
class DataFacts:
    """What a budget needs to know of the data, for images of one size.

    Attributes:
        images: Training images.
        evaluated: Images of the evaluation after each epoch.
        classes: Number of classes.
        photo_size: Greatest height and width of the decoded photos in px.
        in_memory: What the decoded images of all splits keep in memory, in bytes.
        evaluated_last: Images of the evaluations after the last epoch, of the adapter that is kept.
        streams: Whether images of a split are decoded each time they are used.
    """

    images: int
    evaluated: int
    classes: int
    photo_size: tuple[int, int]
    in_memory: int
    evaluated_last: int = 0
    streams: bool = False

    @property
    def photo(self) -> int:
        """Bytes of a decoded photo."""
        return 3 * self.photo_size[0] * self.photo_size[1]


@dataclass(frozen=True)
class Budget:
    """What there is, in bytes and seconds; None: any.

    Attributes:
        step: For a training step.
        process: For the whole process.
        seconds: For the training and its evaluations.
        base: What a training's process has resident before there is a network, in bytes.
    """

    step: float | None
    process: float | None
    seconds: float | None
    base: int


@dataclass(frozen=True)
class Row:
    """A plan, and its step as it was measured.

    Attributes:
        plan: The plan.
        step: Its step.
        process: Of the whole process in bytes: what this one had with the data opened, what the step's process grew
            by, the decoded images, and the next batch that the loader has ready.
        seconds: Of an epoch, with its evaluation.
        seconds_last: Of the evaluations after the last epoch.
    """

    plan: Plan
    step: FreshStep
    process: int
    seconds: float
    seconds_last: float = 0.0

    def training(self, epochs: int) -> float:
        """Seconds of a training with all its evaluations."""
        return epochs * self.seconds + self.seconds_last

    def fits(self, budget: Budget) -> bool:
        """Whether it does, however long the training takes."""
        fits_step = budget.step is None or self.step.peak.total <= budget.step
        return fits_step and (budget.process is None or self.process <= budget.process)


@dataclass
class Family:
    """Plans of a method with a number of trained blocks, and what was measured of them.

    Attributes:
        plans: The plans, best first.
        facts: Of the data, by size of the images.
        budget: What there is.
        whole_batch: Images an optimizer step.
        take: Takes a plan's step, with so many repeats; None: the machine has not that much memory.
        rows: What was measured.
        failed: Plans that the machine has not enough memory for.
    """

    plans: Sequence[Plan]
    facts: Mapping[int, DataFacts]
    budget: Budget
    whole_batch: int
    take: Callable[[Plan, int], FreshStep | None]
    rows: list[Row] = field(default_factory=list)
    failed: set[Plan] = field(default_factory=set)

    def measure(self, plan: Plan, repeats: int = 0) -> Row | None:
        """Take a plan's step."""
        step = self.take(plan, repeats)
        if step is None:
            self.failed.add(plan)
            return None
        facts = self.facts[plan.train_size]
        process = self.budget.base + step.grown + facts.in_memory + step.peak.photos
        seconds = facts.images / step.images_per_second + facts.evaluated / step.eval_images_per_second
        row = Row(plan, step, process, seconds, facts.evaluated_last / step.eval_images_per_second)
        self.rows.append(row)
        return row

    def start(self) -> None:
        """Measure two steps to go on from: small images, and large ones unless those are far beyond the budget."""
        plain = min(self.plans, key=lambda plan: (plan.int8, plan.group_norm, plan.checkpointing, plan.bf16))
        alike = [plan for plan in self.plans if plan.options == plain.options]
        batch = min((plan.batch for plan in alike), key=lambda batch: abs(batch - FIRST_BATCH))
        alike = sorted((plan for plan in alike if plan.batch == batch), key=lambda plan: plan.train_size)
        first, last = alike[0], alike[-1]
        if self.measure(first) is not None and first != last and self.excess(last) < HOPELESS:
            self.measure(last)

    def excess(self, plan: Plan) -> float:
        """What a plan should take as a multiple of the budget."""
        step, process = self.predicted(plan)
        limits = ((step, self.budget.step), (process, self.budget.process))
        return max((taken / limit for taken, limit in limits if limit is not None), default=0.0)

    def predicted(self, plan: Plan) -> tuple[float, float]:
        """What a plan's step and its whole process should take in bytes, by the steps that were measured."""
        alike = [row for row in self.rows if row.plan.options == plan.options]
        known = alike or [row for row in self.rows if row.plan.group_norm == plan.group_norm] or self.rows
        row = min(known, key=lambda row: abs(_pixels(row.plan) - _pixels(plan)))
        was, peak, facts = row.plan, row.step.peak, self.facts[plan.train_size]
        frozen = float(peak.frozen_weights)
        if plan.int8 != was.int8:
            frozen *= SHARE_OF_INT8 if plan.int8 else 1 / SHARE_OF_INT8
        fixed = frozen + peak.trained_weights + peak.optimizer_state + self._gradients(plan, row.step)
        share = GUESSED_SHARE ** ((plan.checkpointing > was.checkpointing) + (plan.bf16 > was.bf16))
        step = fixed + plan.batch * facts.photo + share * self._activations(_pixels(plan), row, known)
        beside = row.step.grown - peak.total  # what the allocator does not see, and what it saw and was not resident
        return step, self.budget.base + facts.in_memory + plan.batch * facts.photo + beside + step

    def _activations(self, pixels: int, row: Row, known: Sequence[Row]) -> float:
        """Of that many pixels a pass: from a row on, by what they grow with the pixels to another of ``known``."""
        if all(_pixels(other.plan) == _pixels(row.plan) for other in known):
            known = self.rows
        others = [other for other in known if _pixels(other.plan) != _pixels(row.plan)]
        start, dynamic = _pixels(row.plan), self._dynamic(row)
        if not others:
            return dynamic * pixels / start
        other = min(others, key=lambda other: abs(_pixels(other.plan) - pixels))
        slope = (self._dynamic(other) - dynamic) / (_pixels(other.plan) - start)
        return max(0.0, dynamic + max(0.0, slope) * (pixels - start))

    def _dynamic(self, row: Row) -> float:
        peak = row.step.peak
        of_weights = peak.frozen_weights + peak.trained_weights + peak.optimizer_state + peak.photos
        return peak.total - of_weights - self._gradients(row.plan, row.step)

    def _gradients(self, plan: Plan, step: FreshStep) -> int:
        """Gradients that are there while the activations are: those of the passes before."""
        return BYTES * step.trained_parameters if plan.batch < self.whole_batch else 0

    def best(self, among: Sequence[Plan]) -> Row | None:
        """Measure the best plan that fits; None: none was found."""
        best: Row | None = None
        for _ in range(TRIES):
            better = among if best is None else among[: among.index(best.plan)]
            done = self.failed | {row.plan for row in self.rows if not row.fits(self.budget)}
            plan = next((plan for plan in better if plan not in done and self.excess(plan) <= 1), None)
            if plan is None:
                break
            row = self.measure(plan, repeats=2)
            if row is not None and row.fits(self.budget):
                best = row
        return best

    def smallest(self) -> Plan:
        """The plan that should take least."""
        if self.budget.step is None and self.budget.process is None:
            return self.plans[-1]
        return min(self.plans, key=self.excess)


def _pixels(plan: Plan) -> int:
    return plan.batch * plan.train_size**2


def search(families: Sequence[Family], seconds_of: Callable[[Row], float]) -> Iterator[Row]:
    """The best plan of each family that fits, and where its training takes too long, the best that does not.

    One step at a time: threads of two that share cores wait for each other, and both take several times as long.

    Args:
        families: What to try.
        seconds_of: How long a row's whole training takes.
    """
    for family in families:
        family.start()
        if not family.rows:
            logger.info("left out, as this machine has not enough memory for its first step: %s", family.plans[0])
            continue
        row = family.best(family.plans)
        while row is not None:
            yield row
            limit = family.budget.seconds
            if limit is None or seconds_of(row) <= limit:
                break
            row = family.best(_quicker(family.plans, row.plan.train_size, limit / seconds_of(row)))


def _quicker(plans: Sequence[Plan], size: int, share: float) -> list[Plan]:
    """Plans of images that are small enough to take that share of the time, else the smallest below ``size``."""
    smaller = [plan for plan in plans if plan.train_size < size]
    quick = [plan for plan in smaller if plan.train_size**2 <= share * size**2]
    return quick or [plan for plan in smaller if plan.train_size == min(each.train_size for each in smaller)]
