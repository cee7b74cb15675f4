"""Figures of an adapter with the conditions that they hold under, as the file that ``eval`` and a run write."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from tinytl_hf.device import device_name
from tinytl_hf.disk import check_writable, write_text, writing
from tinytl_hf.model import TinyTLModel
from tinytl_hf.version import __version__
from tinytl_hf.words import counted


@dataclass(frozen=True)
class Evaluated:
    """The images that figures are of.

    Attributes:
        dataset: The data set: its path, its name on the Hub or its URL.
        split: Its split, or ``holdout``.
        sha256: Hash of that split.
        n: Number of images.
        trained_on: How many of them the adapter was trained on; None: it is not known.
    """

    dataset: str
    split: str
    sha256: str
    n: int
    trained_on: int | None

    def __str__(self) -> str:
        what = f"{counted(self.n, 'image')} of {self.dataset}, split {self.split}"
        if self.trained_on is None:
            return f"{what}; whether it was trained on any of them is not known"
        return f"{what}; it was trained on {self.trained_on or 'none'} of them"


def save_results(
    path: Path,
    figures: dict[str, Any],
    model: TinyTLModel,
    images: Evaluated,
    accelerator: Accelerator,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write figures and their conditions as JSON.

    Keys that start with ``_`` are named as in files of ``evaluate.save``.

    Args:
        path: The file.
        figures: What was measured.
        model: On which model.
        images: On which images.
        accelerator: Where.
        more: What else is to be said.

    Raises:
        TinyTLError: The file cannot be written.
    """
    results = {
        **figures,
        **asdict(images),
        **(more or {}),
        "method": model.config.method,
        "trained_blocks": model.config.trained_blocks or "all",
        "backbone": model.config.backbone.name,
        "eval_size": model.config.preprocessing.eval_size,
        "label_names": model.label_names,
        "trained_parameters": sum(parameter.numel() for parameter in model.trainable_parameters()),
        "device": device_name(accelerator),
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "torch_version": torch.__version__,
        "tinytl_hf_version": __version__,
        "_timestamp": datetime.now().isoformat(),
        "_evaluate_version": version("evaluate"),
        "_python_version": platform.python_version(),
        "_interpreter_path": sys.executable,
    }
    with writing(path, "make room, or name another folder"):
        write_text(path, json.dumps(results) + "\n")


def check_output_file(key: str, path: Path) -> None:
    """Try that a file can be written, before anything is measured.

    Args:
        key: The option that names the file.
        path: The file.

    Raises:
        TinyTLError: It cannot.
    """
    with writing(f"{key}={path}", "name another file"):
        check_writable(path)
