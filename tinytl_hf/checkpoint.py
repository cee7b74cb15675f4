"""Checkpoints that hold what a run changes: deltas, optimizer, schedule, random states and position.

The frozen backbone is not in them. A checkpoint appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from tinytl_hf.config import Config, flat
from tinytl_hf.errors import TinyTLError
from tinytl_hf.model import TinyTLModel

FOLDER = "checkpoints"
DELTA_FILE = "delta.safetensors"
PROGRESS_FILE = "progress.json"
MAY_DIFFER = {
    *("output_dir", "overwrite", "tracker", "adapter.dtype", "data.workers", "data.memory_limit_mb"),
    *("memory.lean", "memory.slice_mb"),
    *("train.epochs", "train.resume", "train.keep_checkpoints", "train.threads"),
}


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        epoch: Epochs that are complete.
        batch: Forward passes done in the current epoch.
        step: Optimizer steps done.
        best_accuracy: Best evaluation accuracy so far; -1 before the first.
        loss, right, images: Sums over the current epoch's training images: loss in nats, right answers, count.
        seconds: Training time of the current epoch.
        learning_rate: That of the last step.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_accuracy: float = -1.0
    loss: float = 0.0
    right: float = 0.0
    images: float = 0.0
    seconds: float = 0.0
    learning_rate: float = 0.0

    def add(self, sums: torch.Tensor) -> None:
        """Add loss, right answers and count of some images, over all processes."""
        loss, right, images = sums.tolist()
        self.loss, self.right, self.images = self.loss + loss, self.right + right, self.images + images

    def next_epoch(self, accuracy: float) -> None:
        """Turn to the next epoch."""
        self.best_accuracy = max(self.best_accuracy, accuracy)
        self.epoch += 1
        self.batch, self.loss, self.right, self.images, self.seconds = 0, 0.0, 0.0, 0.0, 0.0


def register(accelerator: Accelerator) -> None:
    """Make ``save_state`` and ``load_state`` handle the delta in place of the whole model."""

    def save_delta(models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        if accelerator.is_main_process:
            for model in models:
                tensors = {n: t.cpu().contiguous() for n, t in _unwrapped(accelerator, model).items()}
                save_file(tensors, Path(folder) / DELTA_FILE)
        weights.clear()

    def load_delta(models: list[nn.Module], folder: str) -> None:
        for model in models:
            path = Path(folder) / DELTA_FILE
            accelerator.unwrap_model(model).load_adapter_tensors(load_file(path), str(path))
        models.clear()

    accelerator.register_save_state_pre_hook(save_delta)
    accelerator.register_load_state_pre_hook(load_delta)


def save(accelerator: Accelerator, config: Config, progress: Progress) -> Path:
    """Write a checkpoint of this moment and remove those beyond ``keep_checkpoints``."""
    folder = Path(config.output_dir) / FOLDER
    final = folder / f"step_{progress.step:08d}"
    temporary = folder / f".{final.name}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        processes = accelerator.num_processes
        record = {"progress": asdict(progress), "config": config.to_dict(), "processes": processes}
        (temporary / PROGRESS_FILE).write_text(json.dumps(record, indent=2), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        temporary.replace(final)
        for old in list_checkpoints(folder)[: -config.train.keep_checkpoints]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def find(config: Config, processes: int) -> Path | None:
    """The checkpoint that ``train.resume`` asks for, if any.

    Raises:
        TinyTLError: It names a folder that is no checkpoint, or one of another kind of run.
    """
    if config.train.resume == "never":
        return None
    if config.train.resume == "auto":
        found = list_checkpoints(Path(config.output_dir) / FOLDER)
        path = found[-1] if found else None
    else:
        path = Path(config.train.resume).expanduser()
        if not (path / PROGRESS_FILE).is_file():
            raise TinyTLError(f"train.resume={path}: not a checkpoint; use auto, never or a checkpoint's folder")
    if path is not None:
        _check_same_run(path, config, processes)
    return path


def load(accelerator: Accelerator, path: Path) -> Progress:
    """Bring model, optimizer, schedule and random states back to the checkpoint at ``path``."""
    accelerator.load_state(str(path))
    return Progress(**_record(path)["progress"])


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step_*/{PROGRESS_FILE}"))


def _record(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / PROGRESS_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise TinyTLError(f"checkpoint {path} cannot be read ({error}); resume from another") from error


def _check_same_run(path: Path, config: Config, processes: int) -> None:
    record = _record(path)
    before = {**flat(record["config"]), "processes": record["processes"]}
    now = {**flat(config.to_dict()), "processes": processes}
    for key in sorted(before.keys() | now.keys()):
        if key not in MAY_DIFFER and before.get(key) != now.get(key):
            raise TinyTLError(
                f"{key}={now.get(key)}: the checkpoint {path} was made with {before.get(key)}; use that, or "
                "another --output_dir"
            )


def _unwrapped(accelerator: Accelerator, model: nn.Module) -> dict[str, torch.Tensor]:
    unwrapped = accelerator.unwrap_model(model)
    assert isinstance(unwrapped, TinyTLModel)
    return unwrapped.adapter_tensors()
