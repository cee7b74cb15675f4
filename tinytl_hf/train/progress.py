"""How far a run is, and the file of a checkpoint that says so."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tinytl_hf.errors import TinyTLError, first_line
from tinytl_hf.train.epoch_sums import Sums
from tinytl_hf.version import __version__

PROGRESS_FILE = "progress.json"


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        epoch: Epochs that are complete.
        batch: Forward passes done in the current epoch.
        step: Optimizer steps done.
        best_accuracy: Best evaluation accuracy so far; -1 before the first.
        epochs_since_best: Complete epochs after the one of that accuracy.
        sums: Loss, right answers and images of the current epoch, summed up to the last checkpoint.
        seconds: Training time of the current epoch.
        learning_rate: That of the last step.
        overflows: Steps of the current epoch that fp16 could not represent and that were left out.
        init: The adapter that the run went on from, as its record says.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_accuracy: float = -1.0
    sums: Sums = field(default_factory=list)
    seconds: float = 0.0
    learning_rate: float = 0.0
    overflows: int = 0
    epochs_since_best: int = 0
    init: dict[str, Any] | None = None

    def next_epoch(self, accuracy: float) -> None:
        """Turn to the next epoch."""
        self.epochs_since_best = 0 if accuracy > self.best_accuracy else self.epochs_since_best + 1
        self.best_accuracy = max(self.best_accuracy, accuracy)
        self.epoch += 1
        self.batch, self.sums, self.seconds, self.overflows = 0, [], 0.0, 0


def read_record(path: Path) -> dict[str, Any]:
    """What ``progress.json`` says.

    Raises:
        TinyTLError: It says no such thing.
    """
    try:
        record = json.loads((path / PROGRESS_FILE).read_text(encoding="utf-8"))
        if not isinstance(record, dict) or not isinstance(record.get("run", {}), dict):
            raise ValueError("it says nothing of a run")
        _check_progress(record.get("progress", asdict(Progress())))
    except (OSError, ValueError, LookupError, TypeError, RecursionError, OverflowError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else first_line(error)
        raise TinyTLError(f"checkpoint {path}: {PROGRESS_FILE} is damaged ({reason}); resume from another") from error
    return record


def _check_progress(progress: dict[str, Any]) -> None:
    for name in ("epoch", "batch", "step"):
        if type(progress[name]) is not int or progress[name] < 0:
            raise ValueError(f"{name} is {str(progress[name])[:20]}")
    if not math.isfinite(progress["best_accuracy"]):
        raise ValueError("best_accuracy is no number")


def read_progress(path: Path) -> Progress:
    """How far the run of a checkpoint was.

    Raises:
        TinyTLError: It says no such thing, or what a later version wrote.
    """
    values: dict[str, Any] = read_record(path)["progress"]
    if unknown := sorted(values.keys() - {field.name for field in fields(Progress)}):
        raise TinyTLError(
            f"checkpoint {path}: its progress has {unknown[0]}, which is not known here: a later tinytl_hf wrote it; "
            f"go on with that one (this is {__version__})"
        )
    return Progress(**values)
