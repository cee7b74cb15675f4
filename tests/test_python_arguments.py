"""What callers hand to the Python API by mistake: one clear error, and nothing of theirs is lost."""

import importlib
import json
import os
import re
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
import torchvision
from shared import run_cli

import tinytl_hf
from tinytl_hf import TinyTLError, TinyTLModel, load_merged
from tinytl_hf.config.data import DataConfig


@pytest.fixture
def adapter(make_model, tmp_path):
    make_model("FT-Last").save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("method", "argument"),
    [
        ("from_backbone", "weights"),
        ("from_pretrained", "pretrained_model_name_or_path"),
        ("from_pretrained", "weights"),
        ("save_pretrained", "save_directory"),
        ("load_adapter", "path"),
        ("load_adapter", "weights"),
        ("export", "output"),
    ],
)
def test_what_can_be_a_path_is_typed_as_one(method, argument):
    kind = get_type_hints(getattr(TinyTLModel, method), vars(importlib.import_module("tinytl_hf.model")))[argument]
    assert {str, os.PathLike[str]} <= set(get_args(kind))


@pytest.mark.parametrize("name", [5, None, b"adapter", ["adapter"], True])
def test_what_is_no_path_is_named_where_an_adapter_is_loaded_or_saved(name, make_model):
    model = make_model("FT-Last")
    for call in (TinyTLModel.from_pretrained, model.save_pretrained, lambda path: model.load_adapter(path, "b")):
        with pytest.raises(TinyTLError, match="use the path of a folder, or user/name on the Hub"):
            call(name)


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        *((name, {}, r"output=.*: name the .onnx file, the .pte file or the folder") for name in (5, None, b"m.onnx")),
        ("a\0.onnx", {}, r"output=a\\0\.onnx: no path can have a NUL"),
        ("m.onnx", {"data": "digits"}, r"data=digits: use a DataConfig of tinytl_hf.config.data"),
        ("m.onnx", {"weights": "lost.pth"}, r"weights=lost.pth: export has no such option; it has train"),
        ("m.onnx", {"revision": "main"}, r"revision=main: export has no such option"),
        ("m.onnx", {"quantize": "int8", "check_images": 4}, r"check_images=4: 8 bits are checked on the whole"),
        ("m", {"format": "timm", "layout": "NHWC"}, r"^layout=NHWC: a timm model gets"),
        ("m.pte", {"format": "executorch", "train": True, "layout": "NHWC"}, r"^layout=NHWC: a training step gets"),
        ("m.pte", {"format": "executorch", "train": True, "input": "uint8"}, r"^input=uint8: a training step gets"),
        ("m.safetensors", {"format": "timm"}, r"output=m.safetensors: name a folder"),
    ],
)
def test_what_an_export_cannot_use_is_named(output, options, message, make_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TinyTLError, match=message):
        make_model("FT-Last").export(output, **{"format": "onnx", **options})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_path_is_not_the_current_folder(name, make_model, adapter, monkeypatch):
    monkeypatch.chdir(adapter)
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    for call in (TinyTLModel.from_pretrained, make_model("TinyTL-B").save_pretrained):
        with pytest.raises(TinyTLError, match="it is empty, as of a variable that is not set; name a folder"):
            call(name)
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("https://huggingface.co/user/name", "adapter=https://huggingface.co/user/name: is an address"),
        ("hf-hub:user/name", "named as user/name"),
        ("nowhere", "nowhere is no adapter: .* as there is no such folder"),
        ("adapter/adapter_config.json", "as it is a file; name adapter$"),
        ("photo.png", "as it is a file; name the folder of an adapter$"),
        ("model.onnx", "which predict alone takes; name the adapter that it was exported from$"),
        ("model.pte", "as it is an exported file for ExecuTorch; name the adapter that it was exported from$"),
        ("merged.safetensors", "as it is a file of weights; .* with tinytl_hf.load_merged$"),
        ("adapter/adapter_model.safetensors", "as it is a file; name adapter$"),
        ("timm", "timm is no adapter: .* as it is a model for timm; name the adapter that it was exported from$"),
        ("other", "other is no adapter: it has no adapter_config.json$"),
    ],
)
def test_what_leads_to_no_adapter_says_why(name, message, adapter, monkeypatch):
    monkeypatch.chdir(adapter.parent)
    for folder in ("timm", "other"):
        (adapter.parent / folder).mkdir()
    of_timm = ("timm/config.json", "timm/model.safetensors")
    for file in ("photo.png", "model.onnx", "model.pte", "merged.safetensors", "other/model.safetensors", *of_timm):
        (adapter.parent / file).touch()
    with pytest.raises(TinyTLError, match=message):
        TinyTLModel.from_pretrained(name)


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "\ud800"])
def test_a_name_that_no_folder_can_have_is_one_error(name, make_model):
    for call in (TinyTLModel.from_pretrained, make_model("FT-Last").save_pretrained):
        with pytest.raises(TinyTLError, match="no folder can be called so"):
            call(name)


@pytest.mark.parametrize("weights", [5, "", " ", ["none"]])
def test_what_is_no_source_of_weights_is_named(weights, adapter):
    model = TinyTLModel.from_pretrained(adapter)
    for call in (TinyTLModel.from_pretrained, lambda path, **o: model.load_adapter(path, "b", **o)):
        with pytest.raises(TinyTLError, match=r"weights=.*: use imagenet, a file or none, for example"):
            call(adapter, weights=weights)


def test_a_file_of_weights_may_be_a_path_of_pathlib(make_model, tmp_path):
    model = make_model("TinyTL-B")
    file = tmp_path / "w.pth"
    torch.save(model.backbone.state_dict(), file)
    model.save_pretrained(tmp_path / "adapter")
    again = TinyTLModel.from_pretrained(tmp_path / "adapter", weights=file)
    again.load_adapter(tmp_path / "adapter", "b", weights=file)
    assert again.config.backbone.sha256 == model.config.backbone.sha256 and again.adapter_names == ["default", "b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lean": False}, "lean=False: another adapter has that of the model it is loaded into; leave it out"),
        ({"allow_patterns": "*"}, r"allow_patterns=\*: loading an adapter has no such argument"),
        ({"dry_run": True}, "dry_run=True: loading an adapter has no such argument"),
        ({"cache_dir": 5}, "user/name is no folder here, and loading it from the Hub failed: .*TypeError"),
    ],
)
def test_options_of_a_download_are_checked(options, message, make_model):
    with pytest.raises(TinyTLError, match=message):
        make_model("FT-Last").load_adapter("user/name", "b", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": 5}, r"metrics=5: use figures by name"),
        ({"metrics": {"acc": 0.9}}, r"a card shows accuracy, .*; use one of those"),
        ({"metrics": {"accuracy": "high"}}, r"metrics: accuracy is 'high'; use a number from 0 to 1"),
        ({"metrics": {"accuracy": 91.5}}, r"metrics: accuracy=91.5: use a number from 0 to 1"),
        ({"metrics": {"accuracy": True}}, r"metrics: accuracy=True: use a number from 0 to 1"),
        ({"metrics": {"ece": float("nan")}}, r"metrics: ece=nan: use a number from 0 to 1"),
        ({"data": "flowers"}, r"data='flowers': use a DataRecord of tinytl_hf.adapter.record"),
    ],
)
def test_what_a_card_would_say_wrong_or_not_at_all_is_refused(options, message, make_model, tmp_path):
    with pytest.raises(TinyTLError, match=message):
        make_model("FT-Last").save_pretrained(tmp_path, **options)
    assert not any(tmp_path.iterdir())


def test_figures_of_numpy_and_torch_are_shown(make_model, tmp_path):
    metrics = {"accuracy": np.float32(0.5), "f1": torch.tensor(0.25), "loss": 1.5}
    make_model("FT-Last").save_pretrained(tmp_path, metrics=metrics)
    card = (tmp_path / "README.md").read_text()
    assert "0.5000" in card and "0.2500" in card


def test_an_adapter_of_another_library_is_not_written_over(make_model, tmp_path):
    theirs = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b"theirs"}
    for name, content in theirs.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TinyTLError, match=r"adapter_config.json is not of this package.* save to another folder"):
        make_model("FT-Last").save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == theirs


def test_a_key_that_a_config_has_twice_is_refused_and_a_byte_order_mark_is_not(adapter):
    file = adapter / "adapter_config.json"
    text = file.read_text()
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    TinyTLModel.from_pretrained(adapter)
    file.write_text(text.replace('"eval_size": 64', '"eval_size": 64, "eval_size": 96'))
    assert len(json.loads(file.read_text())["preprocessing"]) == 6
    with pytest.raises(TinyTLError, match="is not valid JSON: 'eval_size' is there more than once"):
        TinyTLModel.from_pretrained(adapter)


@pytest.mark.parametrize("method", [["TinyTL-B"], None, {"a"}])
def test_a_method_that_is_no_name_is_named(method, make_model):
    with pytest.raises(TinyTLError, match=r"method=.*: use one of FT-Last"):
        make_model(method)


def test_learning_rates_of_another_type_are_named(make_model):
    model = make_model("FT-Last")
    with pytest.raises(TinyTLError, match="lr=fast: use a number"):
        model.parameter_groups("fast", 0.0)
    with pytest.raises(TinyTLError, match=r"factors={'head': 3}: use an LrFactors of tinytl_hf.config.train"):
        model.parameter_groups(1e-3, 0.0, factors={"head": 3})


@pytest.mark.parametrize("images", [np.zeros((1, 3, 64, 64), np.float32), torch.zeros(1, 3, 64, 64).byte(), Path("x")])
def test_features_are_of_normalised_images(images, make_model):
    with pytest.raises(TinyTLError, match=r"use normalised ones \[N, 3, H, W\]"):
        make_model("FT-Last").features(images)


class Place:
    """A path of another kind, which says what it is as an entry of ``os.scandir`` does."""

    def __init__(self, path):
        self.path = str(path)

    def __fspath__(self):
        return self.path

    def __repr__(self):
        return "<Place>"


def test_paths_of_any_kind_are_taken(make_model, tmp_path):
    model = make_model("FT-Last")
    model.save_pretrained(Place(tmp_path / "adapter"))
    loaded = TinyTLModel.from_pretrained(Place(tmp_path / "adapter"), weights="none", lean=False)
    loaded.load_adapter(Place(tmp_path / "adapter"), "again")
    done = run_cli("merge", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged.safetensors")
    assert done.returncode == 0, done.stderr
    assert load_merged(Place(tmp_path / "merged.safetensors")).config.method == "FT-Last"
    for wrong in (Place(tmp_path / "nowhere.safetensors"), Place("")):
        with pytest.raises(TinyTLError, match=r"nowhere|path="):
            load_merged(wrong)
    torch.save(torchvision.models.mobilenet_v2().state_dict(), tmp_path / "weights.pth")
    built = TinyTLModel.from_backbone("mobilenet_v2", num_classes=2, weights=Place(tmp_path / "weights.pth"))
    assert built.config.backbone.weights == str(tmp_path / "weights.pth")
    assert DataConfig(dataset=Place(tmp_path)).dataset == str(tmp_path)


def test_the_package_exports_what_its_page_lists():
    page = (Path(tinytl_hf.__file__).parent / "adapter" / "README.md").read_text()
    table = page.partition("What `tinytl_hf` exports:")[2].partition("\nThe method alone")[0]
    listed = {name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"\w+", row)}
    assert listed == set(tinytl_hf.__all__) - {"__version__"}
    assert all(getattr(tinytl_hf, name).__module__.startswith("tinytl_hf.") for name in listed)
