"""Files of weights as training code leaves them."""

import pickle

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from tinytl_hf import TinyTLError, TinyTLModel


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
