"""What is measured on the evaluation set: one ``evaluate.Metric`` of ours, which needs no network, and the Hub's."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.special import logsumexp, softmax
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, recall_score

from tinytl_hf.errors import TinyTLError, first_line, one_line

CALIBRATION_BINS = 15


class ClassificationFigures(evaluate.Metric):
    """All figures of an image classifier from its logits ``[N, classes]`` and class numbers ``[N]``.

    Given at once they go from arrays to figures; ``add_batch`` and then ``compute()`` work as for any module of
    ``evaluate``. Shares are fractions in [0, 1].
    """

    def __init__(self) -> None:
        # Though it keeps all in memory, it makes a folder; the cache of the Hub's client can be one that is only read.
        with tempfile.TemporaryDirectory(prefix="tinytl-metric-") as folder:
            super().__init__(keep_in_memory=True, cache_dir=folder)

    def _info(self) -> evaluate.MetricInfo:
        logits, number = datasets.List(datasets.Value("float32")), datasets.Value("int64")
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            inputs_description="predictions: logits, references: class numbers; tables: whether to add the tables",
            features=datasets.Features({"predictions": logits, "references": number}),
        )

    def compute(self, *, predictions: Any = None, references: Any = None, **options: Any) -> dict[str, Any]:
        """The figures; ``tables=True`` adds accuracy by class and the confusion matrix."""
        if predictions is None:
            return dict(super().compute(**options))
        return self._compute(predictions, references, **options)

    def _compute(self, predictions: Any, references: Any, tables: bool = False) -> dict[str, Any]:
        logits, labels = np.asarray(predictions, dtype=np.float32), np.asarray(references, dtype=np.int64)
        answers = logits.argmax(1)
        figures = {
            "accuracy": float(accuracy_score(labels, answers)),
            "balanced_accuracy": balanced_accuracy(answers, labels),
            "top5": top_five(logits, labels),
            "f1": float(f1_score(labels, answers, average="macro", zero_division=0.0)),
            "loss": cross_entropy(logits, labels),
            "ece": calibration_error(logits, labels),
        }
        return {**figures, **class_tables(answers, labels, logits.shape[1])} if tables else figures


def balanced_accuracy(answers: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes that have images of the share of each that is right: large classes count no more."""
    return float(recall_score(labels, answers, labels=np.unique(labels), average="macro", zero_division=0.0))


def top_five(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose class is among the five most likely; 1 where there are at most five classes."""
    best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    return float((best == labels[:, None]).any(1).mean())


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Cross entropy without label smoothing, in nats an image."""
    of_label = logits[np.arange(len(labels)), labels].astype(np.float64)
    return float((logsumexp(logits.astype(np.float64), axis=1) - of_label).mean())


def calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error over 15 equal bins of confidence (Guo et al. 2017, arXiv 1706.04599)."""
    probabilities = softmax(logits.astype(np.float64), axis=1)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = [abs(right[bins == i].sum() - confidence[bins == i].sum()) for i in range(CALIBRATION_BINS)]
    return float(sum(gaps) / len(labels))


def class_tables(answers: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, Any]:
    """Images by true class (row) and predicted class (column), and accuracy by class, None for one without images."""
    matrix = confusion_matrix(labels, answers, labels=range(classes))
    pairs = zip(matrix.diagonal(), matrix.sum(1), strict=True)
    by_class = [float(right / count) if count else None for right, count in pairs]
    return {"per_class_accuracy": by_class, "confusion_matrix": matrix.tolist()}


def load_metrics(names: Sequence[str]) -> dict[str, evaluate.EvaluationModule]:
    """Load metrics of the Hub's ``evaluate`` modules, and try each on three answers.

    Args:
        names: Names such as ``f1``, or paths of metric scripts.

    Raises:
        TinyTLError: There is no such metric, a package that it needs is missing, or it is not one of class numbers; or
            Python runs without docstrings, which no figure can be had without.
    """
    if sys.flags.optimize > 1:
        raise TinyTLError(
            f"PYTHONOPTIMIZE={sys.flags.optimize}: it takes out docstrings, as python -OO does, which the package "
            "evaluate needs; use 1, or unset it"
        )
    metrics = {}
    for name in names:
        try:
            metrics[name] = evaluate.load(name, keep_in_memory=True)
        except (OSError, ImportError, ValueError, AttributeError) as error:
            raise TinyTLError(
                f"metrics: {name} cannot be loaded ({first_line(error)}); use a name that evaluate.load knows and "
                "this machine can reach, or the path of a metric script"
            ) from error
        try:
            _extra_figures(metrics[name], np.array([0, 1, 2]), np.array([0, 2, 1]))
        except Exception as error:  # whatever the script raises
            raise TinyTLError(
                f"metrics: {name} does not score class numbers ({one_line(error)}); use one like accuracy, f1 or "
                "precision"
            ) from error
    return metrics


def _extra_figures(metric: evaluate.EvaluationModule, answers: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Figures of one of the Hub's metrics; those that are of one class at a time are averaged over the classes."""
    averages = {"average": "macro"} if "average" in signature(metric._compute).parameters else {}
    results = metric.compute(predictions=answers, references=labels, **averages)
    return {f"evaluate_{key}": float(value) for key, value in results.items()}


def compute_metrics(
    logits: np.ndarray,
    labels: np.ndarray,
    tables: bool = False,
    extra: Mapping[str, evaluate.EvaluationModule] | None = None,
) -> dict[str, Any]:
    """Compute all scalar figures.

    Args:
        logits: ``[N, classes]``.
        labels: ``[N]`` class numbers.
        tables: Add accuracy by class and the confusion matrix.
        extra: More metrics, of :func:`load_metrics`; their figures are called ``evaluate_...``.
    """
    figures = ClassificationFigures().compute(predictions=logits, references=labels, tables=tables)
    for loaded in (extra or {}).values():
        figures.update(_extra_figures(loaded, logits.argmax(1), labels))
    return figures
