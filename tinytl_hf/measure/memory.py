"""Training memory as three figures that are never mixed up: computed, kept and measured.

:func:`~tinytl_hf.measure.paper_rule.paper_rule` computes what the TinyTL paper would report,
:func:`kept_for_backward` counts what one real forward pass keeps, :func:`measure_peak` measures one real training
step. Figures are bytes; MB are 1e6 bytes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from tinytl_hf.config.run import Config
from tinytl_hf.config.verbs import MemoryTableConfig
from tinytl_hf.device import make_accelerator
from tinytl_hf.lean.notes import STOCK, grouped
from tinytl_hf.measure.ledger import kept_by_layer
from tinytl_hf.measure.paper_rule import paper_rule
from tinytl_hf.measure.peak import Peak, measure_peak, measure_speed, process_high_water
from tinytl_hf.model import TinyTLModel
from tinytl_hf.network.methods import METHODS
from tinytl_hf.reports.table import aligned

MB = 1e6
NAMED_LAYERS = 4  # how many of a row's stock layers the table names


@dataclass(frozen=True)
class MemoryRow:
    """One method's figures on one engine, ``lean`` or ``stock``.

    ``high_water`` is of the whole process. ``stock_layers`` says what each layer that stays stock keeps for backward,
    ``training_paths`` how each part trains.
    """

    method: str
    engine: str
    paper: float
    kept: int
    peak: Peak
    images_per_second: float
    high_water: int
    stock_layers: dict[str, int]
    training_paths: dict[str, str] = field(default_factory=dict)


def measure_rows(config: Config, options: MemoryTableConfig) -> Iterator[MemoryRow]:
    """Measure methods on both engines, each in a process of its own, so that none inherits another's memory.

    Args:
        config: The run: backbone, image size, precision, lite residual and head; its method and data do not matter.
        options: Methods, batch, classes and repeats.
    """
    for method in options.methods or METHODS:
        for lean in (False, True):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                yield pool.submit(_measure_alone, config, options, method, lean).result()


def _measure_alone(config: Config, options: MemoryTableConfig, method: str, lean: bool) -> MemoryRow:
    model = build(config, method, options.num_classes, lean)
    images, labels = random_batch(model, options.batch_size)
    speed = measure_speed(model, images, labels, options.repeats)
    high_water = process_high_water()  # before the profiler takes memory of its own
    return measure(model, images, labels, lean, speed, high_water)


def measure(
    model: TinyTLModel, images: Tensor, labels: Tensor, lean: bool, images_per_second: float, high_water: int
) -> MemoryRow:
    """All figures of a model; speed and the process's high-water mark are measured by the caller."""
    kept = kept_by_layer(model, images, labels)
    return MemoryRow(
        method=model.config.method,
        engine="lean" if lean else "stock",
        paper=paper_rule(model, len(images)),
        kept=sum(kept.values()),
        peak=measure_peak(model, images, labels),
        images_per_second=images_per_second,
        high_water=high_water,
        stock_layers={label: kept[label.partition(" ")[0]] for label in model.stock_layers},
        training_paths=model.training_paths,
    )


def build(config: Config, method: str, num_classes: int, lean: bool) -> TinyTLModel:
    """The model of a run, with another method and engine, on CUDA or else the CPU, in the run's precision."""
    config = replace(
        config,
        method=method,  # type: ignore[arg-type]
        memory=replace(config.memory, lean=lean),
        train=replace(config.train, cache_features=False),  # which is of one method only
    )
    model = TinyTLModel.from_config(config, [str(label) for label in range(num_classes)])
    no_cuda = not torch.cuda.is_available()  # peaks can be measured on CUDA and on a CPU
    return make_accelerator(config.train.mixed_precision, config.train.threads, cpu=no_cuda).prepare(model)


def random_batch(model: TinyTLModel, batch_size: int) -> tuple[Tensor, Tensor]:
    """Images and labels that a model can be trained on, on its device."""
    size, device = model.config.preprocessing.train_size, next(model.parameters()).device
    images = torch.randn(batch_size, 3, size, size, device=device)
    labels = torch.randint(len(model.label_names), (batch_size,), device=device)
    return images.contiguous(memory_format=torch.channels_last), labels


def conditions(config: Config, **sizes: int) -> dict[str, Any]:
    """What figures hold under; ``sizes`` are those that they have in common."""
    return {
        "backbone": config.backbone.name,
        **sizes,
        "frozen_weights": config.backbone.frozen_weights,
        "precision": config.train.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "torch_version": torch.__version__,
    }


LABELS = {"paper": "paper rule (analytic)", "kept": "kept for backward (ledger)", "peak": "peak (measured)"}
LEGEND = f"""\
A  {LABELS["paper"]}: computed as in the TinyTL paper, with 8-bit frozen weights
B  {LABELS["kept"]}: what one forward pass really keeps
C  {LABELS["peak"]}: of one training step, the sum of the six columns after it; dynamic = kept + transient
process: the most that a process running this alone had resident. All in MB of 1e6 bytes.
"""
COLUMNS = ["A", "B", "C", "frozen", "trained", "gradients", "optimizer", "kept", "transient", "dynamic", "process"]


def memory_table(rows: Sequence[MemoryRow]) -> str:
    """The rows as plain text, with a legend that says which figure is computed and which is measured."""
    table = [["method", "engine", *COLUMNS, "images/s"]]
    notes = []
    for row in rows:
        figures = [row.paper, row.kept, row.peak.total, *asdict(row.peak).values(), row.peak.dynamic, row.high_water]
        in_mb = [f"{figure / MB:.1f}" for figure in figures]
        table.append([row.method, row.engine, *in_mb, f"{row.images_per_second:.1f}"])
        notes.extend(_path_notes(row))
        if row.stock_layers:
            largest = Counter(row.stock_layers).most_common(NAMED_LAYERS)
            names = ", ".join(f"{label} {kept / MB:.1f}" for label, kept in largest)
            names += ", ..." * (len(row.stock_layers) > NAMED_LAYERS)
            total = sum(row.stock_layers.values()) / MB
            count = f"{len(row.stock_layers)} layers stay stock"
            notes.append(f"{row.method}, {row.engine}: {count}: {names}; in all they keep {total:.1f} MB for backward")
    return "\n".join([LEGEND, *aligned(table, left=2), *notes]) + "\n"


def _path_notes(row: MemoryRow) -> list[str]:
    """One line on how the parts train, where any is not stock."""
    groups = grouped(row.training_paths)
    if not groups.keys() - {STOCK}:
        return []
    return [f"{row.method}, {row.engine}: " + "; ".join(f"{path}: {', '.join(n)}" for path, n in groups.items())]


def to_json(rows: Sequence[MemoryRow], conditions: Mapping[str, Any]) -> str:
    """The rows in bytes, with the conditions they hold under: device, threads, batch size and the like."""
    plain = [asdict(row) for row in rows]
    for row, values in zip(rows, plain, strict=True):
        values["peak"] |= {"dynamic": row.peak.dynamic, "total": row.peak.total}
    content = {"unit": "bytes", "labels": LABELS, "conditions": dict(conditions), "rows": plain}
    return json.dumps(content, indent=2) + "\n"
