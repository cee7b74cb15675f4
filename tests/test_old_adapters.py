"""Adapters that version 0.1 wrote (format 1) load as they did there."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tinytl_hf import TinyTLError, TinyTLModel
from tinytl_hf.adapter.format import read_config

FOLDER = Path(__file__).with_name("adapters_of_0_1")
SIZES = {"last": (32, 32), "int8": (32, 32), "lite_two_sizes": (32, 64)}


@pytest.fixture
def old(request, tmp_path):
    """A copy of an old adapter, whose hash is that of this machine's random weights: their last bits can differ."""
    path = tmp_path / request.param
    shutil.copytree(FOLDER / request.param, path)
    config = json.loads((path / "adapter_config.json").read_text())
    config["backbone"]["sha256"] = TinyTLModel(read_config(path)).config.backbone.sha256
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("old", SIZES, indirect=True)
def test_an_adapter_of_version_0_1_gives_the_logits_that_it_gave_there(old):
    model = TinyTLModel.from_pretrained(old).eval()
    sizes = model.config.preprocessing
    assert (sizes.train_size, sizes.eval_size) == SIZES[old.name]
    expected = json.loads((old / "logits.json").read_text())
    images = torch.rand(2, 3, sizes.eval_size, sizes.eval_size, generator=torch.Generator().manual_seed(1))
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8))
    with torch.no_grad():
        torch.testing.assert_close(model(images), torch.tensor(expected["logits"]), atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(model(model.preprocess(photo)), torch.tensor(expected["pre"]), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("old", ["lite_two_sizes"], indirect=True)
def test_an_old_adapter_is_written_again_in_the_new_format(old, tmp_path):
    model = TinyTLModel.from_pretrained(old)
    model.save_pretrained(tmp_path / "new")
    written = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert written["format_version"] == 2 and "image_size" not in written["preprocessing"]
    assert (written["preprocessing"]["train_size"], written["preprocessing"]["eval_size"]) == (32, 64)
    again = TinyTLModel.from_pretrained(tmp_path / "new").eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(images), model.eval()(images))


def rewritten(folder, tmp_path, **changes):
    shutil.copytree(folder, tmp_path / "changed")
    path = tmp_path / "changed" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return tmp_path / "changed"


def test_a_key_of_a_newer_version_is_a_warning_and_an_unknown_one_of_this_an_error(tmp_path, caplog):
    changed = rewritten(FOLDER / "last", tmp_path, tinytl_hf_version="99.0", colours=["red"])
    with caplog.at_level(logging.WARNING):
        assert read_config(changed).method == "FT-Last"
    assert "colours is of a newer tinytl_hf and left out" in caplog.text
    shutil.rmtree(changed)
    with pytest.raises(TinyTLError, match="colours is no setting"):
        read_config(rewritten(FOLDER / "last", tmp_path, colours=["red"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_names": [1, 2]}, "label_names is 1, not str"),
        ({"label_names": "cat"}, "label_names is 'cat', not list"),
        ({"method": "LoRA"}, "method is 'LoRA', not 'FT-Last' or 'TinyTL-B'"),
        ({"backbone": "resnet18"}, "backbone is 'resnet18', not an object"),
        ({"backbone": {"name": "resnet18"}}, "backbone.weights is missing"),
        ({"preprocessing": {"image_size": "32"}}, "preprocessing.eval_size is '32', not int"),
        ({"preprocessing": {"image_size": 32, "mean": [0.5]}}, "preprocessing.mean is \\[0.5\\], not tuple"),
        ({"preprocessing": {"image_size": True}}, "preprocessing.eval_size is True, not int"),
        ({"lite": {"kernel_size": 4}}, "lite.kernel_size=4: use an odd number"),
        ({"lite": {"kernel_size": {"class_path": "os.system"}}}, "lite.kernel_size is .*, not int"),
        ({"format_version": 3}, "pip install --upgrade tinytl-hf"),
        ({"format_version": None}, "it has no format_version"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_the_key_and_the_value(changes, message, tmp_path):
    with pytest.raises(TinyTLError, match=message):
        read_config(rewritten(FOLDER / "last", tmp_path, **changes))
