"""Finished training runs, read back from their folders: what ``compare`` and ``report`` work with."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tinytl_hf.config.run import Config, flat, with_new_names
from tinytl_hf.config.yaml12 import load_yaml
from tinytl_hf.errors import TinyTLError
from tinytl_hf.reports.run_folder import (
    CONFIG_FILE,
    MEMORY_FILE,
    METRICS_FILE,
    RESULTS_FILE,
    images_of,
    read_metrics,
    seconds_of,
)
from tinytl_hf.words import counted


@dataclass(frozen=True)
class FinishedRun:
    """What a run's folder says.

    Attributes:
        folder: The folder.
        config: Every option by its dotted name; what the file does not have has its default.
        epochs: The lines of ``metrics.jsonl``.
        results: ``eval_results.json``.
        memory: ``memory.json``, or None if it was not measured.
    """

    folder: Path
    config: dict[str, Any]
    epochs: list[dict[str, Any]]
    results: dict[str, Any]
    memory: dict[str, Any] | None

    @property
    def method(self) -> str:
        """The method."""
        return str(self.config["method"])

    @property
    def adapter_bytes(self) -> int:
        """Size of the adapter's tensors on disk."""
        return int(self.results["adapter_bytes"])

    @property
    def seconds(self) -> float:
        """Training time without the evaluations."""
        return seconds_of(self.epochs)

    @property
    def images(self) -> float:
        """Images trained on, over all epochs."""
        return images_of(self.epochs)

    @property
    def what_is_missing(self) -> str:
        """That lines of ``metrics.jsonl`` are lost, and what that does to figures; empty where all are there."""
        planned, last = self.config["train.epochs"], self.epochs[-1]["epoch"]
        is_known = isinstance(planned, int) and self.config["train.patience"] is None  # which can end a run earlier
        done = max(planned, last) if is_known else last
        if (lost := done - len(self.epochs)) <= 0:
            return ""
        of = f"{lost} of {counted(done, 'epoch')}"
        return f"{METRICS_FILE} lacks {of}; curves, images/s and training time are of the rest"

    @property
    def memory_rows(self) -> list[dict[str, Any]]:
        """Measured memory of this run's method, on each engine."""
        rows = self.memory["rows"] if self.memory is not None else []
        return [row for row in rows if row["method"] == self.method]

    @property
    def engine(self) -> str:
        """The engine that the run used."""
        return "lean" if self.config["memory.lean"] else "stock"

    def peak_bytes(self, engine: str) -> int | None:
        """Measured peak of a training step on an engine; None if it was not measured."""
        return next((row["peak"]["total"] for row in self.memory_rows if row["engine"] == engine), None)


def read_run(folder: Path) -> FinishedRun:
    """Read a run's folder.

    Raises:
        TinyTLError: It holds no run, an unfinished one or a damaged one.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise TinyTLError(f"{folder} is no run: it has no {CONFIG_FILE}")
    if not (folder / RESULTS_FILE).is_file():
        raise TinyTLError(f"{folder} is not finished: it has no {RESULTS_FILE}; go on with --train.resume auto")
    memory = folder / MEMORY_FILE
    try:
        run = FinishedRun(
            folder=folder,
            config={**flat(Config().to_dict()), **with_new_names(flat(_parsed(folder / CONFIG_FILE)))},
            epochs=read_metrics(folder),
            results=_with_new_name(_parsed(folder / RESULTS_FILE)),
            memory=_parsed(memory) if memory.is_file() else None,
        )
        _check_complete(run)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise TinyTLError(f"{folder} is damaged: {reason}") from error
    return run


def _parsed(path: Path) -> dict[str, Any]:
    """A JSON or YAML file that holds a mapping."""
    try:
        values = load_yaml(path.read_text("utf-8")) if path.suffix == ".yaml" else json.loads(path.read_bytes())
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path.name}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path.name}: no mapping")
    return values


def _with_new_name(results: dict[str, Any]) -> dict[str, Any]:
    """Results of version 0.1, with the name that the size at evaluation has now."""
    return {"eval_size" if key == "image_size" else key: value for key, value in results.items()}


def _check_complete(run: FinishedRun) -> None:
    """Look at what will be read later, so that what is missing or no such value shows while it can be named."""
    if not run.epochs:
        raise ValueError("metrics.jsonl has no line")
    for line in run.epochs:
        _check_numbers(METRICS_FILE, line, "epoch", "seconds", *({"of_epochs"} & line.keys()))
        _check_numbers(METRICS_FILE, line["train"], "images_per_second")
        for part in ("train", "eval"):
            _check_numbers(METRICS_FILE, line[part], "accuracy", "loss")
        float(sum(line["train_curve"]["accuracy"] + line["train_curve"]["loss"]))
    if seconds_of(run.epochs) <= 0:
        raise ValueError(f"{METRICS_FILE}: its epochs took no time")
    _check_results(run.results)
    if run.memory is not None:
        if not isinstance(run.memory["conditions"], dict):
            raise ValueError(f"{MEMORY_FILE}: conditions is no mapping")
        for row in run.memory_rows:
            _check_numbers(MEMORY_FILE, row["peak"], "total", *row["peak"])
            str(row["engine"])


def _check_results(results: dict[str, Any]) -> None:
    _check_numbers(RESULTS_FILE, results, "accuracy", "top5", "f1", "loss", "ece", "n", "adapter_bytes")
    added = [name for name in results if name.startswith("evaluate_")]
    later = [name for name in ("trained_parameters", "balanced_accuracy") if name in results]  # 0.1 had none
    _check_numbers(RESULTS_FILE, results, *later)
    for name in added:  # a figure of the user's own can be no number, as a precision of nothing is
        if not isinstance(results[name], (int, float)):
            raise ValueError(f"{RESULTS_FILE}: {name} is no number")
    labels, by_class = results["label_names"], results["per_class_accuracy"]
    if not isinstance(labels, list) or not labels or not all(isinstance(name, str) for name in labels):
        raise ValueError(f"{RESULTS_FILE}: label_names is no list of names")
    if not isinstance(by_class, list):
        raise ValueError(f"{RESULTS_FILE}: per_class_accuracy is no list of numbers")
    if [len(row) for row in results["confusion_matrix"]] != [len(labels)] * len(labels):
        raise ValueError(f"{RESULTS_FILE}: confusion_matrix has not a row and a column for each of label_names")
    float(sum(map(sum, results["confusion_matrix"])))
    float(sum(value for value in by_class if value is not None))  # of a class without images there is none


def _check_numbers(file: str, values: dict[str, Any], *names: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{file}: {str(values)[:60]} is no mapping")
    for name in names:
        if not isinstance(values[name], (int, float)) or not math.isfinite(values[name]):
            raise ValueError(f"{file}: {name} is no number")
