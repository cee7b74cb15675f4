"""What a run writes of itself: adapters, the memory report, the card."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from tinytl_hf.adapter.format import CARD_FILE, read_config
from tinytl_hf.adapter.record import DataRecord
from tinytl_hf.config.run import Config
from tinytl_hf.disk import encoded, write_together, writing
from tinytl_hf.errors import one_line
from tinytl_hf.hub.card import PICTURES, RunFacts, read_card, render_card
from tinytl_hf.hub.card_words import dataset_name
from tinytl_hf.measure import memory
from tinytl_hf.measure.measured_step import random_batch
from tinytl_hf.measure.peak import process_high_water
from tinytl_hf.model import TinyTLModel
from tinytl_hf.reports import run_folder
from tinytl_hf.reports.plots import draw_confusion, draw_curves
from tinytl_hf.reports.run_folder import (
    ADAPTER,
    MEMORY_FILE,
    RESULTS_FILE,
    images_of,
    planned_epochs,
    read_metrics,
    seconds_of,
)
from tinytl_hf.train.card_recipe import recipe
from tinytl_hf.train.run import Run
from tinytl_hf.words import counted

logger = logging.getLogger(__name__)

MEASURED_ON = ("cpu", "cuda")  # kinds of devices whose allocator tells its peak
WITHOUT_CARD = "the adapter itself is safe"


def save_adapters(
    model: TinyTLModel,
    config: Config,
    record: DataRecord,
    names: list[str],
    accelerator: Accelerator,
    figures: dict[str, float] | None = None,
) -> None:
    """Write the model as it is to folders of the run, from the main process."""
    if accelerator.is_main_process:
        for name in names:
            model.save_pretrained(
                Path(config.output_dir) / name, dtype=config.adapter.dtype, data=record, metrics=figures
            )


def report_memory(run: Run) -> None:
    """Measure what a training step of this run takes, and add it to the finished run and its card.

    The run is complete before: whatever goes wrong here costs this report alone.
    """
    device = run.accelerator.device.type
    if device not in MEASURED_ON:
        logger.info(
            "memory report: left out, as peaks are measured on %s, not on %s", " and ".join(MEASURED_ON), device
        )
        return
    try:
        write_memory(run)
        if run.accelerator.is_main_process:
            write_card(Path(run.config.output_dir), run.config)
    except Exception as error:  # such as no memory left for the measurement itself
        reason = one_line(error) or type(error).__name__
        logger.warning("memory report: failed (%s); the run is complete without it", reason)


def write_memory(run: Run) -> None:
    """Measure a training step of this run, and write what it takes into the run's folder.

    Its photos have the greatest height and the greatest width of the training images, as a batch is padded to those.
    With cached features it is the step that they stand in for, and says so.
    """
    config, output, is_main = run.config, Path(run.config.output_dir), run.accelerator.is_main_process
    batch = config.train.global_batch_size // run.accelerator.num_processes // config.train.gradient_accumulation_steps
    lines = run_folder.read_metrics(output) if is_main else []
    # No line: a finished run that goes on in another folder, and for no epoch more.
    speed = lines[-1]["train"]["images_per_second"] if lines else 0.0
    high_water = process_high_water()
    # On every process, as norms see the batch of all.
    photos = random_batch(run.model, batch, run.data_memory.photo_size)
    row = memory.measure(run.model, *photos, config, speed, high_water)
    if is_main:
        conditions = memory.conditions(
            config,
            train_size=config.data.train_size,
            photo_size="{}x{}".format(*run.data_memory.photo_size),
            batch_size=batch,
            processes=run.accelerator.num_processes,
            **({"cache_features": "measured without"} if config.train.cache_features else {}),
        )
        run_folder.write(output / run_folder.MEMORY_FILE, memory.to_json([row], conditions, run.data_memory))


def draw_pictures(output: Path, config: Config) -> None:
    """Draw a finished run's curves and confusion matrix, next to its adapter, for the card.

    Raises:
        TinyTLError: A file cannot be written.
    """
    folder, lines = output / ADAPTER, read_metrics(output)
    results = json.loads((output / RESULTS_FILE).read_text(encoding="utf-8"))
    curves, confusion = PICTURES.values()
    drawn = {confusion: draw_confusion(results["confusion_matrix"], results["label_names"])}
    if lines:
        drawn[curves] = draw_curves({config.method: lines})
    with writing(f"the card of {folder}", WITHOUT_CARD):
        write_together({folder / name: picture for name, picture in drawn.items()})


def write_card(output: Path, config: Config) -> None:
    """Tell of a finished run in the card of its adapter, with the figures next to it.

    Args:
        output: The run's folder.
        config: The run's config.

    Raises:
        TinyTLError: A file cannot be written.
    """
    folder, lines = output / ADAPTER, read_metrics(output)
    results = json.loads((output / RESULTS_FILE).read_text(encoding="utf-8"))
    memory = output / MEMORY_FILE
    curves, _ = PICTURES.values()
    # A run that was resumed into another folder with nothing left to train has no lines.
    facts = RunFacts(
        recipe=recipe(config, results, lines[-1]["epoch"] if lines else None, planned_epochs(lines)),
        time=_time(lines, results) if lines and len(lines) == lines[-1]["epoch"] else "",  # not of a part
        split=results["split"],
        n=results["n"],
        memory=json.loads(memory.read_text(encoding="utf-8")) if memory.is_file() else None,
        pictures={title: name for title, name in PICTURES.items() if lines or name != curves},
    )
    record = read_config(folder)
    card = render_card(record, results, read_card(folder), facts)
    # A card is public: it does not say where Python is installed and where the data are.
    public = {key: value for key, value in results.items() if not key.startswith("_")}
    public["dataset"] = dataset_name(record.data)
    with writing(f"the card of {folder}", WITHOUT_CARD):
        files = {RESULTS_FILE: json.dumps(public, indent=2) + "\n", CARD_FILE: card}
        write_together({folder / name: encoded(text) for name, text in files.items() if text})


def _time(lines: list[dict[str, Any]], results: dict[str, Any]) -> str:
    epochs = counted(len(lines), "epoch")
    seconds, images = seconds_of(lines), images_of(lines)
    return (
        f"Training took {seconds:,.0f} s for {epochs}, without the evaluations ({images / seconds:.0f} "
        f"images/s), on {counted(results['processes'], 'process', 'processes')}, {results['device']}, "
        f"{counted(results['threads'], 'thread')}, "
        f"torch {results['torch_version']}."
    )
