"""What a launcher, a thread or an earlier run in the process says, and what a run makes of it."""

import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from shared import run_cli, small_run, write_image
from started_runs import HANG, Run, as_launched, checkpoints, free_port, in_two_processes, metrics, run

from tinytl_hf import TinyTLError, device
from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.network import BackboneConfig
from tinytl_hf.config.run import Config, MemoryConfig
from tinytl_hf.config.train import TrainConfig
from tinytl_hf.config.verbs import EvalConfig
from tinytl_hf.device import alone_in_process
from tinytl_hf.measure.accuracy import evaluate_adapter
from tinytl_hf.train import output_dir, start
from tinytl_hf.train.loop import train


def last_layer(data, output, *options):
    return small_run(data, output, "--method", "FT-Last", "--train.epochs", "1", *options)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "inductor"),
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER"),
        ("ACCELERATE_USE_FSDP", "true"),
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_USE_MEGATRON_LM", "True"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true"),
        ("ACCELERATE_MIXED_PRECISION", "fp8"),
    ],
)
def test_a_way_of_launching_that_runs_do_not_have_is_refused_by_its_name(
    variable, value, colour_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv(variable, value)
    done = run_cli(*last_layer(colour_folder, tmp_path / "run"))
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"tinytl-hf: error: {variable}={value}: ")
    assert not (tmp_path / "run").exists()


def test_what_a_launcher_sets_for_none_of_them_is_taken(colour_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    assert run_cli(*last_layer(colour_folder, tmp_path / "run")).returncode == 0


def test_options_decide_and_it_is_said_where_the_launcher_said_otherwise(colour_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "1.0")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    done = run_cli(*last_layer(colour_folder, tmp_path / "run", "--train.mixed_precision", "bf16"))
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "run")[0]["step"] == 3  # of 24 images, 8 a step
    for line in (
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 is not used: train.gradient_accumulation_steps=1 decides",
        "ACCELERATE_GRADIENT_CLIPPING=1.0 is not used: train.max_grad_norm decides",
        "ACCELERATE_MIXED_PRECISION=fp16 is not used: train.mixed_precision=bf16 decides",
    ):
        assert line in done.stderr.splitlines()
    assert json.loads((tmp_path / "run" / "eval_results.json").read_text())["precision"] == "bf16"


def test_a_device_that_does_not_exist_ends_with_one_line(colour_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "abacus")
    done = run_cli(*last_layer(colour_folder, tmp_path / "run"))
    assert done.returncode == 1 and "Accelerate cannot start" in done.stderr and "unexpected" not in done.stderr


@pytest.mark.parametrize("name", ["meta", "mps" if torch.cuda.is_available() else "cuda"])
def test_a_device_that_is_not_here_ends_with_one_line_that_names_the_variable(
    name, colour_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", name)
    done = run_cli(*last_layer(colour_folder, tmp_path / "run"))
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"tinytl-hf: error: ACCELERATE_TORCH_DEVICE={name}: cannot be used here (")
    assert not (tmp_path / "run").exists()


def test_python_without_docstrings_is_refused_before_a_run_starts(colour_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("tinytl_hf.measure.metrics.sys", SimpleNamespace(flags=SimpleNamespace(optimize=2)))
    done = run_cli(*last_layer(colour_folder, tmp_path / "run"))
    assert done.returncode == 1 and "error: PYTHONOPTIMIZE=2: " in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def config(data, output, **train_options):
    return Config(
        output_dir=str(output),
        method="FT-Last",
        backbone=BackboneConfig(weights="none"),
        data=DataConfig(dataset=str(data), train_size=32),
        train=TrainConfig(epochs=1, global_batch_size=8, threads=1, **train_options),
        memory=MemoryConfig(report=False),
    )


@pytest.mark.parametrize(("told", "launched", "sees"), [("1", True, ""), ("true", False, "0"), ("false", True, "0")])
def test_processes_on_a_cpu_see_no_gpu(told, launched, sees, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("ACCELERATE_USE_CPU", told)
    if launched:
        monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(device, "Accelerator", lambda **_: pytest.fail("seen"))
    with pytest.raises(pytest.fail.Exception, match="seen"):
        device.make_accelerator("no")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == sees


@pytest.mark.parametrize(
    ("told", "found"),
    [("cpu", "cpu"), ("cpu:0", "cpu:0"), ("cuda", "cuda"), ("cuda:1", "cuda:1")]
    + [(told, None) for told in ("cuda:2", "cuda:", "mps", "abacus", "cpu:1", "")],
)
def test_steps_are_measured_on_the_device_that_runs_are_told_to_use(told, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert device.device_of_figures() == torch.device("cuda")
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", told)
    if found is not None:
        assert device.device_of_figures() == torch.device(found)
        return
    with pytest.raises(TinyTLError, match=rf"^ACCELERATE_TORCH_DEVICE={told}: .* CUDA, which has 2 devices here; "):
        device.device_of_figures()


@pytest.mark.parametrize(("name", "made_current"), [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", [])])
def test_the_gpu_that_a_run_is_told_to_use_is_the_current_one(name, made_current, monkeypatch):
    found = SimpleNamespace(device=torch.device(name), mixed_precision="no", num_processes=1)
    monkeypatch.setattr(device, "Accelerator", lambda **_: found)
    monkeypatch.setattr(device, "_check_device", lambda _: None)
    seen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: seen.append(str(gpu)))
    threads = torch.get_num_threads()
    assert device.make_accelerator("no", threads) is found and seen == made_current


def test_on_a_machine_without_a_gpu_launched_processes_train_together_untold(colour_folder, tmp_path):
    options = last_layer(colour_folder, tmp_path / "run")
    done = run(options, tmp_path / "log", processes=2, environment={"ACCELERATE_USE_CPU": "false"})
    assert done.returncode == 0 and done.stderr.startswith("FT-Last on 2 processes, cpu "), done.stderr
    assert metrics(tmp_path / "run")[0]["step"] == 3  # of 24 images, 8 a step


def _start_in_a_group(rank, port, told, folder):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    os.environ |= as_launched(rank, 2, port) if told else {}
    try:
        said = str(device.make_accelerator("no").num_processes)
    except TinyTLError as error:
        said = str(error)
    (folder / str(rank)).write_text(said)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("told", "said"),
    [(True, "2"), (False, "there are 2 processes, and Accelerate counts 1, so each would train alone")],
)
def test_a_group_of_processes_that_accelerate_does_not_know_is_refused(told, said, tmp_path):
    in_two_processes(_start_in_a_group, told, tmp_path)
    assert [(tmp_path / str(rank)).read_text().partition(":")[0] for rank in (0, 1)] == [said, said]


def _train_on_a_machine_of_its_own(rank, port, data, folder, resume):
    os.environ |= {**as_launched(rank, 2, port), "ACCELERATE_USE_CPU": "1"}
    os.chdir(folder / str(rank))
    output_dir.SEEN_WITHIN = 0.5
    try:
        train(config(data, "run", resume=resume))
        said = "nothing"
    except (TinyTLError, RuntimeError) as error:
        said = str(error)
    Path("said").write_text(said)


@pytest.mark.parametrize(
    ("resume", "missing"),
    [("never", "run/config.yaml"), ("auto", "run/checkpoints/step_00000003_epoch_0001/progress.json")],
)
def test_machines_without_a_folder_in_common_are_told_so_before_they_train(resume, missing, colour_folder, tmp_path):
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
    if resume == "auto":
        train(config(colour_folder, tmp_path / "0" / "run"))
    before = checkpoints(tmp_path / "0" / "run")
    in_two_processes(_train_on_a_machine_of_its_own, colour_folder, tmp_path, resume)
    assert (tmp_path / "1" / "said").read_text() == (
        f"{missing}: is there for the first process, and not for this one; let all machines share output_dir"
    )
    assert checkpoints(tmp_path / "0" / "run") == before and not (tmp_path / "1" / "run").exists()


def _go_on_and_see_no_adapter_yet(rank, port, data, folder):
    os.environ |= {**as_launched(rank, 2, port), "ACCELERATE_USE_CPU": "1"}
    if rank == 1:
        start.has_whole_adapter = lambda _: False
    figures = train(replaced(config(data, folder / "run"), lr=1e-9, resume="auto", epochs=5, patience=2))
    (folder / f"{rank}.txt").write_text(f"{figures['accuracy']}")


def replaced(run_config, **train_options):
    return replace(run_config, train=replace(run_config.train, **train_options))


def test_a_process_that_sees_the_adapter_later_stops_at_the_same_epoch(colour_folder, tmp_path):
    first = train(replaced(config(colour_folder, tmp_path / "run"), lr=1e-9, epochs=2))
    assert in_two_processes(_go_on_and_see_no_adapter_yet, colour_folder, tmp_path) == [0, 0]
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == [f"{first['accuracy']}"] * 2
    assert len(metrics(tmp_path / "run")) == 3  # the second and the third are no better than the first


def test_what_a_process_says_whose_run_has_lost_another(colour_folder, tmp_path):
    kill = ("tinytl_hf.train.loop", "train_epoch", 1)  # of the second process
    both = Run(last_layer(colour_folder, tmp_path / "run"), tmp_path / "log", processes=2, kill=kill)
    both.workers[0].join(HANG)
    assert (both.workers[0].exitcode, both.wait().returncode) == (1, -signal.SIGKILL)
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.endswith(
        "tinytl-hf (process 0): error: another process of the run has ended; its own message, or that of "
        "the launcher, says why"
    ), last


@pytest.mark.slow
def test_the_first_process_of_a_launch_does_alone_what_is_not_shared(tmp_path, monkeypatch, make_model):
    make_model("FT-Last", num_classes=2, train_size=32).save_pretrained(tmp_path / "adapter")
    image = write_image(tmp_path / "1.png")
    done = run(["predict", "--adapter", tmp_path / "adapter", image], tmp_path / "log", processes=2)
    assert done.returncode == 0 and done.stderr.count("1.png") == 1, done.stderr
    assert (tmp_path / "log.1").read_text() == ""
    for verb, options in (("report", [tmp_path]), ("memory", ["--backbone.name", "nothing"])):
        for rank in (0, 1):
            for name, value in as_launched(rank, 2, free_port()).items():
                monkeypatch.setenv(name, value)
            done = run_cli(verb, *options)
            assert (done.returncode, done.stderr.count("tinytl-hf: error: ")) == ((0, 0) if rank else (1, 1))
            assert rank or not {"WORLD_SIZE", "LOCAL_RANK"} & os.environ.keys()


def test_runs_in_a_thread_and_one_after_the_other_with_another_precision_and_accumulation(colour_folder, tmp_path):
    options = [
        {"mixed_precision": "bf16"},
        {"gradient_accumulation_steps": 2},  # and no precision: not that of the run before
        {"mixed_precision": "bf16"},
    ]
    handler, errors = signal.getsignal(signal.SIGTERM), []

    def all_of_them():
        try:
            for number, each in enumerate(options):
                train(config(colour_folder, tmp_path / str(number), **each))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=all_of_them)
    thread.start()
    thread.join()
    assert errors == [] and signal.getsignal(signal.SIGTERM) is handler
    precisions = [json.loads((tmp_path / str(n) / "eval_results.json").read_text())["precision"] for n in range(3)]
    assert precisions == ["bf16", "no", "bf16"]
    steps = [metrics(tmp_path / str(number))[0]["step"] for number in range(3)]
    assert steps == [3, 3, 3]
    losses = [metrics(tmp_path / str(number))[0]["eval"]["loss"] for number in range(3)]
    assert losses[0] == losses[2] != losses[1]


def test_two_runs_at_a_time_in_one_process_are_refused(colour_folder, tmp_path):
    with alone_in_process():
        done = run_cli(*small_run(colour_folder, tmp_path / "run", "--method", "FT-Last"))
    assert done.returncode == 1 and "another run trains, or evaluates, in this process" in done.stderr
    with alone_in_process(), pytest.raises(TinyTLError, match="another run trains, or evaluates, in this process"):
        evaluate_adapter(EvalConfig(adapter=str(tmp_path)), DataConfig(dataset=str(colour_folder)))
    assert not (tmp_path / "run").exists()
    assert run_cli(*small_run(colour_folder, tmp_path / "run", "--method", "FT-Last")).returncode == 0
