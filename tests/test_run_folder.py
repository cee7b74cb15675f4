"""A run's folder while the run is at work and when it goes on: taken away, shared, moved or copied."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from shared import run_cli, slow, small_run
from started_runs import as_launched, checkpoints, free_port, metrics

from tinytl_hf.config.run import Config
from tinytl_hf.train import loop, start
from tinytl_hf.train.output_dir import claimed

OPTIONS = ["--method", "FT-Last", "--train.threads", "1", "--train.schedule", "constant"]


@pytest.fixture(scope="module")
def original(colour_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("run_folder") / "run"
    options = [*OPTIONS, "--train.epochs", "3", "--train.keep_checkpoints", "9"]
    assert run_cli(*small_run(colour_folder, output, *options)).returncode == 0
    return output


@pytest.fixture
def finished(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run")


def go_on(data, output, resume="auto", *options):
    return run_cli(*small_run(data, output, *OPTIONS, "--train.resume", resume, *options))


def test_a_folder_that_another_run_works_in_is_refused_and_free_after_it(finished, colour_folder):
    with claimed(Config(output_dir=str(finished), overwrite=True)):
        for options in (["--train.epochs", "4"], ["--train.resume", "never", "--overwrite", "true"]):
            done = go_on(colour_folder, finished, "auto", *options)
            assert done.returncode == 1 and f"output_dir={finished}: another run is at work in it" in done.stderr
    assert len(metrics(finished)) == 3
    done = go_on(colour_folder, finished, "auto", "--train.epochs", "4")
    assert done.returncode == 0 and len(metrics(finished)) == 4, done.stderr
    assert not (finished / ".lock").exists()


@pytest.mark.parametrize("began_at", [0, 1])
def test_what_another_run_did_while_this_one_was_set_up_is_not_cleared(
    began_at, finished, colour_folder, tmp_path, monkeypatch
):
    output, find = tmp_path / "going", start.checkpoint.find
    if began_at:
        shutil.copytree(finished, output)
        for path in checkpoints(output)[began_at:]:
            shutil.rmtree(path)

    def find_and_wait(config):
        found = find(config)
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(finished, output)  # the other run ends meanwhile
        return found

    monkeypatch.setattr(start.checkpoint, "find", find_and_wait)
    before = [path.name for path in checkpoints(finished)]
    done = go_on(colour_folder, output, "auto", "--train.epochs", "4")
    assert done.returncode == 1 and "another run went on in it while this one was set up" in done.stderr
    assert [path.name for path in checkpoints(output)] == before and (output / "eval_results.json").is_file()
    monkeypatch.undo()
    done = go_on(colour_folder, output, "auto", "--train.epochs", "4")
    assert done.returncode == 0 and len(metrics(output)) == 4, done.stderr


def test_a_folder_that_is_taken_away_ends_the_run_and_does_not_come_back_by_half(colour_folder, tmp_path, monkeypatch):
    output, finish = tmp_path / "run", loop.finish_epoch

    def and_take_away(run, figures):
        finish(run, figures)
        shutil.rmtree(output)

    monkeypatch.setattr(loop, "finish_epoch", and_take_away)
    done = run_cli(*small_run(colour_folder, output, *OPTIONS, "--train.epochs", "3"))
    assert done.returncode == 1 and "the folder is gone" in done.stderr.splitlines()[-1]
    assert not output.exists()


def test_checkpoints_that_were_moved_and_linked_go_on_with_all_figures(finished, colour_folder, tmp_path):
    (finished / "checkpoints").rename(tmp_path / "on_another_disk")
    (finished / "checkpoints").symlink_to(tmp_path / "on_another_disk")
    before = metrics(finished)
    assert go_on(colour_folder, finished, "auto", "--train.epochs", "4").returncode == 0
    assert metrics(finished)[:3] == before and len(metrics(finished)) == 4


def as_if_the_second_epoch_was_best(run):
    lines = metrics(run)
    lines[1]["eval"]["accuracy"] = 2.0
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    second = next(path for path in checkpoints(run) if path.name.endswith("epoch_0002"))
    progress = json.loads((checkpoints(run)[-1] / "progress.json").read_text())
    progress["progress"]["best_accuracy"] = 2.0
    (checkpoints(run)[-1] / "progress.json").write_text(json.dumps(progress))
    loop.checkpoint._seal(checkpoints(run)[-1])
    return load_file(second / "delta.safetensors")


def test_the_best_adapter_comes_along_into_another_folder(finished, colour_folder, tmp_path):
    best = as_if_the_second_epoch_was_best(finished)
    tensors = load_file(finished / "adapter" / "adapter_model.safetensors")
    shutil.copy(finished / "adapter" / "adapter_model.safetensors", tmp_path / "best.safetensors")
    done = go_on(colour_folder, tmp_path / "new", checkpoints(finished)[-1], "--train.epochs", "4")
    assert done.returncode == 0 and len(metrics(tmp_path / "new")) == 4, done.stderr
    kept = load_file(tmp_path / "new" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in tensors.items())
    shutil.rmtree(finished / "adapter")  # the best is nowhere: the choice begins anew
    done = go_on(colour_folder, tmp_path / "other", checkpoints(finished)[-1], "--train.epochs", "4")
    kept = load_file(tmp_path / "other" / "adapter" / "adapter_model.safetensors")
    assert done.returncode == 0 and not all(torch.equal(kept[name], best[name]) for name in kept)


@pytest.mark.parametrize("text", ['{"loss": 1.0}\n', "no json\n"])
def test_a_copied_checkpoint_does_not_take_over_what_lies_beside_it(text, finished, colour_folder, tmp_path):
    copy = shutil.copytree(checkpoints(finished)[-1], tmp_path / "back" / "old" / checkpoints(finished)[-1].name)
    (tmp_path / "back" / "metrics.jsonl").write_text(text)
    done = go_on(colour_folder, tmp_path / "new", copy, "--train.epochs", "4")
    assert done.returncode == 0 and [line["epoch"] for line in metrics(tmp_path / "new")] == [4], done.stderr


def test_fewer_epochs_than_are_done_are_refused(finished, colour_folder):
    before = (finished / "config.yaml").read_text()
    done = go_on(colour_folder, finished, "auto", "--train.epochs", "2")
    assert done.returncode == 1 and "has 3 already; use 3 or more" in done.stderr
    assert (finished / "config.yaml").read_text() == before


def test_the_precision_that_a_run_had_may_be_named(finished, colour_folder):
    options = ("--train.epochs", "4", "--train.mixed_precision")
    assert "precision=bf16: the checkpoint" in go_on(colour_folder, finished, "auto", *options, "bf16").stderr
    assert go_on(colour_folder, finished, "auto", *options, "no").returncode == 0


def test_the_checkpoint_that_a_run_goes_on_from_is_never_out_of_the_way(finished, colour_folder):
    shutil.rmtree(checkpoints(finished)[-1])
    before_evaluation = checkpoints(finished)[-1]
    assert before_evaluation.name == "step_00000009_epoch_0002"
    files = {path.name: path.stat().st_ino for path in before_evaluation.iterdir()}
    assert (
        go_on(colour_folder, finished, "auto", "--train.epochs", "3", "--train.keep_checkpoints", "9").returncode == 0
    )
    assert files == {path.name: path.stat().st_ino for path in before_evaluation.iterdir()}
    assert checkpoints(finished)[-1].name == "step_00000009_epoch_0003"


def test_a_tracker_without_room_ends_with_one_line(colour_folder, tmp_path, monkeypatch):
    def full(self, *_, **__):
        raise OSError(27, "File too large")

    monkeypatch.setattr("accelerate.Accelerator.log", full)
    done = run_cli(*small_run(colour_folder, tmp_path / "run", *OPTIONS, "--tracker", "tensorboard"))
    assert done.returncode == 1 and "tracker=tensorboard: cannot be written ([Errno 27]" in done.stderr


TWICE = """
from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.network import BackboneConfig
from tinytl_hf.config.run import Config, MemoryConfig
from tinytl_hf.config.train import TrainConfig
from tinytl_hf.config.verbs import EvalConfig
from tinytl_hf.measure.accuracy import evaluate_adapter
from tinytl_hf.train.loop import train
import sys
for name in "ab":
    train(Config(
        output_dir=name, method="FT-Last", backbone=BackboneConfig(weights="none"), memory=MemoryConfig(report=False),
        data=DataConfig(dataset=sys.argv[1], train_size=32), train=TrainConfig(epochs=1, global_batch_size=8),
    ))
evaluate_adapter(EvalConfig(adapter="b/adapter", output="again.json"), DataConfig(dataset=sys.argv[1], train_size=32))
"""


@pytest.mark.parametrize("processes", [slow(2)])
def test_a_script_of_several_processes_trains_twice_and_evaluates(processes, colour_folder, tmp_path):
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWICE, str(colour_folder)],
            cwd=tmp_path,
            env={**os.environ, "ACCELERATE_USE_CPU": "1", **as_launched(rank, processes, port)},
        )
        for rank in range(processes)
    ]
    assert [process.wait(300) for process in started] == [0] * processes
    losses = [
        json.loads((tmp_path / name).read_text())["loss"] for name in ("a/eval_results.json", "b/eval_results.json")
    ]
    assert losses[0] == losses[1] and json.loads((tmp_path / "again.json").read_text())["loss"] == losses[1]


def test_epochs_whose_figures_are_gone_are_said_and_are_in_no_time_of_training(finished, colour_folder):
    (finished / "metrics.jsonl").unlink()
    done = go_on(colour_folder, finished, "auto", "--train.epochs", "4")
    assert done.returncode == 0 and "metrics.jsonl lacks 3 of the 3 epochs done" in done.stderr
    assert [line["epoch"] for line in metrics(finished)] == [4]
    assert "Training took" not in (finished / "adapter" / "README.md").read_text()


def test_a_path_that_is_too_long_ends_with_one_line_that_names_it(colour_folder, tmp_path):
    output = tmp_path.joinpath(*["a" * 200] * 25)
    done = run_cli(*small_run(colour_folder, output, *OPTIONS))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"tinytl-hf: error: output_dir={output}: cannot be written (")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("notes.txt", "is a file"),
        ("notes.txt/runs/first", "{}/notes.txt is a file"),
        ("link", "is a link that leads nowhere"),
        ("link/first", "{}/link is a link that leads nowhere"),
    ],
)
def test_where_no_folder_can_be_the_run_ends_with_one_line_and_changes_nothing(name, message, colour_folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    before, output = files(tmp_path), tmp_path / name
    done = run_cli(*small_run(colour_folder, output, *OPTIONS))
    assert done.returncode == 1 and files(tmp_path) == before
    expected = f"tinytl-hf: error: output_dir={output}: {message.format(tmp_path)}; choose a folder"
    assert done.stderr.splitlines()[-1] == expected


def files(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_the_rate_of_an_epoch_is_that_of_train_lr_whatever_the_roles_have(colour_folder, tmp_path):
    options = ["--train.epochs", "1", "--train.lr", "0.01", "--train.warmup_epochs", "0"]
    rates = []
    for name, factor in (("plain", "1"), ("head", "3")):
        done = run_cli(
            *small_run(colour_folder, tmp_path / name, *OPTIONS, *options, "--train.lr_factors.head", factor)
        )
        assert done.returncode == 0, done.stderr
        rates += [line["lr"] for line in metrics(tmp_path / name)]
    assert rates == [0.01, 0.01]
    assert (metrics(tmp_path / "plain")[0]["train"]["loss"]) != (metrics(tmp_path / "head")[0]["train"]["loss"])


def test_the_config_of_a_run_that_replaced_another_replaces_none(finished, colour_folder):
    done = run_cli(*small_run(colour_folder, finished, *OPTIONS, "--train.epochs", "1", "--overwrite", "true"))
    assert done.returncode == 0 and len(metrics(finished)) == 1, done.stderr
    before = (finished / "metrics.jsonl").read_bytes()
    done = run_cli("train", "--config", finished / "config.yaml")
    assert done.returncode == 1 and f"output_dir={finished}: holds a run already" in done.stderr
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_metrics_that_were_changed_are_said_to_be(finished, colour_folder):
    lines = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (finished / "metrics.jsonl").write_text(lines[0] + lines[1][:30] + "\n" + lines[2])
    done = go_on(colour_folder, finished, "auto", "--train.epochs", "4")
    assert (
        done.returncode == 1 and "wrote, or not as it is now; choose another folder, or move that away" in done.stderr
    )
    (finished / "metrics.jsonl").unlink()
    done = go_on(colour_folder, finished, "auto", "--train.epochs", "4")
    assert done.returncode == 0 and "metrics.jsonl lacks 3 of the 3 epochs done" in done.stderr
    assert [line["epoch"] for line in metrics(finished)] == [4]


def test_the_page_of_the_run_before_goes_and_one_of_mine_stays(finished, colour_folder):
    assert run_cli("report", finished, "--html").returncode == 0 and (finished / "report.html").is_file()
    assert go_on(colour_folder, finished, "auto", "--train.epochs", "4").returncode == 0
    assert not (finished / "report.html").exists()
    (finished / "report.html").write_text("<p>my notes</p>")
    done = run_cli(*small_run(colour_folder, finished, *OPTIONS, "--train.epochs", "1", "--overwrite", "true"))
    assert done.returncode == 0 and (finished / "report.html").read_text() == "<p>my notes</p>"
