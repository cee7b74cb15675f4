"""Speed of training steps: the contenders take turns in one process, and medians and ratios count.

A step is that of :mod:`~tinytl_hf.measure.measured_step`, of large photos of 3:2.
Machines are noisy, so a speed says little by itself and nothing next to one of another run.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context
from typing import Any

from tinytl_hf.adapter.build import network_without_values
from tinytl_hf.config.run import Config
from tinytl_hf.config.verbs import BenchConfig
from tinytl_hf.data.images import decoded_photo_size
from tinytl_hf.device import device_of_figures
from tinytl_hf.errors import TinyTLError
from tinytl_hf.measure.convolutions import Convolutions
from tinytl_hf.measure.measured_step import MeasuredStep, random_batch
from tinytl_hf.measure.memory import build
from tinytl_hf.measure.own_process import in_own_process
from tinytl_hf.model import TinyTLModel
from tinytl_hf.network.backbones import check_size, check_takes
from tinytl_hf.reports.table import aligned

FULL = "FT-Full stock"
REPLAYED = "FT-Full lean"  # stock layers, whose passes a GPU replays
CONVOLUTIONS = "convolutions"  # of a step, alone
MEMSAVE = "memsave_torch"  # converts layer by layer; a contender if it is installed


@dataclass(frozen=True)
class BenchRow:
    """Median images a second of each contender, or why there are none."""

    train_size: int
    batch_size: int
    images_per_second: dict[str, float]
    refused: str | None = None


def bench_rows(config: Config, options: BenchConfig) -> Iterator[BenchRow]:
    """Time every size with every batch, each pair in a process of its own.

    Args:
        config: The run: backbone, method, precision, lite residual and head.
        options: Sizes, batches and repeats.

    Raises:
        TinyTLError: The backbone or, with the reason of the last pair, none of the pairs can be timed.
    """
    name, network = network_without_values(config.backbone.name, config.backbone.weights)
    pairs = list(product(options.train_sizes, options.batch_sizes))
    refused = 0
    for train_size, batch_size in pairs:
        try:
            check_size(name, "train_sizes", train_size)
            check_takes(name, network, "train_sizes", train_size)
            row = in_own_process(get_context("spawn"), _time_in_turns, config, train_size, batch_size, options.repeats)
        except TinyTLError as error:
            row = BenchRow(train_size, batch_size, {}, str(error))
        except MemoryError:
            row = BenchRow(train_size, batch_size, {}, "this machine has not enough memory for it")
        refused += row.refused is not None
        if refused == len(pairs):
            raise TinyTLError(f"nothing can be timed; at {train_size} px, batch {batch_size}: {row.refused}")
        yield row


def _time_in_turns(config: Config, train_size: int, batch_size: int, repeats: int) -> BenchRow:
    try:
        data = replace(config.data, train_size=train_size, start_size=None)
        steps = _steps(replace(config, data=data), batch_size)
    except TinyTLError as error:
        return BenchRow(train_size, batch_size, {}, str(error))
    speeds = _speeds(steps, repeats)
    if device_of_figures().type == "cuda":  # whose host takes longer to launch convolutions than the GPU for them
        return BenchRow(train_size, batch_size, speeds)
    # After the steps and not in turns with them, which would find the heap as its large outputs leave it.
    alone = {f"{config.method} {CONVOLUTIONS}": Convolutions(steps[f"{config.method} stock"])}
    return BenchRow(train_size, batch_size, {**speeds, **_speeds(alone, repeats)})


def _speeds(steps: Mapping[str, MeasuredStep | Convolutions], repeats: int) -> dict[str, float]:
    """Median images a second of each, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {name: steps[name].images / statistics.median(values) for name, values in seconds.items()}


def _steps(config: Config, batch_size: int) -> dict[str, MeasuredStep]:
    """The contenders, each warmed up by one step."""
    method = config.method
    contenders = {FULL: ("FT-Full", False), f"{method} stock": (method, False), f"{method} lean": (method, True)}
    if device_of_figures().type == "cuda" and config.memory.cuda_graph:
        contenders[REPLAYED] = ("FT-Full", True)
    models = {name: build(config, each, 10, lean) for name, (each, lean) in contenders.items()}
    if find_spec(MEMSAVE) is not None:
        models[f"{method} {MEMSAVE}"] = _memsave(build(config, method, 10, lean=False))
    batch = random_batch(models[FULL], batch_size, decoded_photo_size(config.data.train_size))
    steps = {name: MeasuredStep(model.train(), *batch, config) for name, model in models.items()}
    for name, step in steps.items():
        try:
            step()
        except TinyTLError as error:  # a batch norm over a single value
            raise TinyTLError(f"{name}: {error}") from error
    return steps


def _memsave(model: TinyTLModel) -> TinyTLModel:
    """``model`` with the layers of ``memsave_torch``; norms stay ours, as theirs would use batch statistics."""
    convert = import_module(f"{MEMSAVE}.nn").convert_to_memory_saving
    model.backbone = convert(model.backbone, batchnorm2d=False, dropout=False)
    return model


def bench_table(rows: Sequence[BenchRow], method: str) -> str:
    """The rows as plain text, with the lean engine's speed as a multiple of the stock ones and the convolutions'."""
    names = list(dict.fromkeys(name for row in rows for name in row.images_per_second))
    lean, others = f"{method} lean", dict.fromkeys([FULL, f"{method} stock", REPLAYED, f"{method} {CONVOLUTIONS}"])
    over = [name for name in others if name in names and name != lean]
    table = [["px", "batch", *names, *(f"lean : {name}" for name in over)]]
    notes = []
    for row in rows:
        speeds = row.images_per_second
        if row.refused is not None:
            notes.append(f"{row.train_size} px, batch {row.batch_size}: {row.refused}")
        cells = [f"{speeds[name]:.1f}" if name in speeds else "-" for name in names]
        ratios = [f"{speeds[lean] / speeds[name]:.2f}x" if speeds else "-" for name in over]
        table.append([str(row.train_size), str(row.batch_size), *cells, *ratios])
    return "\n".join(["images a second of training, median:", *aligned(table, left=0), *notes]) + "\n"


def to_json(rows: Sequence[BenchRow], conditions: Mapping[str, Any]) -> str:
    """The rows with the conditions they hold under."""
    content = {"unit": "images/s", "conditions": dict(conditions), "rows": [asdict(row) for row in rows]}
    return json.dumps(content, indent=2) + "\n"
