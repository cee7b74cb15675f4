"""Pushes and pulls where something is not as it should be: cards, other pushes, caches, refusals, hostile files."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import File
from huggingface_hub import constants
from shared import run_cli, small_run

from tinytl_hf import TinyTLModel
from tinytl_hf.adapter.record import DataRecord
from tinytl_hf.hub import transfer
from tinytl_hf.hub.card import END, has_our_part

ESCAPE = "\x1b]0;mine\x07"


@pytest.fixture
def adapter(make_model, tmp_path):
    make_model("FT-Last", train_size=32).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def push(adapter, *options):
    return run_cli("push", "--adapter", adapter, "--repo", "me/flowers", *options)


def pull(output, *options):
    return run_cli("pull", "--repo", "me/flowers", "--output", output, *options)


def card_there(server):
    return server.repos["me/flowers"].files()["README.md"].content.decode()


@pytest.mark.parametrize("left", [None, "", "\n"])
def test_an_adapter_whose_card_was_taken_away_gets_a_new_one_and_empties_none_on_the_hub(left, server, adapter):
    assert push(adapter).returncode == 0
    first = card_there(server)
    (adapter / "README.md").unlink()
    if left is not None:
        (adapter / "README.md").write_text(left)
    assert push(adapter).returncode == 0
    assert card_there(server) == first and "## How to use" in first


def test_a_card_here_without_our_part_empties_none_on_the_hub(server, adapter):
    push(adapter)
    server.add_repo("me/flowers", {"README.md": (card_there(server) + "\nMine, and more.\n").encode()})
    (adapter / "README.md").write_text("Mine")
    assert push(adapter).returncode == 0
    assert "## How to use" in card_there(server) and "Mine, and more." in card_there(server)


@pytest.mark.parametrize(("there", "is_replaced"), [(b"", True), (b" \n", True), (b"F\xfcr mich", False)])
def test_an_empty_card_on_the_hub_is_none_and_one_that_is_no_text_stays(there, is_replaced, server, adapter):
    server.add_repo("me/flowers", {"README.md": there})
    done = push(adapter)
    assert done.returncode == 0, done.stderr
    content = server.repos["me/flowers"].files()["README.md"].content
    assert has_our_part(content.decode()) if is_replaced else content == there


def test_a_pull_request_of_what_is_there_already_is_said_to_be_none(server, adapter):
    commit = push(adapter).stdout
    done = push(adapter, "--create-pr")
    assert done.returncode == 0 and done.stdout == commit and server.repos["me/flowers"].pulls == 0
    assert "me/flowers has these files already: no pull request was opened" in done.stderr
    assert "no pull request" not in push(adapter).stderr


@pytest.mark.parametrize("options", [[], ["--revision", "next"]])
def test_what_somebody_writes_while_a_push_is_on_its_way_is_not_lost(options, server, adapter, make_model, tmp_path):
    assert push(adapter, *options).returncode == 0
    repo, ref = server.repos["me/flowers"], (options or ["", "main"])[1]
    edited = File(repo.files(ref)["README.md"].content + b"\nWritten meanwhile.\n")
    make_model("FT-Last", train_size=32, num_classes=2).save_pretrained(tmp_path / "other")
    server.meanwhile["/preupload/"] = lambda: repo.commit(ref, "edit", {**repo.files(ref), "README.md": edited})
    done = push(tmp_path / "other", *options)
    assert done.returncode == 1 and "the Hub answered 412: A commit has happened since" in done.stderr
    assert repo.files(ref)["README.md"] == edited
    assert run_cli(*shlex.split(done.stderr.partition("retry with: tinytl-hf ")[2])).returncode == 0
    card = repo.files(ref)["README.md"].content.decode()
    assert "Written meanwhile." in card and "into 2 classes" in card


def test_a_repository_that_was_renamed_is_pulled_by_its_old_name_and_not_made_again(server, adapter, tmp_path):
    push(adapter)
    server.repos["me/roses"] = server.repos.pop("me/flowers")
    server.renamed["me/flowers"] = "me/roses"
    done = pull(tmp_path / "pulled")
    assert done.returncode == 0 and len(TinyTLModel.from_pretrained(tmp_path / "pulled").label_names) == 4
    done = push(adapter)
    assert done.returncode == 1 and "repo=me/flowers: is called me/roses now; name it so" in done.stderr
    assert list(server.repos) == ["me/roses"]


def test_a_command_says_once_that_its_adapter_is_of_the_cache(server, make_model, colour_folder, monkeypatch):
    make_model("FT-Last", num_classes=None, label_names=["blue", "red"], train_size=32).push_to_hub("me/colours")
    evaluate = ("eval", "--adapter", "me/colours", "--data.dataset", colour_folder)
    done = run_cli(*evaluate)
    assert done.returncode == 0 and "taken from the cache" not in done.stderr, done.stderr
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    done = run_cli(*evaluate)
    assert done.returncode == 0 and done.stderr.count("me/colours: http://127.0.0.1:9 cannot be reached") == 1


GATED = "the repository is gated; ask for access on its page, and run `hf auth login` or set HF_TOKEN"
REFUSALS = {
    "server error": (500, None, "the Hub has a server error (500)"),
    "no right": (403, ("Enable access to gated repos in your token", None), "(403); Enable access to gated repos in"),
    "gated": (403, ("Access is restricted", "GatedRepo"), GATED),
    "disabled": (403, ("Access to this resource is disabled.", None), "the repository is disabled (403)"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refused_pull_says_why_though_the_cache_has_the_card_of_a_push(refusal, server, adapter, tmp_path):
    status, code, message = REFUSALS[refusal]
    for _ in range(2):  # of the second, the client has the card as it is there
        assert push(adapter).returncode == 0
    assert list(Path(constants.HF_HUB_CACHE).rglob("README.md"))
    server.failures["/api/models"] = status
    server.codes = {} if code is None else {status: code}
    done = pull(tmp_path / "pulled")
    assert done.returncode == 1 and message in done.stderr and "write" not in done.stderr, done.stderr
    assert "is no TinyTL adapter" not in done.stderr and not (tmp_path / "pulled").exists()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ENDPOINT", "http://127.0.0.1:9", "cannot be reached"),
        ("HF_HUB_OFFLINE", True, ""),
        ("", 500, "the Hub has a server error (500)"),
    ],
)
def test_what_comes_from_the_cache_as_the_hub_does_not_answer_is_said_to(
    name, value, said, server, adapter, tmp_path, monkeypatch, make_model
):
    transfer._say_is_of_cache.cache_clear()  # which says a thing once a process, and other tests are in this one
    push(adapter)
    assert pull(tmp_path / "first").returncode == 0
    old = server.repos["me/flowers"].refs["main"]
    make_model("FT-Last", train_size=32, num_classes=2).push_to_hub("me/flowers")
    if name:
        monkeypatch.setattr(constants, name, value)
    else:
        server.failures["/api/models"] = value
    done = pull(tmp_path / "second")
    assert done.returncode == 0 and len(TinyTLModel.from_pretrained(tmp_path / "second").label_names) == 4
    assert (f"taken from the cache, as of commit {old[:7]}" in done.stderr) is bool(said) and said in done.stderr
    done = pull(tmp_path / "third", "--revision", old)
    assert done.returncode == 0 and "taken from the cache" not in done.stderr  # a commit is what it is


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_cache_is_mended_by_the_command_that_the_message_names(name, server, adapter, tmp_path, monkeypatch):
    push(adapter)
    assert pull(tmp_path / "first").returncode == 0
    (copy,) = Path(constants.HF_HUB_CACHE).rglob(f"snapshots/*/{name}")
    copy.resolve().write_bytes(copy.read_bytes()[:50])
    done = pull(tmp_path / "second")
    assert done.returncode == 1 and not (tmp_path / "second").exists()
    remedy = done.stderr.partition("if the copy in the cache is damaged, remove it with: hf ")[2].partition(";")[0]
    hf = [sys.executable, "-m", "huggingface_hub.cli.hf", *shlex.split(remedy)]
    subprocess.run([*hf, "--yes", "--cache-dir", constants.HF_HUB_CACHE], check=True, capture_output=True)
    assert pull(tmp_path / "second").returncode == 0


def test_a_terminal_gets_no_escape_sequence_of_somebody_elses_adapter(server, adapter, colour_folder, tmp_path):
    files = {path.name: path.read_bytes() for path in adapter.iterdir()}
    config = json.loads(files["adapter_config.json"])
    config |= {"tinytl_hf_version": "99.0", ESCAPE: 1, "label_names": [ESCAPE, "blue", "c", "d"]}
    server.add_repo("me/flowers", {**files, "adapter_config.json": json.dumps(config).encode()})
    done = run_cli(*small_run(colour_folder, tmp_path / "run", "--method", "FT-Last", "--adapter.init", "me/flowers"))
    assert done.returncode == 0, done.stderr
    assert "]0;mine is of a newer tinytl_hf" in done.stderr and "its rows of \\x1b]0;mine\\x07" in done.stderr
    assert "\x1b" not in done.stderr and "\x07" not in done.stderr


def test_a_card_links_to_no_address_that_an_adapter_made_up(make_model, tmp_path):
    data = DataRecord("x](javascript:alert(1))", source="hub")
    make_model("FT-Last").save_pretrained(tmp_path, data=data, metrics={"accuracy": 0.5})
    card = (tmp_path / "README.md").read_text()
    assert (
        "[x" not in card and "Trained on local data, `x](javascript:alert(1))`" in card and "\ndatasets:" not in card
    )
    assert card.rstrip().endswith(END)
