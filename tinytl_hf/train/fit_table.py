"""What fits a budget, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tinytl_hf.measure.memory import MB
from tinytl_hf.reports.table import aligned
from tinytl_hf.train.fit import Fit
from tinytl_hf.train.search import Row
from tinytl_hf.train.time_left import about
from tinytl_hf.words import counted

LEGEND = """\
peak: of a training step from uint8 photos to the changed weights, measured in a process of its own
process: the whole process, put together of what this command had resident with the data opened (Python and libraries
   included), what the step's process got on top in a step and an evaluation, decoded images, and the next batch
s/epoch: by the measured step and evaluation. points: the ranking, in % of accuracy next to the whole TinyTL-L+B at
   128 px, by the tables of configs/README.md. In MB of 1e6 bytes.
"""
COLUMNS = ["px", "images x passes", "peak MB", "process MB", "s/epoch", "trained", "points"]


def fit_table(fit: Fit) -> str:
    """The rows as plain text, the recommended one with a star, and what is recommended in words."""
    table = [["", "method", "blocks", "options", *COLUMNS]]
    for row in fit.rows:
        plan = row.plan
        mark = ""
        if row is fit.recommended:
            mark = "*"
        elif fit.budget.seconds is not None and row.training(fit.epochs) > fit.budget.seconds:
            mark = "-"
        numbers = [str(plan.train_size), f"{plan.batch} x {_passes(fit, row)}"]
        numbers += [f"{row.step.peak.total / MB:.1f}", f"{row.process / MB:.1f}", f"{row.seconds:.1f}"]
        numbers += [f"{row.step.trained_parameters:,}", f"{plan.points:+.1f}"]
        table.append([mark, plan.method, str(plan.trained_blocks), plan.options, *numbers])
    lines = [*aligned(table, left=4), ""]
    if fit.budget.seconds is not None:
        limit = about(fit.budget.seconds).removeprefix("about ")
        whole = f"all {fit.epochs} epochs" if fit.epochs > 1 else "an epoch"
        lines.append(f"-: takes longer than {limit} for {whole}")
    return "\n".join([LEGEND, *lines, f"recommended (*): {_in_words(fit)}"]) + "\n"


def _in_words(fit: Fit) -> str:
    row = fit.recommended
    cut = "" if fit.recommended_epochs == fit.epochs else f" of {fit.epochs}, as no training keeps the time as a whole"
    epochs = f"{counted(fit.recommended_epochs, 'epoch')}{cut}"
    return f"{row.plan}; {epochs}, {about(row.training(fit.recommended_epochs))}"


def _passes(fit: Fit, row: Row) -> int:
    return fit.config.train.global_batch_size // row.plan.batch


def to_json(fit: Fit, conditions: Mapping[str, Any]) -> str:
    """The rows in bytes and seconds, with the conditions they hold under and the options that are recommended."""
    rows = []
    for row in fit.rows:
        peak = {**asdict(row.step.peak), "dynamic": row.step.peak.dynamic, "total": row.step.peak.total}
        rows.append(
            {
                **asdict(row.plan),
                "options": row.plan.options,
                "points": row.plan.points,
                "passes": _passes(fit, row),
                "peak": peak,
                "process": row.process,
                "trained_parameters": row.step.trained_parameters,
                "images_per_second": row.step.images_per_second,
                "epoch_seconds": row.seconds,
                "training_seconds": row.training(fit.epochs),
            }
        )
    budget = {"step": fit.budget.step, "process": fit.budget.process, "seconds": fit.budget.seconds}
    recommended = {"row": fit.rows.index(fit.recommended), "epochs": fit.recommended_epochs}
    content = {
        "unit": "bytes",
        "conditions": {**conditions, "photo_sizes": {size: facts.photo_size for size, facts in fit.facts.items()}},
        "budget": budget,
        "rows": rows,
        "recommended": {**recommended, "config": fit.config.to_dict()},
    }
    return json.dumps(content, indent=2) + "\n"
