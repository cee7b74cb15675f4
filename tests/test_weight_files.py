"""Files of weights as training code leaves them."""

import pickle
import random
import re

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from tinytl_hf import TinyTLError, TinyTLModel
from tinytl_hf.network.backbones import create_backbone
from tinytl_hf.network.weights import copy_weights, read_file


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(7)
    return torchvision.models.mobilenet_v2(num_classes=5).state_dict()


def prefixed(tensors, prefix):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def build(path):
    return TinyTLModel.from_backbone("mobilenet_v2", method="FT-Last", num_classes=3, weights=str(path), train_size=32)


@pytest.mark.parametrize(
    ("name", "wrap", "said"),
    [
        ("w.pth", lambda tensors: tensors, None),
        ("w.bin", lambda tensors: {"state_dict": tensors, "epoch": 3}, "taken is its 'state_dict'"),
        ("w.pt", lambda tensors: {"model": prefixed(tensors, "module.")}, "its 'model' without the prefix 'module.'"),
        ("w.pth", lambda tensors: {"model_state_dict": prefixed(tensors, "model.")}, "its 'model_state_dict'"),
        ("w.pt", lambda tensors: prefixed(tensors, "module._orig_mod."), "without the prefix 'module._orig_mod.'"),
        ("w.safetensors", lambda tensors: prefixed(tensors, "module."), "without the prefix 'module.'"),
        ("w.pth", lambda tensors: {"n_averaged": torch.tensor(3), **prefixed(tensors, "module.")}, "prefix 'module.'"),
        ("w.pth", lambda tensors: {name: tensor.half() for name, tensor in tensors.items()}, None),
    ],
)
def test_wrapped_weights_are_those_within_and_it_is_said(name, wrap, said, weights, tmp_path, caplog):
    caplog.set_level("INFO")
    (save_file if name.endswith("safetensors") else torch.save)(wrap(weights), tmp_path / name)
    loaded = build(tmp_path / name).backbone.state_dict()["features.0.0.weight"]
    torch.testing.assert_close(loaded, weights["features.0.0.weight"], atol=1e-3, rtol=1e-3)
    assert ("taken is" in caplog.text) == (said is not None) and (said or "") in caplog.text


@pytest.mark.parametrize(
    "content", [{}, {"state_dict": {}}, {"state_dict": 3}, [1], {"epoch": 3}, {"model": {"a": 1}}, {1: torch.ones(1)}]
)
def test_what_holds_no_weights_is_named(content, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(TinyTLError, match="holds no state dict"):
        build(tmp_path / "w.pth")


def test_a_pickled_network_is_not_run(weights, tmp_path):
    torch.save(torchvision.models.mobilenet_v2(), tmp_path / "w.pth")
    (tmp_path / "p.bin").write_bytes(pickle.dumps({"a": 1}))
    for name in ("w.pth", "p.bin"):
        with pytest.raises(TinyTLError) as caught:
            build(tmp_path / name)
        assert "not a readable weights file" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"\x80\x02)\x81.", b"\x80\x02}q\x00(X\x01", b"\x80\x02h\x05.", b"\x80\x02ctorch\n", b"", b"PK\3\4"]
)
def test_a_damaged_pickle_is_named(content, tmp_path):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(TinyTLError, match=r"w.pth: not a readable weights file \("):
        build(tmp_path / "w.pth")


def test_a_pickle_of_which_bytes_were_changed_is_read_or_named(weights, tmp_path):
    draw = random.Random(0)
    for is_zip in (True, False):
        torch.save(dict([*weights.items()][:3]), tmp_path / "w.pth", _use_new_zipfile_serialization=is_zip)
        whole = (tmp_path / "w.pth").read_bytes()
        refused = 0
        for _ in range(150):
            content = bytearray(whole)
            for _ in range(4):
                content[draw.randrange(900)] = draw.randrange(256)
            (tmp_path / "w.pth").write_bytes(content)
            try:
                read_file(tmp_path / "w.pth")
            except TinyTLError as error:
                refused += "w.pth" in str(error)
        assert refused > 100


@pytest.mark.parametrize(
    ("holder", "average"), [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("state_dict", None)]
)
def test_averaged_weights_beside_those_that_are_taken_are_named(holder, average, weights, tmp_path, caplog):
    others = {} if average is None else {average: {name: tensor + 1 for name, tensor in weights.items()}}
    torch.save({holder: weights, "optimizer": {"a": 1}, **others}, tmp_path / "w.pth")
    loaded = build(tmp_path / "w.pth").backbone.state_dict()["features.0.0.weight"]
    assert torch.equal(loaded, weights["features.0.0.weight"])
    assert (f"left out is its {average!r}" in caplog.text) == (average is not None) == ("left out" in caplog.text)


NAME = "features.3.conv.0.0.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), f"{NAME} (qint8)"),
        (lambda tensor: tensor.to(torch.int8), f"{NAME} (int8)"),
        (lambda tensor: tensor > 0, f"{NAME} (bool)"),
        (lambda tensor: tensor.to(torch.complex64), f"{NAME} (complex64)"),
        (lambda tensor: tensor.to_sparse(), f"{NAME} (float32, sparse)"),
        (lambda tensor: tensor.to("meta"), f"{NAME} (float32 on the meta device)"),
        (lambda tensor: tensor / 0, f"not finite, such as {NAME}"),
        (lambda tensor: tensor.double() * 1e300, f"not finite, such as {NAME}"),
    ],
)
def test_tensors_that_hold_no_finite_numbers_are_named_and_nothing_is_copied(change, said, weights, tmp_path):
    backbone = torchvision.models.mobilenet_v2()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    tensors = {**weights, NAME: change(weights[NAME])}
    with pytest.raises(TinyTLError) as caught:
        copy_weights(backbone, tensors, "classifier.1", source="w.pth")
    assert said in str(caught.value) and "1 tensor is" in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_numbers_are_read(dtype, weights):
    backbone = torchvision.models.mobilenet_v2()
    copy_weights(backbone, {name: tensor.to(dtype) for name, tensor in weights.items()}, "classifier.1", source="w")
    own = backbone.state_dict()[NAME]
    assert own.dtype == torch.float32 and torch.equal(own, weights[NAME].to(dtype).float())


def test_lite_residuals_in_a_file_are_left_out_aloud(weights, caplog):
    more = {
        "features.2.lite_residual.conv1.weight": torch.ones(3),
        "features.2.lite_residual.norm2.bias": torch.ones(3),
    }
    copy_weights(torchvision.models.mobilenet_v2(), weights, "classifier.1", source="w.pth")
    assert caplog.text == ""
    copy_weights(torchvision.models.mobilenet_v2(), {**weights, **more}, "classifier.1", source="w.pth")
    assert "w.pth: 2 tensors of lite residuals are left out" in caplog.text


@pytest.mark.parametrize("name", ["densenet121", "timm/densenet121"])
def test_a_file_of_densenet_with_the_names_of_its_time_loads(name, tmp_path):
    """Those that torchvision serves have dots in ``norm.1``, which its networks have no more."""
    if name.startswith("timm"):
        pytest.importorskip("timm")
    tensors = torchvision.models.densenet121().state_dict()
    today = "features.denseblock2.denselayer3.conv2.weight"
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2", key): value for key, value in tensors.items()}
    assert today not in old and today.replace("conv2", "conv.2") in old
    torch.save(old, tmp_path / "w.pth")
    backbone = create_backbone(name, str(tmp_path / "w.pth"), 3)
    own = {key: value for key, value in backbone.state_dict().items() if not key.startswith("classifier.")}
    assert len(own) > 600 and all(torch.equal(value, tensors[key]) for key, value in own.items())
