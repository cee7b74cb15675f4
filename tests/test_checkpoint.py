"""Checkpoints: what is in them, damage that is found, and runs that may not go on from them."""

import hashlib
import json
import os
import shutil
import subprocess
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file
from shared import run_cli, small_run
from started_runs import checkpoints, delta, metrics, run

from tinytl_hf.adapter.format import read_tensors
from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.recipe import resolve
from tinytl_hf.config.run import Config
from tinytl_hf.data.sets import earlier_sha256, open_data, sha256
from tinytl_hf.device import make_accelerator
from tinytl_hf.measure.metrics import compute_metrics
from tinytl_hf.reports.compare import Comparison
from tinytl_hf.reports.finished_run import read_run
from tinytl_hf.step import make_optimizer
from tinytl_hf.train import checkpoint
from tinytl_hf.train.checkpoint import find_damage
from tinytl_hf.train.progress import PROGRESS_FILE, Progress
from tinytl_hf.words import counted

OPTIONS = ["--method", "FT-Last", "--train.threads", "1"]


@pytest.fixture(scope="module")
def original(colour_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    done = run_cli(*small_run(colour_folder, root / "run", *OPTIONS))
    assert done.returncode == 0, done.stderr
    return root / "run"


@pytest.fixture
def finished(original, tmp_path):
    """A run of two epochs, of which a test may do what it likes."""
    return shutil.copytree(original, tmp_path / "run")


def resume(data, folder, *options):
    return run_cli(*small_run(data, folder, *OPTIONS, "--train.resume", "auto", *options))


def test_a_checkpoint_of_the_largest_delta_with_adamw_is_small_and_without_backbone(make_model, tmp_path):
    model = make_model("TinyTL-L+B", num_classes=10, train_size=224)
    config = resolve(Config(output_dir=str(tmp_path)), images=2_000)
    accelerator = make_accelerator("no", 1)
    prepared, optimizer = accelerator.prepare(model, make_optimizer(model, config.train))
    for parameter in model.trainable_parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    checkpoint.register(accelerator, model)
    path = checkpoint.save(accelerator, config, Progress(), {"backbone.sha256": model.config.backbone.sha256})
    files = {file.name: file for file in path.iterdir()}
    assert sum(file.stat().st_size for file in files.values()) < 15e6
    assert load_file(files["delta.safetensors"]).keys() == model.adapter_tensors().keys()
    moments = torch.load(files["optimizer.bin"], weights_only=True)["state"].values()
    assert sum(m["exp_avg"].numel() for m in moments) == sum(p.numel() for p in model.trainable_parameters())
    assert json.loads(files["progress.json"].read_text())["run"]["backbone.sha256"] == model.config.backbone.sha256
    assert accelerator.unwrap_model(prepared) is model


def test_checksums_are_those_of_sha256sum(finished):
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=checkpoints(finished)[-1], capture_output=True)
    assert done.returncode == 0 and done.stdout.count(b": OK") == 5


def test_a_file_is_hashed_piece_by_piece(tmp_path):
    content = b"delta" * 4_000_000
    (tmp_path / "file").write_bytes(content)
    tracemalloc.start()
    digest = checkpoint._sha256(tmp_path / "file")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert digest == hashlib.sha256(content).hexdigest() and peak < len(content) / 5


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda path: truncate(path / "SHA256SUMS"), "SHA256SUMS does not list scheduler.bin"),
        (lambda path: (path / "delta.safetensors").unlink(), "delta.safetensors is missing"),
        (lambda path: (path / "SHA256SUMS").unlink(), "SHA256SUMS: "),
        (lambda path: (path / "progress.json").write_bytes(b"\0" * 900), "progress.json was changed"),
    ],
)
def test_damage_is_found(damage, named, finished):
    newest = checkpoints(finished)[-1]
    assert find_damage(newest) is None
    damage(newest)
    assert named in find_damage(newest)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(finished, original, colour_folder):
    before, newest = checkpoints(finished)
    truncate(newest / "optimizer.bin")
    done = resume(colour_folder, finished)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "is damaged" in line]
    assert str(newest) in line and "optimizer.bin was changed" in line
    assert [path.name for path in checkpoints(finished)] == [before.name, newest.name]
    assert all(torch.equal(tensor, delta(finished)[name]) for name, tensor in delta(original).items())


def test_damage_everywhere_ends_with_one_line_and_nothing_is_lost(finished, colour_folder):
    for path in checkpoints(finished):
        truncate(path / "optimizer.bin")
    adapter = (finished / "adapter" / "adapter_model.safetensors").read_bytes()
    done = resume(colour_folder, finished)
    assert done.returncode == 1 and "no checkpoint in" in done.stderr and "--overwrite true" in done.stderr
    done = resume(colour_folder, finished, "--train.resume", checkpoints(finished)[0])
    assert done.returncode == 1 and "damaged (optimizer.bin was changed)" in done.stderr
    assert (finished / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--method", "TinyTL-B", "method=TinyTL-B"),
        ("--seed", "1", "seed=1"),
        ("--train.global_batch_size", "4", "train.global_batch_size=4"),
        ("--data.max_train_samples", "20", "data.max_train_samples=20"),
    ],
)
def test_another_kind_of_run_is_refused(option, value, named, original, colour_folder):
    done = resume(colour_folder, original, option, value)
    assert done.returncode == 1 and named in done.stderr and "was made with" in done.stderr


def test_a_budget_that_splits_the_batch_otherwise_is_told_how_to_go_on(finished, colour_folder, ready_processes):
    done = resume(colour_folder, finished, "--memory.budget_mb", "900", "--train.gradient_accumulation_steps", "2")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "error: memory.budget_mb=900 takes train.gradient_accumulation_steps=2: " in last
    fix = "use --memory.budget_mb null --train.gradient_accumulation_steps 1"
    assert f"was made with 1; {fix}, or another --output_dir" in last
    done = resume(colour_folder, finished, "--train.epochs", "3", *fix.split()[1:])
    assert done.returncode == 0 and len(metrics(finished)) == 3, done.stderr


def test_other_images_at_the_same_place_are_refused(colour_folder, finished, tmp_path):
    data = shutil.copytree(colour_folder, tmp_path / "data")
    arguments = small_run(data, tmp_path / "own", *OPTIONS)
    assert run_cli(*arguments).returncode == 0
    shutil.copy(data / "train" / "red" / "1.png", data / "train" / "blue" / "0.png")
    done = run_cli(*arguments, "--train.resume", "auto")
    assert done.returncode == 1 and "data.train_sha256=" in done.stderr and "was made with" in done.stderr


def test_other_backbone_weights_at_the_same_place_are_refused(colour_folder, tmp_path):
    import torchvision

    weights = tmp_path / "weights.pth"
    for seed in (1, 2):
        torch.manual_seed(seed)
        torch.save(torchvision.models.mobilenet_v2().state_dict(), weights)
        options = [*OPTIONS, "--backbone.weights", weights, "--train.resume", "auto"]
        done = run_cli(*small_run(colour_folder, tmp_path / "run", *options))
    assert done.returncode == 1 and "backbone.sha256=" in done.stderr and "was made with" in done.stderr


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_in_a_checkpoint_is_not_run(finished, colour_folder, tmp_path):
    newest = checkpoints(finished)[-1]
    torch.save({"state": Trap(tmp_path / "escaped")}, newest / "optimizer.bin")
    checkpoint._seal(newest)
    done = resume(colour_folder, finished)
    assert done.returncode == 1 and f"checkpoint {newest} cannot be read" in done.stderr, done.stderr
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize("content", [b"\x80\x02)\x81.", b"\x80\x02h\x05.", b"\x80\x02}q\x00(X\x01", b""])
def test_a_damaged_pickle_in_a_checkpoint_is_named(content, finished, colour_folder):
    newest = checkpoints(finished)[-1]
    (newest / "optimizer.bin").write_bytes(content)
    checkpoint._seal(newest)
    done = resume(colour_folder, finished)
    assert done.returncode == 1 and f"checkpoint {newest} cannot be read (" in done.stderr, done.stderr
    assert done.stderr.count("error: ") == 1 and "unexpected" not in done.stderr


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda record: [], "it says nothing of a run"),
        (lambda record: {**record, "run": []}, "it says nothing of a run"),
        (lambda record: {**record, "progress": {"step": 1}}, "it lacks 'epoch'"),
        (lambda record: {**record, "progress": {**record["progress"], "epoch": "2"}}, "epoch is 2"),
        (lambda record: {**record, "progress": {**record["progress"], "step": -1}}, "step is -1"),
        (lambda record: {**record, "progress": {**record["progress"], "batch": True}}, "batch is True"),
        (lambda record: {**record, "progress": {**record["progress"], "best_accuracy": 10**400}}, "int too large"),
        (lambda record: {**record, "progress": {**record["progress"], "init": {"a": 1}}}, "unexpected keyword"),
    ],
)
def test_progress_that_cannot_be_is_named(change, reason, finished, colour_folder):
    newest = checkpoints(finished)[-1]
    record = json.loads((newest / "progress.json").read_text())
    (newest / "progress.json").write_text(json.dumps(change(record)))
    checkpoint._seal(newest)
    done = resume(colour_folder, finished)
    assert done.returncode == 1 and reason in done.stderr and "another" in done.stderr, done.stderr
    assert str(newest) in done.stderr and "(unexpected: " not in done.stderr


def test_a_pipe_in_a_checkpoint_is_damage(finished):
    newest = checkpoints(finished)[-1]
    (newest / "optimizer.bin").unlink()
    os.mkfifo(newest / "optimizer.bin")
    assert "it is no file, but a pipe" in find_damage(newest)


def test_more_epochs_go_on_where_the_run_ended(finished, colour_folder):
    first = metrics(finished)
    done = resume(colour_folder, finished, "--train.epochs", "3")
    assert done.returncode == 0 and metrics(finished)[:2] == first and len(metrics(finished)) == 3


def test_going_on_from_before_a_better_epoch_leaves_its_adapter_behind(colour_folder, tmp_path):
    output = tmp_path / "run"
    options = [*OPTIONS, "--train.keep_checkpoints", "9", "--train.lr", "1e-2", "--train.epochs"]
    assert run_cli(*small_run(colour_folder, output, *options, "3")).returncode == 0
    lines = metrics(output)
    lines[1]["eval"]["accuracy"] = 2.0  # the second epoch was the best
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copytree(output / "adapter", tmp_path / "of_later")
    first = next(path for path in checkpoints(output) if path.name.endswith("epoch_0001"))
    done = run_cli(*small_run(colour_folder, output, *options, "1", "--train.resume", first))
    assert done.returncode == 0 and len(metrics(output)) == 1, done.stderr
    kept = load_file(output / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in load_file(first / "delta.safetensors").items())


@pytest.mark.parametrize(
    ("accuracies", "is_gone"),
    [((0.9, 0.8), False), ((0.8, 0.9, 0.7), False), ((0.9, 0.6, 0.7), True)],
)
def test_the_best_epoch_is_lost_only_if_its_adapter_is_and_that_is_said(
    accuracies, is_gone, colour_folder, tmp_path, monkeypatch
):
    """The checkpoint of the last epoch but one goes on where no adapter is left."""
    of_epochs, before = iter(accuracies), len(accuracies) - 1

    def compute(*arguments, tables=False, **options):
        figures = compute_metrics(*arguments, tables=tables, **options)
        return figures if tables else {**figures, "accuracy": next(of_epochs)}

    monkeypatch.setattr("tinytl_hf.train.loop.compute_metrics", compute)
    options = [*OPTIONS, "--train.schedule", "constant", "--train.lr", "1e-2", "--train.epochs"]
    first = tmp_path / "first"
    assert run_cli(*small_run(colour_folder, first, *options, before)).returncode == 0
    last = checkpoints(first)[-1]
    weights = load_file(last / "delta.safetensors")
    shutil.rmtree(first / "adapter")
    done = run_cli(*small_run(colour_folder, tmp_path / "on", *options, before + 1, "--train.resume", last))
    assert done.returncode == 0, done.stderr
    assert ("the adapter of the best epoch so far (accuracy 0.9000) is gone" in done.stderr) == is_gone
    kept = load_file(tmp_path / "on" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights.items()) != is_gone


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_adapter_is_that_of_the_checkpoint_again(name, finished, colour_folder):
    (finished / "adapter" / name).unlink()
    done = resume(colour_folder, finished, "--train.epochs", "3")
    assert done.returncode == 0 and "that of the checkpoint takes its place" in done.stderr, done.stderr
    read_tensors(finished / "adapter")


def test_lines_of_epochs_without_figures_are_in_the_way_and_stay(finished, colour_folder):
    (finished / "metrics.jsonl").write_text('{"epoch": 1}\n')
    done = resume(colour_folder, finished, "--train.epochs", "3")
    assert done.returncode == 1 and "holds metrics.jsonl, which no run of tinytl-hf wrote" in done.stderr
    assert metrics(finished) == [{"epoch": 1}]


def test_a_rank_without_a_launch_silences_nothing(finished, colour_folder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    done = resume(colour_folder, finished)
    assert done.returncode == 0 and "accuracy " in done.stdout and "next:" in done.stdout
    assert "are done, and there is nothing left to train; --train.epochs says how many" in done.stderr


def test_options_that_change_no_result_may_differ(finished, colour_folder):
    done = resume(
        *(colour_folder, finished, "--train.epochs", "3"),
        *("--memory.cuda_graph", "false", "--train.gradient_checkpointing", "true"),
    )
    assert done.returncode == 0 and len(metrics(finished)) == 3, done.stderr


def test_a_loss_that_is_not_finite_names_a_good_state_only_if_there_is_one(finished, colour_folder, tmp_path):
    too_high = ["--train.lr", "1e30", "--train.optimizer", "sgd"]
    done = run_cli(*small_run(colour_folder, tmp_path / "new", *OPTIONS, *too_high))
    assert done.returncode == 1 and "loss is not finite" in done.stderr and "good state" not in done.stderr


def test_a_folder_of_another_run_is_not_taken_over_by_a_resume(finished, colour_folder, tmp_path):
    elsewhere = shutil.copytree(checkpoints(finished)[-1], tmp_path / "elsewhere" / "step_00000006_epoch_0002")
    done = resume(colour_folder, finished, "--train.resume", elsewhere)
    assert done.returncode == 1 and "holds a run already" in done.stderr
    shutil.rmtree(finished / "checkpoints")
    done = resume(colour_folder, finished, "--seed", "5")
    assert done.returncode == 1 and "holds a run already" in done.stderr
    assert resume(colour_folder, finished).returncode == 1  # a finished run, whose figures would be lost
    (finished / "metrics.jsonl").write_text("")
    assert resume(colour_folder, finished).returncode == 0  # the same run, which had finished no epoch yet


def test_the_newest_checkpoints_are_kept_and_left_overs_of_a_kill_removed(finished, colour_folder):
    (finished / "checkpoints" / ".step_00000099_epoch_0009.tmp").mkdir()
    done = resume(
        *(colour_folder, finished, "--train.epochs", "4", "--train.keep_checkpoints", "3"),
        *("--train.checkpoint_every", "2"),
    )
    assert done.returncode == 0, done.stderr
    names = ["step_00000012_epoch_0003", "step_00000012_epoch_0004"]  # before and after the last evaluation
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["step_00000010_epoch_0003", *names]


def record_of(folder, change):
    """Change what the newest checkpoint of a run says of the run, as another version would have written it."""
    path = checkpoints(folder)[-1]
    record = json.loads((path / "progress.json").read_text())
    change(record)
    (path / "progress.json").write_text(json.dumps(record))
    checkpoint._seal(path)


def test_an_option_that_was_added_later_does_not_end_an_old_run(finished, colour_folder):
    record_of(finished, lambda record: [record["run"].pop(key) for key in ("train.mixup", "lite.norm")])
    done = resume(colour_folder, finished, "--train.mixup", "0.1")
    assert done.returncode == 1 and "train.mixup=0.1: the checkpoint" in done.stderr
    assert resume(colour_folder, finished, "--train.epochs", "3").returncode == 0 and len(metrics(finished)) == 3


def test_an_option_of_a_newer_version_is_named(finished, colour_folder):
    record_of(finished, lambda record: record["run"].update({"train.magic": 3}))
    done = resume(colour_folder, finished)
    assert done.returncode == 0 and "options that are not known here: train.magic" in done.stderr


def test_progress_of_a_newer_version_is_refused_with_its_reason(finished, colour_folder):
    record_of(finished, lambda record: record["progress"].update({"magic": 3}))
    before = (finished / "metrics.jsonl").read_bytes()
    done = resume(colour_folder, finished, "--train.epochs", "3")
    assert done.returncode == 1 and "its progress has magic, which is not known here: a later tinytl_hf" in done.stderr
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_the_same_data_and_weights_under_another_path_go_on_and_others_do_not(colour_folder, tmp_path):
    import torchvision

    data = shutil.copytree(colour_folder, tmp_path / "first")
    torch.save(torchvision.models.mobilenet_v2().state_dict(), tmp_path / "first.pth")
    arguments = small_run(data, tmp_path / "run", *OPTIONS, "--train.epochs", "1", "--train.resume", "auto")
    assert run_cli(*arguments, "--backbone.weights", tmp_path / "first.pth").returncode == 0
    data.rename(tmp_path / "second")
    (tmp_path / "first.pth").rename(tmp_path / "second.pth")
    moved = ["--data.dataset", tmp_path / "second", "--backbone.weights", tmp_path / "second.pth"]
    done = run_cli(*arguments, *moved, "--train.epochs", "2")
    assert done.returncode == 0 and len(metrics(tmp_path / "run")) == 2, done.stderr
    assert "second" in (tmp_path / "run" / "config.yaml").read_text()
    shutil.rmtree(tmp_path / "second" / "train" / "red")
    shutil.copytree(colour_folder / "test" / "red", tmp_path / "second" / "train" / "red")
    done = run_cli(*arguments, *moved, "--train.epochs", "3")
    assert done.returncode == 1 and "data.train_sha256=" in done.stderr and "was made with" in done.stderr


def test_more_epochs_say_that_the_curve_changes(colour_folder, tmp_path):
    cosine = ["--train.schedule", "cosine", "--train.epochs"]
    assert resume(colour_folder, tmp_path / "run", *cosine, "1").returncode == 0
    done = resume(colour_folder, tmp_path / "run", *cosine, "2")
    assert done.returncode == 0
    assert "train.epochs=2 in place of 1: the cosine schedule now spans that many, so the run goes on" in done.stderr
    assert [line["of_epochs"] for line in metrics(tmp_path / "run")] == [1, 2]
    assert "| epochs | 2; its schedule was for 1, then for 2 |" in (tmp_path / "run/adapter/README.md").read_text()
    whole = run_cli(*small_run(colour_folder, tmp_path / "whole", *OPTIONS, *cosine, "2"))
    assert whole.returncode == 0 and "| epochs | 2 |" in (tmp_path / "whole/adapter/README.md").read_text()
    rows = Comparison([read_run(tmp_path / "run"), read_run(tmp_path / "whole")]).rows
    assert [row.name.partition("train.epochs ")[2] for row in rows] == ["2 (scheduled for 1, then 2)", "2"]
    rates = [line["lr"] for line in metrics(tmp_path / "run")]
    done = resume(colour_folder, tmp_path / "run", *cosine, "2")
    assert "in place of" not in done.stderr and rates[0] > rates[1] > 0
    mixed = ["--train.schedule", "constant", "--train.mixup", "0.2", "--train.epochs"]
    assert resume(colour_folder, tmp_path / "mixed", *mixed, "1").returncode == 0
    done = resume(colour_folder, tmp_path / "mixed", *mixed, "2")
    assert "in place of 1: the changing of the images now spans that many" in done.stderr


def other_processes(data, tmp_path, method, before, after):
    """A run killed in mid-epoch on some processes that goes on on others, and one that is not killed."""
    options = ["--method", method, "--head.dropout", "0.2", "--train.optimizer", "sgd", "--train.lr", "1e-2"]
    options += ["--train.checkpoint_every", "2", "--train.global_batch_size", "8", "--train.resume", "auto"]
    straight = run(small_run(data, tmp_path / "straight", *options), tmp_path / "straight.log")
    assert straight.returncode == 0, straight.stderr
    arguments = small_run(data, tmp_path / "killed", *options)
    kill = ("tinytl_hf.train.loop", "augmented", 6)  # of 6 batches, in the second epoch: after the last checkpoint
    assert run(arguments, tmp_path / "killed.log", before, kill).returncode < 0
    resumed = run(arguments, tmp_path / "resumed.log", after)
    assert resumed.returncode == 0 and f"on {counted(after, 'process', 'processes')}" in resumed.stderr, resumed.stderr
    first, other = delta(tmp_path / "straight"), delta(tmp_path / "killed")
    for name, tensor in first.items():
        torch.testing.assert_close(other[name], tensor, atol=1e-5, rtol=1e-4)
    for ours, theirs in zip(metrics(tmp_path / "straight"), metrics(tmp_path / "killed"), strict=True):
        assert theirs["train"]["accuracy"] == ours["train"]["accuracy"]
        assert theirs["train"]["loss"] == pytest.approx(ours["train"]["loss"], rel=1e-4)
        assert theirs["train_curve"]["accuracy"] == ours["train_curve"]["accuracy"]


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one(colour_folder, tmp_path):
    other_processes(colour_folder, tmp_path, "FT-Last", before=2, after=1)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "before", "after"), [("FT-Last", 1, 2), ("TinyTL-B", 2, 1)])
def test_more_processes_and_deeper_deltas_go_on_too(method, before, after, colour_folder, tmp_path):
    # Without batch statistics, which over four small images amplify float32's rounding.
    other_processes(colour_folder, tmp_path, method, before, after)


def test_random_states_of_a_machine_without_a_gpu_are_taken_on_one_with(colour_folder, tmp_path, monkeypatch):
    done = run_cli(*small_run(colour_folder, tmp_path / "run", "--method", "FT-Last", "--train.epochs", "1"))
    assert done.returncode == 0, done.stderr
    file = checkpoints(tmp_path / "run")[-1] / "random_states_0.pkl"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: pytest.fail("there is none to set"))
    drawn = []
    for _ in range(2):
        checkpoint._take_random_state(file)
        drawn.append(torch.rand(4))
    assert torch.equal(*drawn)


def test_more_epochs_have_the_rates_of_their_own_schedule_from_the_first_step_on(colour_folder, tmp_path, monkeypatch):
    seen = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda own, *a, **k: (seen.append(own.param_groups[0]["lr"]), step(own))[1]
    )
    options = ["--method", "FT-Last", "--train.schedule", "cosine", "--train.global_batch_size", "8"]
    for folder, epochs in (("a", "2"), ("a", "4"), ("b", "4")):
        more = ["--train.epochs", epochs, "--train.resume", "auto"]
        assert run_cli(*small_run(colour_folder, tmp_path / folder, *options, *more)).returncode == 0
    assert len(seen) == 6 + 6 + 12 and seen[6:12] == pytest.approx(seen[18:24])


def test_another_precision_of_the_launcher_is_refused_on_resuming(colour_folder, tmp_path, monkeypatch):
    options = small_run(colour_folder, tmp_path / "run", "--method", "FT-Last")
    assert run_cli(*options).returncode == 0
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    done = run_cli(*options, "--train.epochs", "3", "--train.resume", "auto")
    assert done.returncode == 1 and "precision=bf16: the checkpoint" in done.stderr


def test_a_hash_of_an_earlier_version_is_known_and_one_of_other_data_is_not(colour_folder, tmp_path):
    train = open_data(DataConfig(dataset=str(colour_folder))).train
    now = sha256(train)
    for recorded, expected in ((earlier_sha256(train), earlier_sha256(train)), (now, now), ("0" * 64, now)):
        (tmp_path / PROGRESS_FILE).write_text(json.dumps({"run": {"data.train_sha256": recorded}}))
        assert checkpoint.hash_of(train, now, "data.train_sha256", tmp_path) == expected
    assert checkpoint.hash_of(train, now, "data.train_sha256", None) == now != earlier_sha256(train)
