"""Push, pull and load by name: the real client over real HTTP against the small Hub of hub_server.py."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
import torch
import yaml
from hub_server import READER, WRITER, HubServer
from huggingface_hub import HfApi, ModelCard, constants, get_session, set_client_factory
from huggingface_hub.utils._http import default_client_factory
from safetensors.torch import load_file, save_file
from shared import ROOT, run_cli, slow

from tinytl_hf import TinyTLError, TinyTLModel
from tinytl_hf.adapter.record import FORMAT_VERSION
from tinytl_hf.hub import client
from tinytl_hf.hub.card import END, MEASURED

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(9))
FILES = {".gitattributes", "adapter_config.json", "adapter_model.safetensors", "README.md"}


@pytest.fixture(params=["xet", slow("lfs")])
def any_server(request, use_server, tmp_path):
    (tmp_path / "xet").mkdir()
    with HubServer(tmp_path / "xet" if request.param == "xet" else None) as server:
        yield use_server(server)


@pytest.fixture
def adapter(make_model, tmp_path):
    """A folder with an adapter and what is not part of it, such as a pickle."""
    make_model("FT-Last", train_size=32).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "optimizer.pth").write_bytes(b"no part of an adapter")
    return tmp_path / "adapter"


def logits(model):
    with torch.no_grad():
        return model.eval()(IMAGES)


def push(adapter, *options):
    done = run_cli("push", "--adapter", adapter, "--repo", "me/flowers", *options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_push_is_one_commit_of_the_adapters_own_files_and_a_second_push_none(any_server, adapter):
    first = push(adapter, "--message", "First")
    repo = any_server.repos["me/flowers"]
    assert repo.messages() == ["initial commit", "First"] and not repo.private
    assert set(repo.files()) == FILES and first.startswith(any_server.url)
    assert push(adapter) == first and len(repo.commits) == 2
    model = TinyTLModel.from_pretrained(adapter)
    assert model.push_to_hub("me/flowers") == first  # as it was loaded: nothing to push
    with torch.no_grad():
        model.backbone.classifier[1].bias.add_(1)
    assert model.push_to_hub("me/flowers", commit_message="Third") != first
    assert repo.messages()[2:] == ["Third"]


def test_branches_tags_and_pull_requests_are_loaded_by_name(any_server, adapter, make_model, tmp_path):
    before = logits(TinyTLModel.from_pretrained(adapter))
    push(adapter)
    commit = any_server.repos["me/flowers"].refs["main"]
    HfApi().create_tag("me/flowers", tag="v1", revision=commit)
    other = make_model("FT-Last", train_size=32)
    with torch.no_grad():
        other.backbone.classifier[1].bias.add_(1)
    other.push_to_hub("me/flowers", revision="shifted")
    other.save_pretrained(tmp_path / "other")
    pull_request = push(tmp_path / "other", "--create-pr")
    assert pull_request == f"{any_server.url}/me/flowers/discussions/1"
    assert any_server.repos["me/flowers"].refs["main"] == commit
    for revision in (None, "main", "v1", commit):
        assert torch.equal(logits(TinyTLModel.from_pretrained("me/flowers", revision=revision)), before)
    for revision in ("shifted", "refs/pr/1"):
        assert torch.equal(logits(TinyTLModel.from_pretrained("me/flowers", revision=revision)), logits(other))
    done = run_cli("pull", "--repo", "me/flowers", "--revision", "v1", "--output", tmp_path / "pulled")
    assert done.stdout.strip() == str(tmp_path / "pulled"), done.stderr
    assert torch.equal(logits(TinyTLModel.from_pretrained(tmp_path / "pulled")), before)


@pytest.mark.slow
@pytest.mark.parametrize("any_server", ["lfs", "xet"], indirect=True)
def test_a_fresh_process_loads_by_name_and_by_commit(any_server, adapter, tmp_path):
    code = (
        "import sys, torch; from tinytl_hf import TinyTLModel\n"
        "images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(9))\n"
        "models = [TinyTLModel.from_pretrained('me/flowers', revision=r).eval() for r in (None, sys.argv[1])]\n"
        "with torch.no_grad(): torch.save([model(images) for model in models], sys.argv[2])"
    )
    client = {"HF_ENDPOINT": any_server.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": WRITER}
    client |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": str(int(any_server.xet is None))}

    def run(*arguments):
        subprocess.run([sys.executable, *arguments], check=True, cwd=ROOT, env={**os.environ, **client})

    options = ["push", "--adapter", adapter, "--repo", "me/flowers", "--private"]
    if any_server.xet is None:
        assert run_cli(*options).returncode == 0
    else:
        run("-m", "tinytl_hf", *options)  # a xet store in a folder serves one process at a time
    assert any_server.repos["me/flowers"].private
    run("-c", code, any_server.repos["me/flowers"].refs["main"], tmp_path / "logits.pt")
    expected = logits(TinyTLModel.from_pretrained(adapter))
    assert all(torch.equal(found, expected) for found in torch.load(tmp_path / "logits.pt"))


def test_the_card_on_the_hub_loads_the_adapter_by_its_name_and_keeps_what_was_written_there(server, adapter):
    push(adapter)
    card = ModelCard.load("me/flowers")
    assert card.data.library_name == "tinytl-hf" and 'from_pretrained("me/flowers")' in card.text
    server.add_repo("me/flowers", {"README.md": (str(card) + "\nWritten on the Hub.\n").encode()})
    model = TinyTLModel.from_pretrained(adapter)
    model.save_pretrained(adapter, metrics={"accuracy": 0.4321})
    push(adapter)
    text = server.repos["me/flowers"].files()["README.md"].content.decode()
    assert "Written on the Hub." in text and "0.4321" in text
    server.add_repo("me/flowers", {"README.md": b"All mine."})
    push(adapter)
    assert server.repos["me/flowers"].files()["README.md"].content == b"All mine."


def card_there(server):
    return server.repos["me/flowers"].files()["README.md"].content.decode()


def head_and_results(card):
    head = yaml.safe_load(card.split("---\n")[1])
    return head, [(r["task"]["name"], r["metrics"][0]["value"]) for m in head["model-index"] for r in m["results"]]


def test_what_a_person_wrote_into_the_card_here_or_there_stays_and_pushing_again_changes_nothing(server, adapter):
    TinyTLModel.from_pretrained(adapter).save_pretrained(adapter, metrics={"accuracy": 0.5})
    push(adapter)
    local = adapter / "README.md"
    local.write_text(local.read_text().replace("license: apache-2.0", "license: mit\nlanguage: en", 1))
    head, _ = head_and_results(card_there(server))
    trial = {
        "task": {"type": "image-classification", "name": "field trial"},
        "dataset": {"type": "custom", "name": "x"},
    }
    trial["metrics"] = [{"type": "accuracy", "value": 0.1}]
    head["model-index"].append({"name": "trial", "results": [trial]})
    text = card_there(server).split("---\n", 2)[2]
    server.add_repo("me/flowers", {"README.md": f"---\n{yaml.safe_dump(head)}---\n{text}\n## Ethics\n".encode()})
    for _ in range(3):
        push(adapter)
        head, results = head_and_results(card_there(server))
        assert head["license"] == "mit" and head["language"] == "en" and "## Ethics" in card_there(server)
        assert sorted(results) == [("field trial", 0.1), (MEASURED, 0.5)]
    assert len(server.repos["me/flowers"].commits) == 2  # what was there, and the first of these pushes
    pulled = adapter.parent / "pulled"
    assert run_cli("pull", "--repo", "me/flowers", "--output", pulled).returncode == 0
    push(pulled)
    assert len(server.repos["me/flowers"].commits) == 2


def test_text_here_replaces_that_of_the_hub_and_says_so(server, adapter):
    push(adapter)
    there = card_there(server) + "\n## Ethics\n"
    server.add_repo("me/flowers", {"README.md": there.encode()})
    local = adapter / "README.md"
    local.write_text(local.read_text() + "\nWritten here.\n")
    done = run_cli("push", "--adapter", adapter, "--repo", "me/flowers")
    assert done.returncode == 0 and "text that the card here has not" in done.stderr
    assert "Written here." in card_there(server) and "Ethics" not in card_there(server)


def test_another_adapter_leaves_nothing_of_the_one_before(server, adapter, make_model, tmp_path):
    card = adapter / "README.md"
    text = card.read_text().replace("- tinytl\n- mobilenet_v2\n- FT-Last\n", "- tinytl\n- resnet18\n- FT-Full\n")
    text = text.replace("tags:", "base_model: timm/resnet18.tv_in1k\nbase_model_relation: adapter\ntags:", 1)
    card.write_text(text.replace(END, f"[figures](eval_results.json)\n{END}"))
    (adapter / "eval_results.json").write_text("{}")
    shutil.copytree(adapter, tmp_path / "pulled")
    push(adapter)
    assert "eval_results.json" in server.repos["me/flowers"].files() and "resnet18" in card_there(server)
    make_model("FT-Last", train_size=32, num_classes=2).save_pretrained(tmp_path / "other")
    push(tmp_path / "other")
    assert set(server.repos["me/flowers"].files()) == FILES and "resnet18" not in card_there(server)
    assert yaml.safe_load(card_there(server).split("---\n")[1])["tags"] == ["tinytl", "mobilenet_v2", "FT-Last"]
    pull = ("pull", "--repo", "me/flowers", "--output", tmp_path / "pulled")
    assert run_cli(*pull).returncode == 1 and run_cli(*pull, "--overwrite").returncode == 0
    assert not (tmp_path / "pulled" / "eval_results.json").exists()


def test_an_untouched_adapter_over_weights_in_a_file_keeps_its_figures(server, make_model, tmp_path):
    weights = tmp_path / "mine.safetensors"
    save_file({n: t.contiguous() for n, t in make_model("FT-Last").backbone.state_dict().items()}, weights)
    make_model("FT-Last", weights=str(weights)).save_pretrained(tmp_path / "adapter", metrics={"accuracy": 0.5})
    card = tmp_path / "adapter" / "README.md"
    push(tmp_path / "adapter")
    shutil.copy(weights, tmp_path / "moved.safetensors")
    (tmp_path / "there").mkdir()
    moved = Path(shutil.move(weights, tmp_path / "there" / "mine.safetensors"))
    TinyTLModel.from_pretrained("me/flowers", weights=str(moved)).push_to_hub("me/flowers")
    assert len(server.repos["me/flowers"].commits) == 2 and "0.5000" in card.read_text()
    assert b"0.5000" in server.repos["me/flowers"].files()["README.md"].content


def test_private_is_never_pushed_to_what_is_public(server, adapter):
    push(adapter, "--private")
    assert server.repos["me/flowers"].private
    server.add_repo("me/open", {"README.md": b"x"})
    done = run_cli("push", "--adapter", adapter, "--repo", "me/open", "--private")
    assert done.returncode == 1 and "public already; make it private in its settings" in done.stderr
    assert set(server.repos["me/open"].files()) == {"README.md"}


def refuse(part, status):
    return lambda server, _: server.failures.update({part: status})


def stall(server, monkeypatch):
    server.stall_s = 1.5
    monkeypatch.setattr(client, "TIMEOUT_S", 0.2)


def unplug(server, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def token(value):
    return lambda _, monkeypatch: monkeypatch.setenv("HF_TOKEN", value)


FAILURES = {
    "no token": (lambda _, monkeypatch: monkeypatch.delenv("HF_TOKEN"), "no Hub token; run `hf auth login`"),
    "wrong token": (token("hf_wrong"), "the Hub does not know the token (401)"),
    "no right": (token(READER), "the token has no right to that (403)"),
    "offline": (lambda _, m: m.setattr(constants, "HF_HUB_OFFLINE", True), "HF_HUB_OFFLINE is set; unset it"),
    "no network": (unplug, "cannot be reached (["),
    "time-out": (stall, "did not answer in 0.2 s"),
    "server error": (refuse("repos/create", 503), "the Hub has a server error (503)"),
    "rate limit": (refuse("repos/create", 429), "too many requests (429)"),
    "card refused": (refuse("validate-yaml", 400), "Invalid metadata in README.md"),
    "commit refused": (refuse("/commit/", 500), "the Hub has a server error (500)"),
    "gone meanwhile": (refuse("/preupload/", 404), "the Hub answered 404"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_push_is_one_line_with_the_command_that_retries(failure, server, adapter, monkeypatch):
    break_it, message = FAILURES[failure]
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    with monkeypatch.context() as patch:
        break_it(server, patch)
        done = run_cli("push", "--adapter", adapter, "--repo", "me/flowers", "--revision", "next", "--message", "a b")
    assert done.returncode == 1 and done.stdout == "" and message in done.stderr, done.stderr
    *progress, line = done.stderr.splitlines()
    assert line.startswith("tinytl-hf: error: pushing") and "rror" not in "".join(progress) and WRITER not in line
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    command = shlex.split(done.stderr.strip().partition("then retry with: ")[2])
    assert command[:4] == ["tinytl-hf", "push", "--adapter", str(adapter)]
    server.failures.clear()
    server.stall_s = 0
    assert run_cli(*command[1:]).returncode == 0
    assert server.repos["me/flowers"].messages()[-1] == "a b"


def test_a_model_whose_push_fails_is_kept_on_the_disk_for_the_retry(server, make_model, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    server.failures["repos/create"] = 503
    model = make_model("FT-Last", train_size=32)
    with pytest.raises(TinyTLError, match=r"server error \(503\)") as error:
        model.push_to_hub("me/flowers")
    server.failures.clear()
    assert run_cli(*shlex.split(str(error.value).partition("retry with: tinytl-hf ")[2])).returncode == 0
    assert torch.equal(logits(TinyTLModel.from_pretrained("me/flowers")), logits(model))


def edited(adapter, **changes):
    config = json.loads((adapter / "adapter_config.json").read_text()) | changes
    return {"adapter_config.json": json.dumps(config).encode()}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (lambda a: {"README.md": b"# Something else", "model.bin": b"cos\nsystem"}, "is no TinyTL adapter: it has no"),
        (lambda a: {"adapter_config.json": b'{"peft_type": "LORA"}'}, "not a tinytl_hf adapter"),
        (lambda a: edited(a, format_version=FORMAT_VERSION + 1), "pip install --upgrade tinytl-hf"),
        (lambda a: edited(a), "has no adapter_model.safetensors"),
        (lambda a: edited(a) | {"adapter_model.safetensors": b"\x80\x04cos\nsystem"}, "not a safetensors file"),
    ],
)
def test_what_is_no_adapter_of_this_version_is_refused_by_name(files, message, server, adapter, tmp_path):
    server.add_repo("me/other", files(adapter))
    with pytest.raises(TinyTLError, match="me/other") as error:
        TinyTLModel.from_pretrained("me/other")
    assert message in str(error.value)
    done = run_cli("pull", "--repo", "me/other", "--output", tmp_path / "pulled")
    assert done.returncode == 1 and message in done.stderr and not (tmp_path / "pulled").exists()


def test_another_backbone_than_the_adapter_was_trained_on_is_refused_by_its_hash(server, adapter):
    backbone = {"name": "mobilenet_v2", "weights": "none", "sha256": "0" * 64}
    files = edited(adapter, backbone=backbone)
    server.add_repo(
        "me/other", {**files, "adapter_model.safetensors": (adapter / "adapter_model.safetensors").read_bytes()}
    )
    with pytest.raises(TinyTLError, match="was trained on other weights of mobilenet_v2"):
        TinyTLModel.from_pretrained("me/other")


def test_nothing_but_an_adapters_files_is_fetched(server, adapter):
    files = {path.name: path.read_bytes() for path in adapter.iterdir()}
    server.add_repo("me/mixed", {**files, "pytorch_model.bin": b"a pickle", "code.py": b"raise SystemExit"})
    server.requests.clear()
    TinyTLModel.from_pretrained("me/mixed")
    fetched = {path.rpartition("/")[2] for verb, path in server.requests if "/resolve/" in path}
    assert fetched == FILES - {".gitattributes"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("me/nothing", "me/nothing is no folder here, and loading it from the Hub failed: no such repository"),
        ("runs/a/adapter", "runs/a/adapter is no adapter: it has no adapter_config.json"),
        ("nowhere", "nowhere is no adapter"),
    ],
)
def test_a_name_that_leads_nowhere_says_where_it_was_sought(name, message, server):
    for command in (["eval", "--adapter", name], ["predict", "--adapter", name, "x.png"]):
        done = run_cli(*command)
        assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_missing_revisions_and_revisions_of_paths_are_named(server, adapter):
    push(adapter)
    with pytest.raises(TinyTLError, match="no such revision"):
        TinyTLModel.from_pretrained("me/flowers", revision="v9")
    with pytest.raises(TinyTLError, match=r"revision=v1: .* is a path"):
        TinyTLModel.from_pretrained(adapter, revision="v1")


def test_an_adapter_that_was_fetched_once_loads_without_the_network(server, adapter, monkeypatch):
    push(adapter)
    expected = logits(TinyTLModel.from_pretrained("me/flowers"))
    for name, value in (("ENDPOINT", "http://127.0.0.1:9"), ("HF_HUB_OFFLINE", True)):
        monkeypatch.setattr(constants, name, value)
        assert torch.equal(logits(TinyTLModel.from_pretrained("me/flowers")), expected)
    with pytest.raises(TinyTLError, match="HF_HUB_OFFLINE is set and the adapter is not in the cache; unset it"):
        TinyTLModel.from_pretrained("me/unknown")


def test_options_of_the_download_are_those_of_the_hubs_client(server, adapter, tmp_path):
    push(adapter)
    expected = logits(TinyTLModel.from_pretrained(adapter))
    cache = tmp_path / "own-cache"
    with pytest.raises(TinyTLError, match="loading it from the Hub failed"):
        TinyTLModel.from_pretrained("me/flowers", cache_dir=cache, local_files_only=True)
    TinyTLModel.from_pretrained("me/flowers", cache_dir=cache, token=READER)
    assert any(cache.rglob("adapter_config.json"))
    for options in ({"local_files_only": True}, {"force_download": True}):
        loaded = TinyTLModel.from_pretrained("me/flowers", cache_dir=cache, **options)
        assert torch.equal(logits(loaded), expected)
        loaded.load_adapter("me/flowers", "again", cache_dir=cache, **options)
        assert loaded.adapter_names == ["default", "again"]


def test_eval_predict_and_merge_take_a_revision(server, adapter, make_model, colour_folder, tmp_path):
    labels = {"num_classes": None, "label_names": ["blue", "red"]}
    for revision, label in ((None, 0), ("reds", 1)):
        model = make_model("FT-Last", train_size=32, **labels)
        with torch.no_grad():
            model.backbone.classifier[1].weight.zero_()
            model.backbone.classifier[1].bias.copy_(torch.eye(2)[label] * 9)  # it sees this colour only
        model.push_to_hub("me/colours", revision=revision)
    for options, label in (([], "blue"), (["--revision", "reds"], "red")):
        one = ["--adapter", "me/colours", *options]
        done = run_cli("predict", *one, colour_folder / "test" / "blue" / "0.png")
        assert f": {label} " in done.stdout, done.stderr
        where = ["--data.dataset", colour_folder, "--output", tmp_path / "r.json"]
        done = run_cli("eval", *one, *where)
        assert done.returncode == 0, done.stderr
        per_class = json.loads((tmp_path / "r.json").read_text())["per_class_accuracy"]
        assert per_class == [float(label == "blue"), float(label == "red")]
        done = run_cli("merge", *one, "--output", tmp_path / "m.safetensors", "--overwrite")
        bias = load_file(tmp_path / "m.safetensors")["classifier.1.bias"]
        assert done.returncode == 0 and bias.argmax() == ("blue", "red").index(label)
    done = run_cli("predict", "--adapter", adapter, "--revision", "v1", "x.png")
    assert done.returncode == 1 and "only names on the Hub have revisions" in done.stderr


def test_pull_keeps_another_adapter_that_is_there(server, adapter, tmp_path, make_model):
    push(adapter)
    make_model("TinyTL-B", train_size=32).save_pretrained(tmp_path / "mine")
    before = (tmp_path / "mine" / "adapter_config.json").read_bytes()
    pull = ["pull", "--repo", "me/flowers", "--output", tmp_path / "mine"]
    done = run_cli(*pull)
    assert done.returncode == 1 and "holds another adapter_config.json already" in done.stderr
    assert (tmp_path / "mine" / "adapter_config.json").read_bytes() == before
    assert run_cli(*pull, "--overwrite").returncode == 0 and run_cli(*pull).returncode == 0
    assert torch.equal(
        logits(TinyTLModel.from_pretrained(tmp_path / "mine")), logits(TinyTLModel.from_pretrained(adapter))
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repo", "flowers"], "repo=flowers: use a name on the Hub, as user/name"),
        (["--repo", "me/flowers", "--create-pr", "--revision", "x"], "revision=x: a pull request is against main"),
        (["--repo", "me/flowers", "--adapter", "nowhere"], "nowhere is no adapter"),
    ],
)
def test_a_push_that_cannot_work_asks_the_network_for_nothing(options, message, server, adapter):
    done = run_cli("push", "--adapter", adapter, *options)
    assert done.returncode == 1 and message in done.stderr and server.requests == []


def test_a_program_that_pushes_keeps_its_own_client_of_the_hub(server, adapter):
    set_client_factory(default_client_factory)  # the command line sets its own
    TinyTLModel.from_pretrained(adapter).push_to_hub("me/open")
    assert get_session().timeout == httpx2.Timeout(None) and len(get_session().event_hooks["request"]) == 1
