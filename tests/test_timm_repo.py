"""Models for timm and transformers: a folder with equal logits, and the Hub."""

import json
import re
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from shared import run_cli
from test_methods import train_steps

from tinytl_hf import TinyTLError

timm = pytest.importorskip("timm", reason="the extra timm is not installed")

LABELS = ["blue", "red", "grey", "green"]
IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def exported(make_model, tmp_path):
    def export(method, backbone, **options):
        model = make_model(method, backbone, num_classes=None, label_names=LABELS, **options)
        train_steps(model, steps=1)
        text = model.export(tmp_path / "repo", format="timm", check_images=4)
        return model.eval(), tmp_path / "repo", text

    return export


@pytest.mark.parametrize(
    ("method", "backbone", "theirs"),
    [
        ("TinyTL-B", "mobilenet_v2", "mobilenetv2_100"),
        ("FT-Norm+Last", "mnasnet1_0", "mnasnet_100"),
        ("FT-Full", "resnet18", "resnet18"),
        ("FT-Last", "efficientnet_b0", "efficientnet_b0"),
        ("TinyTL-B", "timm/test_efficientnet", "test_efficientnet"),
    ],
)
def test_timm_loads_the_folder_with_equal_logits(method, backbone, theirs, exported):
    model, folder, text = exported(method, backbone)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IMAGES), model(IMAGES), atol=1e-5, rtol=1e-5)
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == theirs and config["label_names"] == LABELS and config["num_classes"] == 4
    assert "model_args" not in config  # transformers would pass num_classes twice
    options = model.config.preprocessing
    cfg = timm.data.resolve_model_data_config(loaded)
    assert tuple(cfg["input_size"]) == (3, 64, 64) and cfg["crop_pct"] == options.crop_pct
    assert (tuple(cfg["mean"]), tuple(cfg["std"]), cfg["interpolation"]) == options.normal
    assert "same label for 4 of 4" in text and f"timm's {theirs}" in text


@pytest.mark.parametrize(
    ("licence", "said"),
    [(None, "whose licence is not known here: write it above"), ("cc-by-nc-4.0", "under cc-by-nc-4.0")],
)
def test_the_licence_is_that_of_the_weights_or_none(licence, said, make_model, tmp_path):
    model = make_model("FT-Last", "timm/test_efficientnet", num_classes=None, label_names=LABELS)
    model.config = replace(model.config, backbone=replace(model.config.backbone, license=licence))
    for overwrite in (False, True):
        model.export(tmp_path / "repo", format="timm", check_images=1, overwrite=overwrite)
        card = (tmp_path / "repo" / "README.md").read_text()
        assert ModelCard(card).data.license == (licence or "unknown") and said in card
        cfg = json.loads((tmp_path / "repo" / "config.json").read_text())["pretrained_cfg"]
        assert cfg.get("license") == licence


def test_a_photo_is_cropped_as_here_where_the_weights_of_timm_were_evaluated_otherwise(exported):
    assert timm.get_pretrained_cfg("tf_efficientnetv2_b3").crop_mode == "squash"
    _, folder, _ = exported("FT-Last", "timm/tf_efficientnetv2_b3")
    cfg = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{folder}", pretrained=True))
    photo = np.zeros((90, 180, 3), np.uint8)
    photo[:, 45:135] = 255  # white but for what a centre crop leaves out
    view = timm.data.create_transform(**{**cfg, "mean": (0, 0, 0), "std": (1, 1, 1)})(Image.fromarray(photo))
    assert cfg["crop_mode"] == "center" and view.mean() > 0.99


def test_the_pipeline_of_transformers_gives_the_same_probabilities(exported):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, folder, _ = exported("TinyTL-B", "timm/test_efficientnet")
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IMAGES).logits, model(IMAGES), atol=1e-5, rtol=1e-5)
        ours = model(model.preprocess(photo)).softmax(1)[0]
    for line in transformers.pipeline("image-classification", model=str(folder))(photo):
        assert line["score"] == pytest.approx(ours[LABELS.index(line["label"])].item(), abs=0.02)  # resized by Pillow


@pytest.mark.parametrize(
    ("method", "backbone", "message"),
    [
        (
            "TinyTL-L+B",
            "mobilenet_v2",
            "adds lite residuals, which timm's networks lack; use --format onnx, or",
        ),
        ("FT-Last", "mobilenet_v3_small", "timm has no network with the tensors of torchvision's mobilenet_v3_small"),
    ],
)
def test_what_timm_cannot_hold_is_refused_by_name(method, backbone, message, make_model, tmp_path):
    with pytest.raises(TinyTLError, match=message):
        make_model(method, backbone).export(tmp_path / "repo", format="timm")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["README.md", "config.json", "model.safetensors", "adapter_config.json"])
def test_files_of_mine_in_a_folder_are_not_replaced(file, make_model, tmp_path, monkeypatch):
    model = make_model("FT-Last", "resnet18")
    if file == "adapter_config.json":
        model.save_pretrained(tmp_path)
    else:
        (tmp_path / file).write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        TinyTLError, match=r"output=.*: (is there, and was not written by this|holds a \w+\.\w+ without)"
    ):
        model.export(".", format="timm", check_images=1, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_model_that_timm_itself_saved_is_not_replaced(make_model, tmp_path):
    labels = {"label_names": LABELS}
    timm.models.save_for_hf(timm.create_model("resnet18"), tmp_path, model_config=labels, safe_serialization=True)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(TinyTLError, match=r"holds a config.json without the README.md of an export"):
        make_model("FT-Last", "resnet18").export(tmp_path, format="timm", check_images=1, overwrite=True)
    assert (tmp_path / "model.safetensors").read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_the_current_folder_and_one_behind_a_link_can_get_an_export_again(exported, make_model, tmp_path, monkeypatch):
    _, folder, _ = exported("FT-Last", "resnet18")
    (tmp_path / "link").symlink_to(folder)
    (folder / "notes.txt").write_text("mine")
    monkeypatch.chdir(folder)
    for output, label in ((".", "one"), (tmp_path / "link", "two")):
        other = make_model("FT-Last", "resnet18", num_classes=None, label_names=[label, "b"])
        other.export(output, format="timm", check_images=1, overwrite=True)
        assert json.loads((folder / "config.json").read_text())["label_names"] == [label, "b"]
    assert (folder / "notes.txt").read_text() == "mine" and len(list(folder.iterdir())) == 4
    assert (tmp_path / "link").is_symlink() and len(list(tmp_path.iterdir())) == 2


def test_the_lines_to_copy_load_and_push_a_folder_of_any_name(make_model, tmp_path):
    folder = tmp_path / 'my "best" model'
    text = make_model("FT-Last", "resnet18").export(folder, format="timm", check_images=1)
    load = re.search(r"load it with (timm\.create_model\(.*\)), and", text)[1]
    assert eval(load, {"timm": timm}).num_classes == 4
    words = shlex.split(re.search("tinytl-hf push (.*)", text)[1])
    assert words == ["--adapter", str(folder), "--repo", "user/name"]


def test_names_of_classes_do_nothing_to_the_page(make_model, tmp_path):
    labels = ["a\nb", "<b>x<", "user/name", "d"]
    model = make_model("FT-Last", "resnet18", num_classes=None, label_names=labels)
    model.export(tmp_path / "repo", format="timm", check_images=1)
    text = (tmp_path / "repo" / "README.md").read_text()
    assert r"(a b, \<b\>x\<, user/name, d)" in text or (r"\<b\>x\<" in text and "a\nb" not in text)
    assert json.loads((tmp_path / "repo" / "config.json").read_text())["label_names"] == labels


def test_an_adapter_and_a_timm_model_do_not_share_a_repository(exported, make_model, server, tmp_path):
    _, folder, _ = exported("FT-Last", "resnet18")
    make_model("FT-Last", "resnet18").save_pretrained(tmp_path / "adapter")
    for number, (first, second) in enumerate([(folder, tmp_path / "adapter"), (tmp_path / "adapter", folder)]):
        repo = f"me/flowers{number}"
        assert run_cli("push", "--adapter", first, "--repo", repo).returncode == 0
        files = set(server.repos[repo].files())
        done = run_cli("push", "--adapter", second, "--repo", repo)
        assert done.returncode == 1 and f"repo={repo}: holds a" in done.stderr
        assert set(server.repos[repo].files()) == files


def test_push_puts_it_on_the_hub_in_one_commit(exported, server):
    _, folder, _ = exported("FT-Last", "resnet18")
    done = run_cli("push", "--adapter", folder, "--repo", "me/flowers")
    assert done.returncode == 0, done.stderr
    repo = server.repos["me/flowers"]
    assert {"README.md", "config.json", "model.safetensors"} <= set(repo.files())
    assert repo.messages()[-1] == "Upload timm model"
    assert b'timm.create_model("hf-hub:me/flowers"' in repo.files()["README.md"].content
    run_cli("push", "--adapter", folder, "--repo", "me/flowers")
    assert len(repo.commits) == 2  # the second push had nothing to add


def test_what_a_person_wrote_into_the_card_stays_here_and_on_the_hub(make_model, server, tmp_path):
    folder = tmp_path / "repo"
    card = folder / "README.md"
    for label in ("one", "two"):
        model = make_model("FT-Last", "resnet18", num_classes=None, label_names=[label, "b"])
        model.export(folder, format="timm", check_images=1, overwrite=True)
        done = run_cli("push", "--adapter", folder, "--repo", "me/flowers")
        assert done.returncode == 0, done.stderr
        there = server.repos["me/flowers"].files()["README.md"].content.decode()
        assert f"2 classes ({label}, b)" in there and 'timm.create_model("hf-hub:me/flowers"' in there
        if label == "one":
            server.add_repo("me/flowers", {"README.md": f"{there}\nOf the garden.\n".encode()})
    assert "Of the garden." in there
    card.write_text(card.read_text().replace("license: unknown", "license: mit") + "\nWritten here.\n")
    model.export(folder, format="timm", check_images=1, overwrite=True)
    text = card.read_text()
    assert "license: mit" in text and "Written here." in text and text.count("fine-tuned with tinytl_hf") == 1
