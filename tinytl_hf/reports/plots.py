"""Pictures of runs and of their memory, as the bytes of PNG files. Matplotlib is imported when one is drawn."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tinytl_hf.errors import one_line
from tinytl_hf.reports.fonts import families_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any colour vision can tell apart, without the faint yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*"  # one more than colours, so that no pair comes twice for a long time
MB = 1e6
DPI = 144
SOFTWARE = "tinytl_hf (Matplotlib)"  # which each picture names
LONGEST_LABEL = 24  # characters of a class's name that are shown
LONGEST_NAME = 48  # and of a run's
COUNTED_CLASSES = 20  # up to so many classes each cell of a confusion matrix holds its count
NAMED_CLASSES = 34  # about how many labels fit on an axis
EPOCHS_IN_PARTS = 4  # of longer runs, curves show one point an epoch

MEMORY_PARTS = {
    "frozen_weights": "frozen weights",
    "trained_weights": "trained weights",
    "gradients": "gradients",
    "gradient_buckets": "gradient buckets",
    "optimizer_state": "optimizer state",
    "photos": "decoded photos",
    "kept_activations": "kept activations",
    "transient": "transient",
}
MEMORY_COLOURS = (*COLOURS[:-1], "#F0E442", "#999999")  # black is for the text


@dataclass(frozen=True)
class AccuracyMemory:
    """A method in the plot of accuracy against memory.

    Attributes:
        name: What the legend says.
        accuracy: Mean over seeds, a fraction.
        std: Standard deviation over seeds, or None for one seed.
        peak_mb: Measured peak of a training step, in MB of 1e6 bytes.
        stock_peak_mb: The same in stock PyTorch, or None if it was not measured.
    """

    name: str
    accuracy: float
    std: float | None
    peak_mb: float
    stock_peak_mb: float | None = None


def draw_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Draw accuracy and loss of runs by epoch, on the training set (dashed) and the evaluation set (solid).

    Short runs show the training set's figures within the epochs.

    Args:
        runs: Lines of ``metrics.jsonl`` by name of the run.
    """
    in_parts = max(len(lines) for lines in runs.values()) <= EPOCHS_IN_PARTS
    with _figure(9.6, 4.4 + 0.25 * _legend_rows(runs), runs) as figure:
        axes = figure.subplots(1, 2)
        for axis, key, unit, factor in zip(axes, ("accuracy", "loss"), ("%", "nats"), (100, 1), strict=True):
            for i, (name, lines) in enumerate(runs.items()):
                style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
                epochs, values = _by_epoch(lines, "eval", key)
                axis.plot(epochs, [factor * value for value in values], "-", label=_short(name), **style)
                times, values = _within_epochs(lines, key) if in_parts else _by_epoch(lines, "train", key)
                style["marker"] = "" if in_parts and len(times) > 1 else style["marker"]
                axis.plot(times, [factor * value for value in values], "--", markerfacecolor="white", **style)
            axis.set(xlabel="epoch", ylabel=f"{key} ({unit})")
            axis.xaxis.get_major_locator().set_params(integer=True)
        marker = "" if in_parts else "o"
        axes[0].plot([], [], "ko-", markersize=4, label="evaluation set")
        axes[0].plot([], [], f"k{marker}--", markersize=4, markerfacecolor="white", label="training set")
        _legend(figure, axes[0])
        return _png(figure)


def _by_epoch(lines: Sequence[Mapping[str, Any]], part: str, key: str) -> tuple[list[float], list[float]]:
    """Epochs and figures of the training or evaluation set."""
    return [line["epoch"] for line in lines], [line[part][key] for line in lines]


def _within_epochs(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Times in epochs and the training set's figures there: each is of the part of an epoch that ends about then."""
    times: list[float] = []
    values: list[float] = []
    for line in lines:
        parts = line["train_curve"][key]
        times += [line["epoch"] - 1 + (i + 1) / len(parts) for i in range(len(parts))]
        values += parts
    return times, values


def draw_confusion(matrix: Sequence[Sequence[int]], label_names: Sequence[str]) -> bytes:
    """Draw a confusion matrix: counts where they fit, coloured by the share of each true class.

    Args:
        matrix: Images by true class (row) and predicted class (column).
        label_names: Names of the classes.
    """
    classes = len(label_names)
    shares = [[100 * count / max(1, sum(row)) for count in row] for row in matrix]
    side = min(9.0, max(4.5, 2.6 + 0.42 * classes))
    with _figure(side + 1, side, label_names) as figure:
        from matplotlib.colors import PowerNorm  # rare confusions show

        axis = figure.subplots()
        image = axis.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
        axis.grid(visible=False)
        step = -(-classes // NAMED_CLASSES)
        named = range(0, classes, step)
        names = [_short(label_names[i], LONGEST_LABEL) for i in named]
        axis.set_xticks(named, names, rotation=90 if step > 1 else 45, ha="center" if step > 1 else "right")
        if step == 1:
            for label in axis.get_xticklabels():
                label.set_rotation_mode("anchor")
        axis.set_yticks(named, names)
        axis.tick_params(labelsize=9 if classes <= COUNTED_CLASSES else 7)
        every = "" if step == 1 else f" (1 of {step} named)"
        axis.set(xlabel=f"predicted class{every}", ylabel=f"true class{every}")
        figure.colorbar(image, label="share of the true class (%)", shrink=0.8)
        if classes <= COUNTED_CLASSES:
            size = min(9.0, 26 / max(len(str(count)) for row in matrix for count in row))
            for i, row in enumerate(matrix):
                for j, count in enumerate(row):
                    colour = "white" if shares[i][j] > 35 else "black"
                    if count:
                        axis.text(j, i, str(count), ha="center", va="center", color=colour, fontsize=size)
        return _png(figure)


def draw_memory_bars(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw the measured peak of a training step, split into its parts, as a bar for each method and engine.

    Args:
        rows: The ``rows`` of :func:`tinytl_hf.measure.memory.to_json`, in bytes.
    """
    with _figure(9.6, 1.8 + 0.34 * len(rows)) as figure:
        axis = figure.subplots()
        left = [0.0] * len(rows)
        for (part, label), colour in zip(MEMORY_PARTS.items(), MEMORY_COLOURS, strict=True):
            widths = [row["peak"].get(part, 0) / MB for row in rows]  # version 0.1 had fewer parts
            if not any(widths):
                continue
            axis.barh(range(len(rows)), widths, 0.7, left=left, label=label, color=colour)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        for i, total in enumerate(left):
            axis.annotate(f"{total:.1f}", (total, i), (4, 0), textcoords="offset points", va="center", fontsize=9)
        axis.set_yticks(range(len(rows)), [f"{row['method']}, {row['engine']}" for row in rows])
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_xlim(0, 1.1 * max(left) or 1)
        axis.set_xlabel("peak of one training step, measured (MB of 1e6 bytes)")
        axis.grid(axis="y", visible=False)
        _legend(figure, axis)
        return _png(figure)


def draw_accuracy_memory(points: Sequence[AccuracyMemory]) -> bytes:
    """Draw accuracy on the evaluation set against measured memory: up and to the left is better.

    A hollow marker is the memory of stock PyTorch, and a line leads from it to that of the run.
    """
    names = [point.name for point in points]
    with _figure(6.4, 4.4 + 0.25 * _legend_rows(names), names) as figure:
        axis = figure.subplots()
        rightmost = 0.0
        for i, point in enumerate(points):
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            error = None if point.std is None else 100 * point.std
            peak, accuracy = point.peak_mb, 100 * point.accuracy
            stock = peak if point.stock_peak_mb is None else point.stock_peak_mb
            axis.plot([stock, peak], [accuracy, accuracy], ":", color=colour, linewidth=1)
            axis.plot(stock, accuracy, marker, color=colour, markerfacecolor="white")
            axis.errorbar(
                peak, accuracy, error, label=_short(point.name), color=colour, marker=marker, linestyle="", capsize=4
            )
            rightmost = max(rightmost, stock, peak)
        axis.set_xlim(0, 1.1 * rightmost)
        axis.margins(y=0.15)
        axis.set(xlabel="peak of one training step, measured (MB of 1e6 bytes)", ylabel="accuracy, evaluation set (%)")
        if any(point.stock_peak_mb is not None for point in points):
            axis.plot([], [], "ko:", markersize=4, linewidth=1, markerfacecolor="white", label="in stock PyTorch")
        _legend(figure, axis)
        return _png(figure)


@contextmanager
def _figure(width: float, height: float, names: Iterable[str] = ()) -> Iterator[Figure]:
    """A figure of about so many inches, in the style of all; labels are taken as they are, dollars too.

    Args:
        width: Inches.
        height: Inches.
        names: Text in it that is not ours, which can be of any script.
    """
    matplotlib = _matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {
            "text.parse_math": False,
            "font.family": families_for(names),
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.alpha": 0.3,
        }
    ):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def _png(figure: Figure) -> bytes:
    """What its file holds."""
    file = io.BytesIO()
    metadata = {"Software": SOFTWARE}
    figure.savefig(file, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.1, metadata=metadata)  # all labels
    return file.getvalue()


def _matplotlib() -> ModuleType:
    """Matplotlib, whatever MPLBACKEND says: pictures here need no backend, and a name of none would end the import."""
    backend = os.environ.get("MPLBACKEND")
    if backend is None or "matplotlib" in sys.modules:
        return import_module("matplotlib")
    del os.environ["MPLBACKEND"]
    try:
        matplotlib = import_module("matplotlib")
    finally:
        os.environ["MPLBACKEND"] = backend
    with suppress(ValueError):  # for whoever else draws in this process
        matplotlib.rcParams["backend"] = backend
    return matplotlib


def _legend(figure: Figure, axis: Axes) -> None:
    """Below the axes, so that it hides nothing."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=_columns(labels), frameon=False, fontsize=9)


def _columns(labels: Sequence[str]) -> int:
    return 3 if max(map(len, labels), default=0) <= LONGEST_NAME // 2 else 2


def _legend_rows(names: Collection[str]) -> int:
    """Lines of a legend of these names and two more entries."""
    return -(-(len(names) + 2) // _columns([_short(name) for name in names]))


def _short(name: str, longest: int = LONGEST_NAME) -> str:
    """The name on one line, with its middle left out if it is too long: names often differ at an end."""
    name = one_line(name)
    kept = (longest - 3) // 2
    return name if len(name) <= longest else f"{name[:kept]}...{name[-kept:]}"
