"""N steps in one go, and k steps, a kill and the rest: the same bits of everything."""

import signal

import pytest
from shared import METHODS, slow, small_run
from started_runs import differences, metrics, run, state

OPTIONS = ["--train.global_batch_size", "8", "--head.dropout", "0.2", "--train.checkpoint_every", "2"]
OPTIONS += ["--train.threads", "1", "--train.schedule", "cosine", "--train.warmup_epochs", "0.5", "--train.lr", "1e-3"]
MIXED = ["--train.mixup", "0.4", "--train.cutmix", "1.0", "--data.auto_augment", "trivial"]
MIXED += ["--train.class_weights", "balanced", "--train.patience", "9"]
KILLED_AT = 6  # of 6 batches, in the second epoch: the fifth, after the last checkpoint, is lost


def check_resume(data, tmp_path, options, processes, killed_at):
    """Compare a run in one go with one that is killed and goes on."""
    arguments = small_run(data, tmp_path / "straight", *OPTIONS, *options)
    straight = run(arguments, tmp_path / "straight.log", processes)
    assert straight.returncode == 0, straight.stderr
    arguments = small_run(data, tmp_path / "killed", *OPTIONS, *options, "--train.resume", "auto")
    kill = ("tinytl_hf.train.loop", "augmented", killed_at)
    killed = run(arguments, tmp_path / "killed.log", processes, kill)
    assert killed.returncode == -signal.SIGKILL and len(metrics(tmp_path / "killed")) == 1, killed.stderr
    resumed = run(arguments, tmp_path / "resumed.log", processes)
    assert resumed.returncode == 0, resumed.stderr
    assert differences(state(tmp_path / "straight"), state(tmp_path / "killed")) == []


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("TinyTL-L+B", [*MIXED, "--train.optimizer", "muon"]),
        slow("FT-Layerwise", ["--train.optimizer", "sgd", "--data.start_size", "32", "--data.train_size", "48"]),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(method, options, colour_folder, tmp_path):
    check_resume(colour_folder, tmp_path, ["--method", method, *options], 1, KILLED_AT)


@pytest.mark.slow
@pytest.mark.parametrize("lean", ["true", "false"])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(
    ("method", "norm"), [*((method, "batch") for method in METHODS), ("TinyTL-L", "group"), ("TinyTL-L+B", "group")]
)
def test_every_method_resumes_to_the_same_bits(method, norm, steps, processes, lean, colour_folder, tmp_path):
    options = ["--method", method, "--lite.norm", norm, "--memory.lean", lean]
    options += ["--train.gradient_accumulation_steps", steps]
    check_resume(colour_folder, tmp_path, options, processes, KILLED_AT * steps)
