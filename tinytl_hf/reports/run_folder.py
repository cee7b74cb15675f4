"""What a run leaves in its folder.

``config.yaml``, ``metrics.jsonl`` (a line an epoch), ``eval_results.json``, ``mistakes.json``, ``memory.json`` (what a
training step takes), ``adapter/`` (of the best epoch, or of the last, by ``adapter.keep``, with a card that tells of
the run), ``adapter_last/``, ``checkpoints/`` and the tracker's logs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tinytl_hf.disk import write_text, writing
from tinytl_hf.errors import TinyTLError

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
RESULTS_FILE = "eval_results.json"
MEMORY_FILE = "memory.json"
MISTAKES_FILE = "mistakes.json"
PAGE_FILE = "report.html"  # where the verb report writes it if no other place is named
PAGE_MARK = '<p class="note">tinytl_hf '  # at the end of every page
ADAPTER = "adapter"
LAST_ADAPTER = "adapter_last"
CHECKPOINTS = "checkpoints"


def write(path: Path, text: str) -> None:
    """Write a file of a finished run.

    Raises:
        TinyTLError: It cannot be written; the run's adapters and figures are on the disk already.
    """
    with writing(path, "the run is done and its adapters are saved"):
        write_text(path, text)


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
    """The lines of ``metrics.jsonl``; none if there is no such file. A last line that a kill cut off is left out.

    Raises:
        ValueError: One is no JSON.
    """
    path = output / METRICS_FILE
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except RecursionError as error:
        raise ValueError(f"{METRICS_FILE}: {error}") from error


def planned_epochs(lines: list[dict[str, Any]]) -> list[int]:
    """Over how many epochs the schedule of these spans, in turn: more than one number if a run was given more epochs.

    Empty where nothing spans them, or an earlier version did not write it.
    """
    return list(dict.fromkeys(line["of_epochs"] for line in lines if "of_epochs" in line))


def seconds_of(lines: list[dict[str, Any]]) -> float:
    """Training time of these epochs, without the evaluations."""
    return float(sum(line["seconds"] for line in lines))


def images_of(lines: list[dict[str, Any]]) -> float:
    """Images trained on in these epochs."""
    return float(sum(line["seconds"] * line["train"]["images_per_second"] for line in lines))
