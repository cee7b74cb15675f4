"""What is measured on the evaluation set, as ``evaluate.Metric`` modules that need no network.

Each takes logits as predictions and class numbers as references, and gives fractions in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.special import logsumexp, softmax
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from tinytl_hf.errors import TinyTLError

CALIBRATION_BINS = 15


class LogitsMetric(evaluate.Metric):
    """A metric of logits ``[N, classes]`` and class numbers ``[N]``."""

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            inputs_description="predictions: logits, references: class numbers",
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.Value("float32")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, Any]:
        return self.figures(np.asarray(predictions), np.asarray(references))

    def figures(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """The metric's values by name."""
        raise NotImplementedError


class Accuracy(LogitsMetric):
    """Share of images whose most likely class is right."""

    def figures(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """``accuracy``."""
        return {"accuracy": float(accuracy_score(labels, logits.argmax(1)))}


class TopFive(LogitsMetric):
    """Share of images whose class is among the five most likely."""

    def figures(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """``top5``; 1 where there are at most five classes."""
        best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
        return {"top5": float((best == labels[:, None]).any(1).mean())}


class MacroF1(LogitsMetric):
    """F1 score of each class, averaged over the classes that occur."""

    def figures(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """``f1``."""
        return {"f1": float(f1_score(labels, logits.argmax(1), average="macro", zero_division=0.0))}


class PerClassAccuracy(LogitsMetric):
    """Share of each class's images that are recognised."""

    def figures(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """``per_class_accuracy``: a value a class, null for a class without images."""
        matrix = confusion_matrix(labels, logits.argmax(1), labels=range(logits.shape[1]))
        counts = matrix.sum(1)
        return {
            "per_class_accuracy": [
                float(right / count) if count else None for right, count in zip(matrix.diagonal(), counts, strict=True)
            ]
        }


class ConfusionMatrix(LogitsMetric):
    """Images by true class (row) and predicted class (column)."""

    def figures(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """``confusion_matrix``: rows of counts."""
        matrix = confusion_matrix(labels, logits.argmax(1), labels=range(logits.shape[1]))
        return {"confusion_matrix": matrix.tolist()}


class Loss(LogitsMetric):
    """Cross entropy without label smoothing, in nats an image."""

    def figures(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """``loss``."""
        of_label = logits[np.arange(len(labels)), labels].astype(np.float64)
        return {"loss": float((logsumexp(logits.astype(np.float64), axis=1) - of_label).mean())}


class CalibrationError(LogitsMetric):
    """Expected calibration error over 15 equal bins of confidence (Guo et al. 2017, arXiv 1706.04599)."""

    def figures(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """``ece``."""
        probabilities = softmax(logits.astype(np.float64), axis=1)
        confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
        bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
        gaps = [abs(right[bins == i].sum() - confidence[bins == i].sum()) for i in range(CALIBRATION_BINS)]
        return {"ece": float(sum(gaps) / len(labels))}


SCALARS = (Accuracy, TopFive, MacroF1, Loss, CalibrationError)
TABLES = (PerClassAccuracy, ConfusionMatrix)


def load_metrics(names: Sequence[str]) -> dict[str, evaluate.EvaluationModule]:
    """Load metrics of the Hub's ``evaluate`` modules, and try each on three answers.

    Args:
        names: Names such as ``f1``, or paths of metric scripts.

    Raises:
        TinyTLError: There is no such metric, a package that it needs is missing, or it is not one of class numbers.
    """
    metrics = {}
    for name in names:
        try:
            metrics[name] = evaluate.load(name, keep_in_memory=True)
        except (OSError, ImportError, ValueError, AttributeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise TinyTLError(
                f"metrics: {name} cannot be loaded ({reason}); use a name that evaluate.load knows and this "
                "machine can reach, or the path of a metric script"
            ) from error
        try:
            _extra_figures(metrics[name], np.array([0, 1, 2]), np.array([0, 2, 1]))
        except Exception as error:  # whatever the script raises
            reason = " ".join(str(error).split())
            raise TinyTLError(
                f"metrics: {name} does not score class numbers ({reason}); use one like accuracy, f1 or precision"
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
    figures: dict[str, Any] = {}
    for metric in SCALARS + (TABLES if tables else ()):
        figures.update(metric().compute(predictions=logits, references=labels))
    for loaded in (extra or {}).values():
        figures.update(_extra_figures(loaded, logits.argmax(1), labels))
    return figures
