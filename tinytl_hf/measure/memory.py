"""Training memory as three figures that are never mixed up: computed, kept and measured.

:func:`~tinytl_hf.measure.paper_rule.paper_rule` computes what the TinyTL paper would report,
:func:`kept_for_backward` counts what one real forward pass keeps, :func:`measure_peak` measures one real training
step. Figures are bytes; MB are 1e6 bytes.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from tinytl_hf.adapter.build import network_without_values
from tinytl_hf.config.run import Config
from tinytl_hf.config.verbs import MemoryTableConfig
from tinytl_hf.cuda_graph import describe_passes
from tinytl_hf.data.images import decoded_photo_size
from tinytl_hf.device import device_of_figures, make_accelerator, precision_of
from tinytl_hf.errors import TinyTLError
from tinytl_hf.lean.backend import describe, left_to_eager
from tinytl_hf.lean.notes import STOCK, grouped
from tinytl_hf.measure.ledger import kept_by_layer
from tinytl_hf.measure.measured_step import MeasuredStep, random_batch
from tinytl_hf.measure.own_process import in_own_process
from tinytl_hf.measure.paper_rule import paper_rule
from tinytl_hf.measure.peak import Peak, measure_peak, measure_speed, process_high_water
from tinytl_hf.model import TinyTLModel
from tinytl_hf.network.backbones import check_size, check_takes
from tinytl_hf.network.methods import METHODS
from tinytl_hf.network.norms import world_size
from tinytl_hf.reports.table import aligned
from tinytl_hf.words import counted

logger = logging.getLogger(__name__)

MB = 1e6
NAMED_LAYERS = 4  # how many of a row's stock layers the table names


@dataclass(frozen=True)
class MemoryRow:
    """One method's figures on one engine, ``lean`` or ``stock``.

    ``high_water`` is of the whole process. ``stock_layers`` says what each layer that stays stock keeps for backward,
    ``training_paths`` how each part trains, ``left_to_eager`` what the chosen back-end did not run.
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
    left_to_eager: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DataMemory:
    """What the decoded images of a run keep in memory, once a machine.

    Attributes:
        parts: Bytes by split, or that it streams.
        photo_size: Greatest height and width of the training images in px: what a batch is padded to at most.
    """

    parts: dict[str, int | str]
    photo_size: tuple[int, int]

    def __str__(self) -> str:
        """The parts in words."""
        kept = {name: part if isinstance(part, str) else f"{part / MB:.1f} MB" for name, part in self.parts.items()}
        return ", ".join(f"{name} {part}" for name, part in kept.items())


def photo_size_of(config: Config, options: MemoryTableConfig, data: DataMemory | None) -> tuple[int, int]:
    """Height and width in px of the photos that the step is measured on."""
    return options.height_and_width or (data.photo_size if data else decoded_photo_size(config.data.train_size))


def measure_rows(config: Config, options: MemoryTableConfig, photo_size: tuple[int, int]) -> Iterator[MemoryRow]:
    """Measure methods on both engines, each in a process of its own, so that none inherits another's memory.

    Args:
        config: The run: backbone, image size, precision, lite residual, head, optimizer; its method does not matter.
        options: Methods, batch, classes and repeats.
        photo_size: Height and width of the photos in px.

    Raises:
        TinyTLError: One of the methods that are named does not fit the options, or this machine's memory; or none of
            all methods does.
    """
    name, network = network_without_values(config.backbone.name, config.backbone.weights)
    check_size(name, "data.train_size", config.data.train_size)
    check_takes(name, network, "data.train_size", config.data.train_size)
    left_out: dict[str, TinyTLError] = {}
    methods = list(METHODS if options.methods is None else options.methods)
    for method in methods:
        for lean in (False, True):
            try:
                yield in_own_process(get_context("spawn"), _measure_alone, config, options, photo_size, method, lean)
            except TinyTLError as error:
                left_out[method] = error
                if options.methods is not None or len(left_out) == len(methods):
                    raise
                logger.warning("%s is left out: %s", method, error)  # the others of all methods may fit
                break
            except MemoryError as error:
                raise TinyTLError(
                    f"batch_size={options.batch_size}: this machine has not enough memory for a step of {method} from "
                    f"photos of {'x'.join(map(str, photo_size))} px; use fewer or smaller ones"
                ) from error


def _measure_alone(
    config: Config, options: MemoryTableConfig, photo_size: tuple[int, int], method: str, lean: bool
) -> MemoryRow:
    model = build(config, method, options.num_classes, lean)
    pixels, labels = random_batch(model, options.batch_size, photo_size)
    speed = measure_speed(model, pixels, labels, config, options.repeats)
    high_water = process_high_water()  # before the profiler takes memory of its own
    return measure(model, pixels, labels, config, speed, high_water)


def measure(
    model: TinyTLModel, pixels: Tensor, labels: Tensor, config: Config, images_per_second: float, high_water: int
) -> MemoryRow:
    """All figures of a run's step, with arguments as of :func:`~tinytl_hf.measure.peak.measure_peak`.

    Speed and the process's high-water mark are measured by the caller.
    """
    step = MeasuredStep(model, pixels, labels, config)
    kept = kept_by_layer(model, step.view(), labels, step.options.smoothing)
    return MemoryRow(
        method=model.config.method,
        engine="lean" if model.engine.lean else "stock",
        paper=paper_rule(model, len(labels)),
        kept=sum(kept.values()),
        peak=measure_peak(model, pixels, labels, config),
        images_per_second=images_per_second,
        high_water=high_water,
        stock_layers={label: kept[label.partition(" ")[0]] for label in model.stock_layers},
        training_paths=model.training_paths,
        left_to_eager=list(left_to_eager) if model.engine.lean else [],
    )


def build(config: Config, method: str, num_classes: int, lean: bool) -> TinyTLModel:
    """The model of a run, with another method and engine, on CUDA or else the CPU, in the run's precision.

    Args:
        config: The run.
        method: The method.
        num_classes: Outputs of the head.
        lean: Whether it trains on the lean engine, or in stock PyTorch.
    """
    config = replace(
        config,
        method=method,  # type: ignore[arg-type]
        memory=replace(config.memory, lean=lean),
        train=replace(config.train, cache_features=False),  # which is of one method only
    )
    model = TinyTLModel.from_config(config, [str(label) for label in range(num_classes)])
    on_cpu = device_of_figures().type == "cpu"
    return make_accelerator(config.train.mixed_precision, config.train.threads, cpu=on_cpu).prepare(model)


def conditions(config: Config, **sizes: int | str) -> dict[str, Any]:
    """What figures hold under; ``sizes`` are those that they have in common."""
    device = device_of_figures()
    return {
        "backbone": config.backbone.name,
        **sizes,
        "optimizer": config.train.optimizer,
        "gradient_accumulation_steps": config.train.gradient_accumulation_steps,
        **({} if config.train.max_grad_norm is None else {"max_grad_norm": config.train.max_grad_norm}),
        "frozen_weights": config.backbone.frozen_weights,
        **({} if config.trained_blocks == "all" else {"trained_blocks": config.trained_blocks}),
        "precision": precision_of(config.train.mixed_precision),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "engine": describe(config.engine, device) + describe_passes(config, device, world_size()),
        "threads": torch.get_num_threads(),
        "torch_version": torch.__version__,
    }


LABELS = {"paper": "paper rule (analytic)", "kept": "kept for backward (ledger)", "peak": "peak (measured)"}
LEGEND = f"""\
A  {LABELS["paper"]}: computed as in the TinyTL paper, with 8-bit frozen weights
B  {LABELS["kept"]}: what one forward pass really keeps
C  {LABELS["peak"]}: of one training step from decoded photos to the optimizer, the sum of the seven columns after it;
   dynamic = kept + transient, resampling included. Several processes that accumulate have gradients twice, in DDP
process: the most that a process running this alone had resident. All in MB of 1e6 bytes.
"""
COLUMNS = ["A", "B", "C", "frozen", "trained", "gradients", "optimizer", "photos", "kept", "transient"]
COLUMNS += ["dynamic", "process"]


def memory_table(rows: Sequence[MemoryRow], data: DataMemory | None = None) -> str:
    """The rows as plain text, with a legend that says which figure is computed and which is measured."""
    table = [["method", "engine", *COLUMNS, "images/s"]]
    notes = []
    for row in rows:
        peak = row.peak
        parts = [peak.frozen_weights, peak.trained_weights, peak.gradients, peak.optimizer_state, peak.photos]
        parts += [peak.kept_activations, peak.transient]
        figures = [row.paper, row.kept, peak.total, *parts, peak.dynamic, row.high_water]
        in_mb = [f"{figure / MB:.1f}" for figure in figures]
        table.append([row.method, row.engine, *in_mb, f"{row.images_per_second:.1f}"])
        notes.extend(_path_notes(row))
        notes.extend(f"{row.method}, {row.engine}: {line}" for line in row.left_to_eager)
        if row.stock_layers:
            largest = Counter(row.stock_layers).most_common(NAMED_LAYERS)
            names = ", ".join(f"{label} {kept / MB:.1f}" for label, kept in largest)
            names += ", ..." * (len(row.stock_layers) > NAMED_LAYERS)
            total = sum(row.stock_layers.values()) / MB
            count = f"{counted(len(row.stock_layers), 'layer stays', 'layers stay')} stock"
            notes.append(f"{row.method}, {row.engine}: {count}: {names}; in all they keep {total:.1f} MB for backward")
    if data is not None:
        notes.append(f"besides, the decoded images of the data set, once a machine: {data} (by their headers)")
    return "\n".join([LEGEND, *aligned(table, left=2), *notes]) + "\n"


def _path_notes(row: MemoryRow) -> list[str]:
    """One line on how the parts train, where any is not stock."""
    groups = grouped(row.training_paths)
    if not groups.keys() - {STOCK}:
        return []
    return [f"{row.method}, {row.engine}: " + "; ".join(f"{path}: {', '.join(n)}" for path, n in groups.items())]


def to_json(rows: Sequence[MemoryRow], conditions: Mapping[str, Any], data: DataMemory | None = None) -> str:
    """The rows in bytes, with the conditions they hold under: device, threads, batch size and the like."""
    plain = [asdict(row) for row in rows]
    for row, values in zip(rows, plain, strict=True):
        values["peak"] |= {"dynamic": row.peak.dynamic, "total": row.peak.total}
    content: dict[str, Any] = {"unit": "bytes", "labels": LABELS, "conditions": dict(conditions), "rows": plain}
    if data is not None:
        content["decoded_images"] = data.parts
    return json.dumps(content, indent=2) + "\n"
