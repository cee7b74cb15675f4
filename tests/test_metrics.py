import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, top_k_accuracy_score

from tinytl_hf.metrics import CalibrationError, Loss, PerClassAccuracy, TopFive, compute_metrics


@pytest.fixture
def scored():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 12, 257)
    logits = rng.normal(size=(257, 12)).astype(np.float32)
    logits[np.arange(257), labels] += 1.5
    return logits, labels


def test_figures_agree_with_scikit_learn_and_torch(scored):
    logits, labels = scored
    figures = compute_metrics(logits, labels, tables=True)
    predicted = logits.argmax(1)
    assert figures["accuracy"] == accuracy_score(labels, predicted)
    assert figures["top5"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5))
    assert figures["f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    loss = torch.nn.functional.cross_entropy(torch.tensor(logits, dtype=torch.float64), torch.tensor(labels))
    assert figures["loss"] == pytest.approx(loss.item(), rel=1e-9)
    matrix = np.array(figures["confusion_matrix"])
    assert matrix.sum() == 257 and np.trace(matrix) == (predicted == labels).sum()
    assert matrix[3, 5] == ((labels == 3) & (predicted == 5)).sum()
    assert figures["per_class_accuracy"][7] == pytest.approx((predicted[labels == 7] == 7).mean())


def test_calibration_error_of_a_known_case():
    # 10 predictions of confidence 0.8, of which 6 are right: |0.6 - 0.8| = 0.2
    logits = np.tile(np.log([0.8, 0.2]).astype(np.float32), (10, 1))
    labels = np.array([0] * 6 + [1] * 4)
    assert CalibrationError().compute(predictions=logits, references=labels)["ece"] == pytest.approx(0.2, abs=1e-6)


def test_extremes():
    logits = np.array([[1000.0, -1000.0], [-1000.0, 1000.0]], dtype=np.float32)
    assert Loss().compute(predictions=logits, references=[0, 1])["loss"] == pytest.approx(0, abs=1e-9)
    assert TopFive().compute(predictions=logits, references=[1, 0])["top5"] == 1.0  # two classes
    per_class = PerClassAccuracy().compute(predictions=logits, references=[0, 0])["per_class_accuracy"]
    assert per_class == [0.5, None]
