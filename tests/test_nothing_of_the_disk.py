"""What leaves this disk for others says nothing of where things lie on it: pushed files, and merged ones."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from shared import ROOT, run_cli, small_run

from tinytl_hf import TinyTLError, TinyTLModel
from tinytl_hf.network import torchvision_nets


def finished(done):
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def home(colour_folder, tmp_path):
    """Folder of a person with weights, a metric and pictures, of which one is damaged."""
    home = tmp_path / "home of ann"
    shutil.copytree(colour_folder, home / "pictures")
    (home / "pictures" / "train" / "red" / "holiday.png").write_bytes(b"no picture")
    (home / "pictures" / "letters").mkdir()
    (home / "pictures" / "letters" / "to-bob.txt").write_text("dear bob")
    torch.manual_seed(0)
    save_file(torchvision_nets.build("mobilenet_v2").state_dict(), home / "mine.safetensors")
    shutil.copy(ROOT / "tests" / "evaluate_f1.py", home / "evaluate_f1.py")
    return home


def test_no_pushed_or_merged_file_names_a_place_or_a_file_of_the_pusher(home, server, make_model, tmp_path):
    weights = str(home / "mine.safetensors")
    make_model("FT-Last", weights=weights, num_classes=2, train_size=32).save_pretrained(home / "first")
    options = [
        "--backbone.weights",
        weights,
        "--method",
        "TinyTL-B",
        "--train.epochs",
        "1",
        "--data.skip_corrupt",
        "true",
    ]
    options += ["--adapter.init", home / "first", "--metrics", f"[{home}/evaluate_f1.py]", "--memory.report", "true"]
    finished(run_cli(*small_run(home / "pictures", home / "run", *options), pictures=True))
    finished(run_cli("push", "--adapter", home / "run", "--repo", "me/colours"))
    finished(run_cli("merge", "--adapter", home / "run", "--output", home / "merged.safetensors"))
    files = {name: file.content for name, file in server.repos["me/colours"].files().items()}
    assert {"adapter_config.json", "README.md", "eval_results.json", "curves.png"} < files.keys()
    assert '"unreadable": 1' in files["eval_results.json"].decode()
    data = json.loads(files["eval_results.json"])["data"]
    assert data["trained_on"] == ["train", data["images"]["train"] - 1] and data["unreadable"] == {"train": 1}
    assert f"| training images | {data['trained_on'][1]} of {data['images']['train']}, 1 unreadable |" in (
        files["README.md"].decode()
    )
    files["merged"] = (home / "merged.safetensors").read_bytes()
    for name, content in files.items():
        for place in (str(tmp_path), home.name, str(ROOT), "holiday", "letters", "bob", "evaluate_f1.py"):
            assert place.encode() not in content, f"{name} holds {place}"
    record = json.loads(files["adapter_config.json"])["backbone"]
    assert record["weights"] == "mine.safetensors" and f"`{record['sha256']}`" in files["README.md"].decode()

    shutil.copy(weights, tmp_path / "theirs.safetensors")
    images = torch.randn(2, 3, 32, 32)
    expected = TinyTLModel.from_pretrained(home / "run").eval()(images)
    shutil.rmtree(home)
    with pytest.raises(TinyTLError, match=r"backbone.weights=mine.safetensors: no such file; .* with weights="):
        TinyTLModel.from_pretrained("me/colours")
    found = TinyTLModel.from_pretrained("me/colours", weights=str(tmp_path / "theirs.safetensors"))
    assert torch.equal(found.eval()(images), expected)
