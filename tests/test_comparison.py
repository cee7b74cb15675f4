"""The script of the published comparison, on a small data set in place of CIFAR-10."""

import json
import runpy
import shutil
import subprocess
import sys

import pytest
import yaml
from shared import ROOT, run_cli


def test_tuning_takes_the_best_learning_rate_of_finished_runs_and_trains_none_of_them_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_cards").mkdir()
    accuracy = {"0.001": 0.5, "0.003": 0.75, "0.01": 0.625}
    for rate, figure in accuracy.items():
        run = tmp_path / "runs" / "comparison" / "FT-Last" / f"lr{rate}"
        (run / "adapter").mkdir(parents=True)
        for folder in (run, run / "adapter"):
            (folder / "eval_results.json").write_text(json.dumps({"accuracy": figure}))
    monkeypatch.setattr(sys, "argv", ["comparison.py", "tune", "--methods", "FT-Last"])
    monkeypatch.syspath_prepend(ROOT / "model_cards")
    runpy.run_path(str(ROOT / "model_cards" / "comparison.py"), run_name="__main__")
    tuned = json.loads((tmp_path / "model_cards" / "tuning.json").read_text())
    assert tuned == {"FT-Last": {"best": 0.003, "accuracy": accuracy}}


@pytest.mark.slow
def test_runs_of_the_defaults_are_published_without_the_place_of_their_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = ROOT / "model_cards" / "runs"
    for method, name in (
        ("TinyTL-L+B", "TinyTL-L+B/seed0"),
        ("TinyTL-L+B", "last6/seed0"),
        ("FT-Full", "FT-Full/seed0"),
    ):
        run = tmp_path / "runs" / "defaults" / "caltech101" / "mobilenet_v2" / name
        shutil.copytree(source / method / "seed0", run)
        (run / "adapter").mkdir()
        shutil.move(run / "eval_results.json", run / "adapter")
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["data"]["dataset"] = str(tmp_path / "place" / "caltech101")
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "adapter" / "eval_results.json").unlink()  # as of a run that is not finished
    monkeypatch.setattr(sys, "argv", ["defaults.py", "publish", "caltech101"])
    runpy.run_path(str(ROOT / "model_cards" / "defaults.py"), run_name="__main__")
    published = tmp_path / "model_cards" / "defaults" / "caltech101"
    assert {path.parent.parent.name for path in published.rglob("metrics.jsonl")} == {"TinyTL-L+B", "last6"}
    assert not [p for p in published.rglob("*") if p.is_file() and str(tmp_path).encode() in p.read_bytes()]
    assert "caltech101" in (published / "mobilenet_v2/last6/seed0/config.yaml").read_text()
    accuracy = json.loads((source / "TinyTL-L+B" / "seed0" / "eval_results.json").read_text())["accuracy"]
    table = (published / "compare.md").read_text()
    assert f"| {100 * accuracy:.2f} | 1 |" in table and "2 runs of 1 seed" in table  # one seed twice has no deviation
    assert (published / "accuracy_memory.png").is_file()


@pytest.mark.parametrize("name", ["caltech101", "cifar10_10000"])
def test_the_runs_of_the_defaults_are_those_that_are_told(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "model_cards")
    from defaults import plan

    runs = plan(name)
    assert len(runs) == 7 * 3 + 2 * 4 + 3 * 3
    for folder in (f"{name}/tf_efficientnet_lite0/TinyTL-B/seed0", f"{name}/mobilenet_v2/last6/seed2"):
        done = run_cli("train", *runs[folder], "--data.dataset", "path", "--print_config")
        assert done.returncode == 0, done.stderr
        told = yaml.safe_load(done.stdout)
        assert told["adapter"]["keep"] == "last" and told["train"]["lr"] is told["train"]["epochs"] is None
    assert (told["method"], told["trained_blocks"], told["seed"]) == ("TinyTL-L+B", 6, 2)


@pytest.mark.slow
def test_the_comparison_tunes_trains_and_publishes_and_repeats_nothing(colour_folder, tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "model_cards").mkdir()
    small = ["--data.dataset", str(colour_folder), "--data.train_size", "32", "--data.eval_size", "64"]
    small += ["--backbone.weights", "none", "--train.global_batch_size", "8"]

    def step(name, *options):
        words = [sys.executable, ROOT / "model_cards" / "comparison.py", name, *options]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    step("tune", "--methods", "FT-Last", *small)
    (tuned,) = json.loads((tmp_path / "model_cards" / "tuning.json").read_text()).values()
    assert len(tuned["accuracy"]) == 3 and tuned["accuracy"][f"{tuned['best']:g}"] == max(tuned["accuracy"].values())
    config = yaml.safe_load((tmp_path / "runs/comparison/FT-Last/lr0.01/config.yaml").read_text())
    assert config["data"]["eval_split"] == "holdout" and config["train"]["epochs"] == 1

    step("run", "--methods", "FT-Last", "--seeds", "0", *small)
    assert "train loss" not in step("run", "--methods", "FT-Last", "--seeds", "0", *small).stderr
    run = tmp_path / "runs/comparison/FT-Last/seed0"
    for name in ("memory.json", "adapter/eval_results.json"):  # as if stopped in the run's last second
        (run / name).unlink()
    assert "train loss" not in step("run", "--methods", "FT-Last", "--seeds", "0", *small).stderr
    printed = step("publish").stdout
    published = tmp_path / "model_cards"
    assert {path.name for path in (published / "FT-Last").iterdir()} == {
        *("README.md", "eval_results.json", "curves.png", "confusion_matrix.png")
    }
    memory = json.loads((published / "runs/FT-Last/seed0/memory.json").read_text())
    assert {row["engine"] for row in memory["rows"]} == {"lean", "stock"}
    (row,) = json.loads((published / "comparison" / "compare.json").read_text())["rows"]
    assert row["peak_mb"] > 9 and row["stock_peak_mb"] > 9 and row["runs"] == ["model_cards/runs/FT-Last/seed0"]
    picture = published / "FT-Last" / "curves.png"
    drawn = picture.read_bytes()
    picture.unlink()
    step("draw")
    assert picture.read_bytes() == drawn
    assert printed.startswith("method") and not list(published.rglob("*.safetensors"))
