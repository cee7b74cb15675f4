"""The commands of the page on deployment: an adapter leaves Python, trains elsewhere, and comes back."""

import re
import shlex
import shutil

import pytest
from shared import ROOT, run_cli, small_run

PAGE = (ROOT / "tinytl_hf" / "deploy" / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if language == "bash" for line in block.strip().splitlines()]
FIRST = [command for command in COMMANDS if command.startswith("tinytl-hf") and "executorch" not in command]


@pytest.fixture(scope="module")
def home(colour_folder, tmp_path_factory):
    """A folder with an adapter of a small network and the photos that it was trained on, as the page names them."""
    root = tmp_path_factory.mktemp("deploy")
    shutil.copytree(colour_folder, root / "path" / "to" / "images")
    shutil.copy(colour_folder / "test" / "red" / "0.png", root / "image.jpg")
    options = ["--backbone.name", "resnet18", "--lite.norm", "group", "--method", "TinyTL-L+B", "--train.epochs", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        done = run_cli(*small_run("path/to/images", "runs/mine", *options))
    assert done.returncode == 0, done.stderr
    return root


def run(command, capsys):
    words = shlex.split(command)
    if words[0] == "tinytl-hf":
        done = run_cli(*words[1:])
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        return done.stdout
    from tinytl_hf.deploy.device_training import main

    main(words[words.index("tinytl_hf.deploy.device_training") + 1 :])
    return capsys.readouterr().out


def test_there_are_five_commands():
    assert len(COMMANDS) == 5 and COMMANDS[:2] == FIRST


@pytest.mark.slow
def test_onnx_and_its_labels(home, monkeypatch, capsys):
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    monkeypatch.chdir(home)
    printed = [run(command, capsys) for command in FIRST]
    assert "same label for 10 of 10" in printed[0] and re.match(r"image.jpg: (red|blue) \d", printed[1])


@pytest.mark.slow
def test_executorch_a_step_for_a_device_and_the_way_back(home, monkeypatch, capsys):
    pytest.importorskip("executorch.exir", reason="the extra executorch is not installed")
    monkeypatch.chdir(home)
    printed = [run(command, capsys) for command in COMMANDS[2:]]
    assert "same label for 10 of 10" in printed[0] and "gradients, largest relative difference" in printed[1]
    first, last = re.search(r"50 steps on 24 photos, loss ([\d.]+) to ([\d.]+)", printed[2]).groups()
    assert float(last) < float(first)
    done = run_cli(
        "eval", "--adapter", "runs/mine/from_device", "--data.dataset", "path/to/images", "--output", "e.json"
    )
    assert done.returncode == 0 and "accuracy" in done.stdout, done.stderr
