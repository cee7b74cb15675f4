"""Finished runs side by side: the verb ``compare``. Reads run folders only; no data, no model."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain, count
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from tinytl_hf.config.verbs import CompareConfig
from tinytl_hf.disk import check_ours, encoded, expanded, local_path, write_together, writing
from tinytl_hf.errors import TinyTLError, one_line
from tinytl_hf.reports.finished_run import FinishedRun, read_run
from tinytl_hf.reports.plots import MB, SOFTWARE, AccuracyMemory, draw_accuracy_memory, draw_confusion, draw_curves
from tinytl_hf.reports.run_folder import planned_epochs
from tinytl_hf.reports.table import aligned
from tinytl_hf.words import counted

# Runs that differ in these options alone are one row: the seed, and what changes no figure.
NOT_COMPARED = {
    "seed",
    "output_dir",
    "overwrite",
    "tracker",
    "metrics",
    "train.resume",
    "train.keep_checkpoints",
    "train.checkpoint_every",
    "data.workers",
    "data.memory_limit_mb",
    "memory.report",
}
LONGEST_NAME = 60  # of a row, in the name of a file
CONDITIONS = (
    *("dataset", "split", "sha256", "n", "backbone", "eval_size"),
    *("device", "threads", "processes", "precision", "torch_version"),
)


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed only.

    Attributes:
        name: The method, and what sets it apart from other rows of that method.
        trained_parameters: Number of values that train, or None in an old run.
        adapter_mb: Size of the adapter's tensors in MB of 1e6 bytes.
        accuracy: On the evaluation set, a fraction; the mean over seeds.
        accuracy_std: Sample standard deviation over seeds; None for one.
        seeds: Number of seeds.
        peak_mb: Measured peak of a training step in MB; None if it was not measured.
        stock_peak_mb: The same with stock PyTorch.
        images_per_second: While training.
        training_seconds: Of a run, without its evaluations; the mean over seeds.
        runs: Their folders.
    """

    name: str
    trained_parameters: int | None
    adapter_mb: float
    accuracy: float
    accuracy_std: float | None
    seeds: int
    peak_mb: float | None
    stock_peak_mb: float | None
    images_per_second: float
    training_seconds: float
    runs: list[str]


HEADER = [
    *("method", "trained parameters", "adapter MB", "accuracy %", "seeds"),
    *("peak MB (measured)", "stock peak MB", "images/s", "training s"),
]


def compare(config: CompareConfig, folders: Iterable[str]) -> tuple[str, list[str]]:
    """Compare finished runs and write tables and pictures to ``config.output``, if it is given.

    Returns:
        The table with its notes, and why each folder that is not in it was left out.

    Raises:
        TinyTLError: Not one finished run, or the output cannot be written.
    """
    runs, left_out = [], []
    places: dict[Path, Path] = {}  # a folder counts once, however it is spelled
    for folder in map(expanded, folders):
        places.setdefault(folder.resolve(), folder)
    for folder in places.values():
        try:
            runs.append(read_run(folder))
        except TinyTLError as error:
            left_out.append(str(error))
    if not runs:
        raise TinyTLError(f"no finished run among them: {'; '.join(left_out)}")
    comparison = Comparison(runs)
    if config.output is not None:
        with writing(f"output={config.output}", "name another folder"):
            _check_output(Path(config.output), comparison)
            files = {**_tables(comparison, left_out), **_drawn(comparison)}
            write_together({Path(config.output) / name: content for name, content in files.items()})
    return str(comparison), left_out


class Comparison:
    """Finished runs in rows; as text, a table.

    Attributes:
        groups: Runs that differ in their seed only, by the name of their row.
        rows: Their figures.
        notes: What the figures are.
    """

    def __init__(self, runs: Sequence[FinishedRun]) -> None:
        self.groups = _groups(runs)
        self.rows = [_row(name, members) for name, members in self.groups.items()]
        self.notes = _notes(runs, self.groups)

    def __str__(self) -> str:
        return "\n".join([*aligned([HEADER, *map(_cells, self.rows)]), "", *self.notes])


def _groups(runs: Sequence[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """Runs that differ in their seed only, by a name that says what is special about them."""
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_compared(run), sort_keys=True, default=str), []).append(run)
    named: dict[str, list[FinishedRun]] = {}
    for members in groups.values():
        rivals = [_compared(group[0]) for group in groups.values() if group[0].method == members[0].method]
        own = _compared(members[0])
        special = [own[key] if key == "backbone.name" else f"{key} {own.get(key)}" for key in _telling_apart(rivals)]
        named[one_line(", ".join([members[0].method, *special]))] = members
    return named


def _telling_apart(rivals: Sequence[dict[str, Any]]) -> list[str]:
    """Options that are enough to tell runs apart, such as a backbone's name without its weights'."""
    keys = [key for key in _options(rivals) if any(rival.get(key) != rivals[0].get(key) for rival in rivals)]
    for key in reversed(keys):
        fewer = [other for other in keys if other != key]
        if len({str([rival.get(other) for other in fewer]) for rival in rivals}) == len(rivals):
            keys = fewer
    return keys


def _options(runs: Iterable[dict[str, Any]]) -> list[str]:
    """The options that any of these runs has: one of another version can have more."""
    return list(dict.fromkeys(chain.from_iterable(runs)))


def _compared(run: FinishedRun) -> dict[str, Any]:
    options = {key: value for key, value in run.config.items() if key not in NOT_COMPARED and key[:4] != "hub."}
    for key in ("data.dataset", "backbone.weights", "adapter.init"):
        if isinstance(options[key], str) and expanded(options[key]).exists():
            options[key] = str(local_path(options[key]))  # however it was spelled
    results, labels = run.results, run.results["label_names"]
    images = f"{results.get('n')} ({str(results.get('sha256'))[:8]})"
    ran = {"precision": results.get("precision"), "images": images}  # a launcher can say the one, and data can change
    if len(planned := planned_epochs(run.epochs)) > 1:
        options["train.epochs"] = f"{options['train.epochs']} (scheduled for {', then '.join(map(str, planned))})"
    return {**options, **ran, "classes": f"{len(labels)} ({', '.join(labels)})"}


def _row(name: str, runs: Sequence[FinishedRun]) -> Row:
    of_seed: dict[str, list[float]] = {}  # a seed that ran twice counts once
    for run in runs:
        of_seed.setdefault(str(run.config.get("seed")), []).append(run.results["accuracy"])
    accuracies = [mean(each) for each in of_seed.values()]
    return Row(
        name=name,
        trained_parameters=runs[0].results.get("trained_parameters"),
        adapter_mb=runs[0].adapter_bytes / MB,
        accuracy=mean(accuracies),
        accuracy_std=stdev(accuracies) if len(accuracies) > 1 else None,
        seeds=len(accuracies),
        peak_mb=_peak_mb(runs, runs[0].engine),
        stock_peak_mb=_peak_mb(runs, "stock"),
        images_per_second=sum(run.images for run in runs) / sum(run.seconds for run in runs),
        training_seconds=mean(run.seconds for run in runs),
        runs=[str(run.folder) for run in runs],
    )


def _peak_mb(runs: Sequence[FinishedRun], engine: str) -> float | None:
    peaks = [peak for run in runs if (peak := run.peak_bytes(engine)) is not None]
    return max(peaks) / MB if peaks else None


def _cells(row: Row) -> list[str]:
    spread = "" if row.accuracy_std is None else f" ± {100 * row.accuracy_std:.2f}"
    return [
        row.name,
        "-" if row.trained_parameters is None else f"{row.trained_parameters:,}",
        f"{row.adapter_mb:.2f}",
        f"{100 * row.accuracy:.2f}{spread}",
        str(row.seeds),
        *("-" if peak is None else f"{peak:.1f}" for peak in (row.peak_mb, row.stock_peak_mb)),
        f"{row.images_per_second:.1f}",
        f"{row.training_seconds:.0f}",
    ]


def _notes(runs: Sequence[FinishedRun], groups: dict[str, list[FinishedRun]]) -> list[str]:
    """The conditions of the figures, and what else differs between the rows."""
    notes = ["accuracy: evaluation set, mean ± sample standard deviation over seeds; MB of 1e6 bytes"]
    known = [key for key in CONDITIONS if any(key in run.results for run in runs)]  # version 0.1 did not say the data
    shared = [f"{key} {_values(run.results.get(key) for run in runs)}" for key in known]
    notes.append(f"conditions: {', '.join(shared)}")
    measured = _values(
        ", ".join(f"{k} {v}" for k, v in run.memory["conditions"].items()) for run in runs if run.memory is not None
    )
    if measured:
        notes.append(f"peak of one training step measured with: {measured}")
    for name, members in groups.items():
        seeds = [str(run.config.get("seed")) for run in members]
        if len(set(seeds)) < len(seeds):
            notes.append(f"{name}: {len(seeds)} runs of {counted(len(set(seeds)), 'seed')}, {_values(seeds)}")
        lengths = {len(run.epochs) for run in members}
        if len(lengths) > 1:  # by train.patience
            least, most = min(lengths), max(lengths)
            notes.append(f"{name}: runs of {least} to {most} epochs; curves show the first {least}, which all have")
    notes += [f"{run.folder}: {run.what_is_missing}" for run in runs if run.what_is_missing]
    firsts = [_compared(members[0]) for members in groups.values()]
    for key in _options(firsts):
        found = _values(first.get(key) for first in firsts)
        if key not in ("method", "backbone.name", "data.train_size") and " / " in found:
            notes.append(f"rows differ in {key}: {found}")
    return [one_line(note) for note in notes]


def _values(values: Iterable[Any]) -> str:
    return " / ".join(dict.fromkeys(map(str, values)))


def _check_output(output: Path, comparison: Comparison) -> None:
    """Raise if a file is there that no comparison wrote.

    Raises:
        TinyTLError: With its name.
    """
    check_ours("output", output / "compare.json", '"left_out"')
    check_ours("output", output / "compare.csv", ",".join(field.name for field in fields(Row)))
    check_ours("output", output / "compare.md", _as_markdown(HEADER))
    if not (output / "compare.json").exists():  # beside it, pictures of these names are ours
        for name in ("curves.png", "accuracy_memory.png", *_pictures(comparison.groups).values()):
            check_ours("output", output / name, SOFTWARE)


def _tables(comparison: Comparison, left_out: list[str]) -> dict[str, bytes]:
    """The comparison as JSON, CSV and Markdown, by names of files."""
    plain, notes = [asdict(row) for row in comparison.rows], comparison.notes
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(plain[0]))
    writer.writeheader()
    writer.writerows({**values, "runs": shlex.join(values["runs"])} for values in plain)
    lines = [HEADER, ["---", *["---:"] * (len(HEADER) - 1)], *map(_cells, comparison.rows)]
    markdown = [_as_markdown(cells) for cells in lines]
    texts = {
        "compare.json": json.dumps({"rows": plain, "notes": notes, "left_out": left_out}, indent=2),
        "compare.csv": table.getvalue(),
        "compare.md": "\n".join([*markdown, "", *(f"- {note}" for note in notes)]) + "\n",
    }
    return {name: encoded(text) for name, text in texts.items()}


def _as_markdown(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _drawn(comparison: Comparison) -> dict[str, bytes]:
    """Curves, accuracy against memory, and the confusion matrices, by names of files."""
    groups = comparison.groups
    drawn = {"curves.png": draw_curves({name: _mean_epochs(members) for name, members in groups.items()})}
    points = [
        AccuracyMemory(row.name, row.accuracy, row.accuracy_std, row.peak_mb, row.stock_peak_mb)
        for row in comparison.rows
        if row.peak_mb is not None
    ]
    if points:
        drawn["accuracy_memory.png"] = draw_accuracy_memory(points)
    names = _pictures(groups)
    for name, members in groups.items():
        matrix = np.sum([run.results["confusion_matrix"] for run in members], axis=0)
        drawn[names[name]] = draw_confusion(matrix.tolist(), members[0].results["label_names"])
    return drawn


def _pictures(names: Iterable[str]) -> dict[str, str]:
    """File names of the confusion matrices, each its own and no longer than a file system takes."""
    files: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^\w.+-]+", "_", name)[:LONGEST_NAME]
        numbered = chain([plain], (f"{plain}_{number}" for number in count(2)))
        files[name] = next(file for each in numbered if (file := f"confusion_{each}.png") not in files.values())
    return files


def _mean_epochs(runs: Sequence[FinishedRun]) -> list[dict[str, Any]]:
    """Accuracy and loss by epoch, and within epochs on the training set, the mean over seeds."""
    keys = ("accuracy", "loss")
    return [
        {
            "epoch": lines[0]["epoch"],
            **{part: {key: mean(line[part][key] for line in lines) for key in keys} for part in ("train", "eval")},
            "train_curve": {
                key: [mean(part) for part in zip(*(line["train_curve"][key] for line in lines), strict=False)]
                for key in keys
            },
        }
        for lines in zip(*(run.epochs for run in runs), strict=False)
    ]
