"""What runs when a user names nothing but a folder."""

import logging

import pytest
import yaml
from shared import METHODS, run_cli, small_run
from started_runs import metrics

from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.recipe import LEARNING_RATES, describe, epochs_for, resolve
from tinytl_hf.config.run import Config
from tinytl_hf.config.train import TrainConfig
from tinytl_hf.train import time_left
from tinytl_hf.train.time_left import TimeLeft, about


def test_small_sets_are_seen_more_often_within_bounds():
    assert [epochs_for(images) for images in (24, 500, 2_000, 10_000, 48_000)] == [20, 20, 10, 6, 6]


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_fills_in_what_is_open_and_nothing_else(method):
    asked = Config(method=method)
    settled = resolve(asked, 2_000)
    assert settled.train.plan == (LEARNING_RATES[method], 10)
    assert resolve(Config(method=method, train=TrainConfig(lr=0.5, epochs=3)), 2_000).train.plan == (0.5, 3)
    smoothing = 0.1 if method in ("TinyTL-L", "TinyTL-L+B") else 0.0
    assert settled.train.smoothing == smoothing
    assert resolve(Config(method=method, train=TrainConfig(label_smoothing=0.0)), 2_000).train.smoothing == 0.0
    assert describe(asked, settled, 2_000, 63) == (
        f"lr {LEARNING_RATES[method]:g} (suits {method}), 10 epochs (suits 2,000 images) of 63 steps, cosine, "
        f"warm-up 0.5 epochs{f', label smoothing 0.1 (suits {method})' if smoothing else ''}"
    )


def test_a_warm_up_that_is_longer_than_the_epochs_that_suit_is_refused():
    with pytest.raises(Exception, match=r"train.warmup_epochs=25.0: .* less than train.epochs=10"):
        resolve(Config(train=TrainConfig(warmup_epochs=25.0)), 2_000)


def test_a_run_says_what_it_chose_keeps_it_and_ends_with_the_next_commands(colour_folder, tmp_path):
    options = small_run(colour_folder, tmp_path / "my run", "--method", "FT-Last", "--data.max_eval_samples", "2")
    at = options.index("--train.epochs")
    done = run_cli(*options[:at], *options[at + 2 :])
    assert done.returncode == 0, done.stderr
    assert "lr 0.001 (suits FT-Last), 20 epochs (suits 24 images) of 3 steps, cosine" in done.stderr
    saved = yaml.safe_load((tmp_path / "my run" / "config.yaml").read_text())["train"]
    assert (saved["lr"], saved["epochs"], len(metrics(tmp_path / "my run"))) == (0.001, 20, 20)
    assert "epoch 19: " in done.stderr and " s left" in done.stderr
    lines = done.stdout.splitlines()[-4:]
    folder = f"'{tmp_path / 'my run'}"
    assert lines == [
        "next:",
        f"  tinytl-hf predict --adapter {folder}/adapter' IMAGE",
        f"  tinytl-hf report {folder}' --html",
        f"  tinytl-hf push --adapter {folder}/adapter' --repo USER/NAME --private",
    ]


def test_training_without_data_is_refused_and_nothing_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_cli("train")
    assert done.returncode == 1 and "error: data.dataset: missing; name a folder of images" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_gets_no_better_stops_and_goes_on_with_more_patience(colour_folder, tmp_path):
    options = small_run(colour_folder, tmp_path / "run", "--method", "FT-Last", "--train.lr", "1e-12")
    options[options.index("--train.epochs") + 1] = "9"
    options += ["--adapter.keep", "last"]
    done = run_cli(*options, "--train.patience", "2")
    assert done.returncode == 0, done.stderr
    assert len(metrics(tmp_path / "run")) == 3
    stopped = (
        "stopped after epoch 3: no better accuracy in 2 epochs; of 9 epochs, which the cosine schedule would span"
    )
    assert stopped in done.stderr
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "of the last epoch, after which patience ended the run by the figures on test, as the figures are" in card
    for patience, epochs in (("2", 3), ("4", 5)):
        done = run_cli(*options, "--train.patience", patience, "--train.resume", "auto")
        assert done.returncode == 0, done.stderr
        assert len(metrics(tmp_path / "run")) == epochs and ": 3 epochs and 9 steps are done\n" in done.stderr


def test_what_is_left_is_said_once_in_the_first_minute_and_grows_with_the_images(monkeypatch, caplog):
    clock = [100.0]
    monkeypatch.setattr(time_left.time, "perf_counter", lambda: clock[0])
    data = DataConfig(start_size=32, train_size=64)
    left = TimeLeft(Config(data=data, train=TrainConfig(lr=1e-3, epochs=2)))  # of 32 and then 64 px: work of 1 and 4
    assert left.after_epoch(0) == ""  # resumed for its evaluation
    with caplog.at_level(logging.INFO):
        for step in range(1, 21):  # 2 s each
            clock[0] += 2
            left.after_step(0, step / 20)
    assert [record.message for record in caplog.records] == ["about 3 min of training left, and the evaluations"]
    clock[0] += 10  # the evaluation
    # 17 of 20 steps and the evaluation took 44 s; there is four times as much work to come, of 20 such steps.
    assert left.after_epoch(0) == "; about 3 min left" and about(4 / (17 / 20) * 44) == "about 3 min"
    assert left.after_epoch(1) == ""
    assert [about(s) for s in (0.2, 89, 90, 600, 8_000)] == [
        *("about 1 s", "about 89 s", "about 2 min", "about 10 min", "about 2.2 h")
    ]
