"""The memory report comes last in a run, and costs nothing but itself where it fails."""

import json

from shared import run_cli, small_run

from tinytl_hf.train import finish


def last_layer(data, output, *options):
    options = ("--method", "FT-Last", "--train.epochs", "1", "--memory.report", "true", *options)
    return small_run(data, output, *options)


def card_of(output):
    return (output / "adapter" / "README.md").read_text()


def test_a_report_that_fails_leaves_a_finished_run_with_its_card(colour_folder, tmp_path, monkeypatch):
    def fail(*_):
        assert "## Results" in card_of(tmp_path / "run")  # all is there before
        raise RuntimeError("no memory\nis left")

    monkeypatch.setattr(finish, "write_memory", fail)
    done = run_cli(*last_layer(colour_folder, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "memory report: failed (no memory is left); the run is complete without it" in done.stderr.splitlines()
    assert "## Training memory" not in card_of(tmp_path / "run") and not (tmp_path / "run" / "memory.json").exists()
    assert run_cli("report", tmp_path / "run").returncode == 0


def test_the_report_is_of_the_runs_own_step_and_gets_into_the_card(colour_folder, tmp_path):
    options = ["--train.optimizer", "sgd", "--train.momentum", "0", "--train.gradient_accumulation_steps", "2"]
    done = run_cli(*last_layer(colour_folder, tmp_path / "run", *options, "--train.max_grad_norm", "1"))
    assert done.returncode == 0, done.stderr
    memory = json.loads((tmp_path / "run" / "memory.json").read_text())
    told = {key: memory["conditions"][key] for key in ("optimizer", "gradient_accumulation_steps", "max_grad_norm")}
    assert told == {"optimizer": "sgd", "gradient_accumulation_steps": 2, "max_grad_norm": 1.0}
    assert memory["conditions"]["batch_size"] == 4  # images a pass: 8 a step in two of them
    assert memory["rows"][0]["peak"]["optimizer_state"] == 0  # of sgd without momentum
    card = card_of(tmp_path / "run")
    assert not (tmp_path / "run" / "adapter" / "curves.png").exists()  # left out here, and not drawn by the report
    assert "## Training memory" in card and "gradient_accumulation_steps 2" in card and card.count("## Results") == 1


def test_a_device_that_does_not_tell_its_peak_gets_no_report(colour_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(finish, "MEASURED_ON", ("cuda",))
    done = run_cli(*last_layer(colour_folder, tmp_path / "run"))
    assert done.returncode == 0 and "memory report: left out, as peaks are measured on cuda, not on cpu" in done.stderr
    assert not (tmp_path / "run" / "memory.json").exists()
