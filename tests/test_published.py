"""The published runs hold together: cards, raw figures and the budget that they share."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from shared import ROOT

from tinytl_hf.network.methods import METHODS
from tinytl_hf.reports.finished_run import read_run

CARDS = ROOT / "model_cards"


@pytest.mark.parametrize("method", METHODS)
def test_a_card_is_valid_and_says_what_its_run_measured(method):
    run = read_run(CARDS / "runs" / method / "seed0")
    card = ModelCard.load(CARDS / method / "README.md")
    (accuracy,) = [result for result in card.data.eval_results if result.metric_type == "accuracy"]
    assert accuracy.metric_value == run.results["accuracy"] == run.epochs[-1]["eval"]["accuracy"]
    matrix = run.results["confusion_matrix"]
    right = sum(row[i] for i, row in enumerate(matrix))
    assert run.results["n"] == sum(map(sum, matrix)) == 10_000 and right / 10_000 == run.results["accuracy"]
    assert json.loads((CARDS / method / "eval_results.json").read_text()) == run.results
    linked = re.findall(r"\]\((?!http)([^)]+)\)", card.text)
    assert len(linked) == 3 and all((CARDS / method / name).is_file() for name in linked)


def test_all_runs_have_one_budget_and_differ_in_method_seed_and_learning_rate():
    budgets = []
    for path in sorted(CARDS.glob("runs/*/*/config.yaml")):
        config = yaml.safe_load(path.read_text())
        assert f"{config.pop('method')}/seed{config.pop('seed')}" == f"{path.parts[-3]}/{path.parts[-2]}"
        del config["output_dir"], config["train"]["lr"]
        assert config["memory"].pop("report") == (path.parts[-2] == "seed0")  # memory is measured once a method
        budgets.append(config)
    assert len(budgets) == 3 * len(METHODS) and all(budget == budgets[0] for budget in budgets)


def test_neither_weights_nor_a_machines_own_paths_are_published():
    for path in CARDS.rglob("*"):
        assert path.suffix not in (".safetensors", ".pt", ".pth", ".bin")
        if path.suffix in (".json", ".jsonl", ".yaml", ".md", ".csv"):
            assert not re.search(r"(?<![\w.:/])/(?!/)\w+/", path.read_text()), path
