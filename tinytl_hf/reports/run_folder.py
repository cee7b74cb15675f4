"""What a run leaves in its folder, and how a folder is made ready for a run.

``config.yaml``, ``metrics.jsonl`` (a line an epoch), ``eval_results.json``, ``mistakes.json``, ``memory.json`` (what a
training step takes), ``adapter/`` (of the best epoch, or of the last, by ``adapter.keep``, with a card that tells of
the run), ``adapter_last/``, ``checkpoints/`` and the tracker's logs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from tinytl_hf.adapter.format import CARD_FILE, read_config
from tinytl_hf.config.run import Config, DataConfig, flat
from tinytl_hf.disk import write_text
from tinytl_hf.errors import TinyTLError
from tinytl_hf.hub.card import PICTURES, RunFacts, read_card, render_card
from tinytl_hf.reports.plots import save_confusion, save_curves
from tinytl_hf.train.checkpoint import FOLDER as CHECKPOINTS
from tinytl_hf.train.checkpoint import MAY_DIFFER, list_checkpoints

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
RESULTS_FILE = "eval_results.json"
MEMORY_FILE = "memory.json"
MISTAKES_FILE = "mistakes.json"
ADAPTER = "adapter"
LAST_ADAPTER = "adapter_last"


def check_free(config: Config) -> None:
    """Raise if ``output_dir`` holds a run that this one would destroy.

    Raises:
        TinyTLError: With the ways out.
    """
    output, resume = Path(config.output_dir), config.train.resume
    if config.overwrite or not (output / CONFIG_FILE).exists():
        return
    if resume == "auto" and (list_checkpoints(output / CHECKPOINTS) or _is_same_run(output, config)):
        return  # its checkpoints are compared with this run when they are read
    if resume not in ("auto", "never") and output.resolve() in Path(resume).expanduser().resolve().parents:
        return
    raise TinyTLError(
        f"output_dir={output}: holds a run already; choose another, go on with --train.resume auto, or replace "
        "it with --overwrite true"
    )


def _is_same_run(output: Path, config: Config) -> bool:
    """Whether a run that has no checkpoint yet was started with this config."""
    try:
        before = flat(yaml.safe_load((output / CONFIG_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return False
    now = flat(config.to_dict())
    return all(before.get(key) == now[key] for key in now.keys() - MAY_DIFFER)


def make_ready(config: Config, epochs_done: int) -> None:
    """Write the config; clear what a former run left, or, after a resume, what came after ``epochs_done``."""
    output = Path(config.output_dir)
    try:
        if epochs_done == 0 and config.train.resume == "never":
            for name in (ADAPTER, LAST_ADAPTER, CHECKPOINTS):
                shutil.rmtree(output / name, ignore_errors=True)
        for name in (RESULTS_FILE, MISTAKES_FILE, MEMORY_FILE):
            (output / name).unlink(missing_ok=True)
        output.mkdir(parents=True, exist_ok=True)
        lines = [line for line in read_metrics(output) if line["epoch"] <= epochs_done]
        write_text(output / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in lines))
        config.save(output / CONFIG_FILE)
    except OSError as error:
        raise TinyTLError(f"output_dir={output}: cannot be written ({error}); choose another") from error


def write(path: Path, text: str) -> None:
    """Write a file of a finished run.

    Raises:
        TinyTLError: It cannot be written; the run's adapters and figures are on the disk already.
    """
    try:
        write_text(path, text)
    except OSError as error:
        raise TinyTLError(
            f"{path}: cannot be written ({error}); the run is done and its adapters are saved"
        ) from error


def append_metrics(output: Path, line: dict[str, Any]) -> None:
    """Add an epoch's line to ``metrics.jsonl``.

    Raises:
        TinyTLError: It cannot be written.
    """
    try:
        with (output / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise TinyTLError(
            f"output_dir={output}: {METRICS_FILE} cannot be written ({error}); make room and go on with "
            "--train.resume auto"
        ) from error


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; none if there is no such file. A last line that a kill cut off is left out."""
    path = output / METRICS_FILE
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def seconds_of(lines: list[dict[str, Any]]) -> float:
    """Training time of these epochs, without the evaluations."""
    return float(sum(line["seconds"] for line in lines))


def images_of(lines: list[dict[str, Any]]) -> float:
    """Images trained on in these epochs."""
    return float(sum(line["seconds"] * line["train"]["images_per_second"] for line in lines))


def write_card(output: Path, config: Config, eval_split: str) -> None:
    """Tell of a finished run in the card of its adapter, with the figures and pictures next to it.

    Args:
        output: The run's folder.
        config: The run's config.
        eval_split: Name of the split that the figures are from, or ``holdout``.

    Raises:
        TinyTLError: A file cannot be written.
    """
    folder, lines = output / ADAPTER, read_metrics(output)
    results = json.loads((output / RESULTS_FILE).read_text(encoding="utf-8"))
    memory = output / MEMORY_FILE
    curves, confusion = PICTURES.values()
    # A run that was resumed into another folder with nothing left to train has no lines.
    facts = RunFacts(
        recipe=_recipe(config, results),
        time=_time(lines, results) if lines else "",
        split=eval_split,
        n=results["n"],
        memory=json.loads(memory.read_text(encoding="utf-8")) if memory.is_file() else None,
        pictures={title: name for title, name in PICTURES.items() if lines or name != curves},
    )
    card = render_card(read_config(folder), results, read_card(folder), facts)
    # evaluate.save adds where Python is installed; a card is public.
    public = {key: value for key, value in results.items() if not key.startswith("_")}
    try:
        write_text(folder / RESULTS_FILE, json.dumps(public, indent=2) + "\n")
        if lines:
            save_curves(folder / curves, {config.method: lines})
        save_confusion(folder / confusion, results["confusion_matrix"], results["label_names"])
        if card:
            write_text(folder / CARD_FILE, card)
    except OSError as error:
        raise TinyTLError(f"the card of {folder} cannot be written ({error}); the adapter itself is safe") from error


def _recipe(config: Config, results: dict[str, Any]) -> dict[str, Any]:
    options, data = config.train, config.data
    gamma = f", gamma {options.gamma:g}" if options.schedule == "exponential" else ""
    low, high = data.crop_scale
    crop = "none, features computed once" if options.cache_features else f"{low:g} to {high:g} of the area"
    return {
        "method": config.method,
        "epochs": options.epochs,
        "batch size": options.global_batch_size,
        "optimizer": options.optimizer,
        "learning rate": f"{options.lr:g}, {options.schedule}{gamma}, warmup {options.warmup_epochs:g} epochs",
        "weight decay": f"{options.weight_decay:g}",
        "label smoothing": f"{options.label_smoothing:g}",
        "head dropout": f"{config.head.dropout:g}",
        "image size": _sizes(data),
        "random crop": f"{crop}{', flipped' if data.flip else ''}",
        "training images": f"{data.max_train_samples:,} at random" if data.max_train_samples else "all",
        "precision": "fp32" if results["precision"] == "no" else results["precision"],
        "seed": config.seed,
    }


def _sizes(data: DataConfig) -> str:
    start = "" if data.start_image_size is None else f"{data.start_image_size} px growing to "
    evaluated = "" if data.eval_image_size is None else f", evaluated at {data.eval_image_size} px"
    return f"{start}{data.image_size} px{evaluated}"


def _time(lines: list[dict[str, Any]], results: dict[str, Any]) -> str:
    epochs = f"{len(lines)} epoch{'s' if len(lines) > 1 else ''}"
    seconds, images = seconds_of(lines), images_of(lines)
    return (
        f"Training took {seconds:,.0f} s for {epochs}, without the evaluations ({images / seconds:.0f} "
        f"images/s), on {results['processes']} process(es), {results['device']}, {results['threads']} threads, "
        f"torch {results['torch_version']}."
    )
