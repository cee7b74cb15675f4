import json

import numpy as np
import pytest
import torch
from shared import ROOT, run_cli, small_run
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, top_k_accuracy_score

from tinytl_hf import TinyTLError
from tinytl_hf.measure.metrics import ClassificationFigures, compute_metrics, load_metrics

F1_SCRIPT = str(ROOT / "tests" / "evaluate_f1.py")


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


def test_balanced_accuracy_is_scikit_learns_whatever_class_is_guessed_without_images():
    labels, answers = np.array([0] * 8 + [1] * 2), np.array([0] * 8 + [0, 1])
    figures = compute_metrics(np.eye(3, dtype=np.float32)[answers], labels)
    assert (
        figures["accuracy"] == 0.9 and figures["balanced_accuracy"] == balanced_accuracy_score(labels, answers) == 0.75
    )
    with_a_third = compute_metrics(np.eye(3, dtype=np.float32)[np.array([2] * 4 + [0] * 4 + [1] * 2)], labels)
    assert with_a_third["balanced_accuracy"] == 0.75


def test_calibration_error_of_a_known_case():
    # 10 predictions of confidence 0.8, of which 6 are right: |0.6 - 0.8| = 0.2
    logits = np.tile(np.log([0.8, 0.2]).astype(np.float32), (10, 1))
    labels = np.array([0] * 6 + [1] * 4)
    assert compute_metrics(logits, labels)["ece"] == pytest.approx(0.2, abs=1e-6)


def test_extremes():
    logits = np.array([[1000.0, -1000.0], [-1000.0, 1000.0]], dtype=np.float32)
    assert compute_metrics(logits, np.array([0, 1]))["loss"] == pytest.approx(0, abs=1e-9)
    assert compute_metrics(logits, np.array([1, 0]))["top5"] == 1.0  # two classes
    per_class = compute_metrics(logits, np.array([0, 0]), tables=True)["per_class_accuracy"]
    assert per_class == [0.5, None]


def test_our_metric_is_a_module_of_evaluate_that_takes_batches_too(scored):
    logits, labels = scored
    module = ClassificationFigures()
    for part in (slice(0, 100), slice(100, 257)):
        module.add_batch(predictions=logits[part], references=labels[part])
    assert module.compute() == compute_metrics(logits, labels)


def test_a_metric_of_the_hubs_kind_agrees_with_ours(scored):
    figures = compute_metrics(*scored, extra=load_metrics([F1_SCRIPT]))
    assert figures["evaluate_f1"] == figures["f1"] == pytest.approx(0.6, abs=0.2)


def test_a_metric_that_is_missing_or_of_something_else_is_named(tmp_path):
    with pytest.raises(TinyTLError, match=r"metrics: no_such_metric cannot be loaded \(.*path of a metric script"):
        load_metrics(["no_such_metric"])
    script = (ROOT / "tests" / "evaluate_f1.py").read_text()
    (tmp_path / "other.py").write_text(script.replace("return {", 'return {"words": "high", '))
    with pytest.raises(TinyTLError, match=r"other.py does not score class numbers \(could not convert"):
        load_metrics([str(tmp_path / "other.py")])
    (tmp_path / "needs.py").write_text(script.replace("import evaluate", "import evaluate\nimport no_such_package"))
    with pytest.raises(TinyTLError, match=r"needs.py cannot be loaded .*no_such_package"):
        load_metrics([str(tmp_path / "needs.py")])


def test_more_metrics_land_in_the_files_of_the_run_and_a_missing_one_stops_it_before_it_starts(
    colour_folder, tmp_path
):
    options = small_run(colour_folder, tmp_path / "run", "--method", "FT-Last", "--train.epochs", "1")
    done = run_cli(*options, "--metrics", "[no_such_metric]")
    assert done.returncode == 1 and "metrics: no_such_metric cannot be loaded" in done.stderr
    assert not (tmp_path / "run").exists()
    done = run_cli(*options, "--metrics", f"[{F1_SCRIPT}]")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert results["evaluate_f1"] == results["f1"] == line["eval"]["evaluate_f1"]
    assert f"evaluate_f1       {results['f1']:.4f}" in done.stdout
    again = ("eval", "--adapter", tmp_path / "run" / "adapter", "--metrics", f"[{F1_SCRIPT}]")
    done = run_cli(*again, "--output", tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text())["evaluate_f1"] == results["evaluate_f1"]
