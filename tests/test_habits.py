"""What people who know PEFT, timm and PyTorch do by habit: it works, or one line says what to do instead."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from shared import ROOT
from torch import nn
from torch.nn.utils import parametrize, prune

from tinytl_hf import LiteConfig, TinyTLError, TinyTLModel
from tinytl_hf.network.head import Head

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
ANOTHER_HEAD = "^the network's head was replaced by a layer of another kind, .*; build the model with num_classes= or"
HEADS = {
    "of other classes": (lambda net: net.classifier.__setitem__(1, nn.Linear(1280, 7)), ANOTHER_HEAD),
    "of as many": (lambda net: net.classifier.__setitem__(1, nn.Linear(1280, 4)), ANOTHER_HEAD),
    "in place of all": (lambda net: setattr(net, "classifier", nn.Linear(1280, 7)), ANOTHER_HEAD),
    "of two layers": (
        lambda net: setattr(net, "classifier", nn.Sequential(nn.Linear(1280, 8), nn.Linear(8, 4))),
        "head",
    ),
    "of our own": (
        lambda net: net.classifier.__setitem__(1, Head(1280, 7)),
        r"^classifier\.1\.weight has another shape",
    ),
}


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_another_head_is_refused_before_it_trains_not_when_it_is_saved(head, lean, make_model):
    model = make_model("TinyTL-B", lean=lean).train()
    model(IMAGES)
    change, message = HEADS[head]
    change(model.backbone)
    with pytest.raises(TinyTLError, match=message):
        model.train()(IMAGES)
    assert model.eval()(IMAGES).shape[0] == len(IMAGES)


def test_timms_reset_classifier_is_refused_before_it_trains(make_model):
    model = make_model("TinyTL-B", "timm/mobilenetv3_small_050")
    model.backbone.reset_classifier(7)
    with pytest.raises(TinyTLError, match=ANOTHER_HEAD):
        model.train()(IMAGES)


def test_a_network_without_a_head_trains_for_its_features(make_model):
    model = make_model("TinyTL-B").train()
    model.backbone.classifier[1] = nn.Identity()
    features = model(IMAGES)
    assert features.shape == (2, 1280)
    features.square().sum().backward()
    assert model.backbone.features[0][1].bias.grad.abs().sum() > 0


@pytest.mark.parametrize("method", ["TinyTL-B", "FT-Full"])
@pytest.mark.parametrize("lean", [True, False])
def test_norms_that_pytorch_would_synchronise_are_refused_before_they_train(lean, method, make_model, tmp_path):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(make_model(method, lean=lean)).train()
    means = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(TinyTLError, match=r"^features\.0\.1 is a SyncBatchNorm.*leave convert_sync_batchnorm out"):
        model(IMAGES)
    assert all(torch.equal(buffer, means[name]) for name, buffer in model.named_buffers())


ADDED = {
    "a frozen layer": (lambda net: net.features[0].append(nn.Conv2d(32, 32, 1)), "features.0.3.bias came into the"),
    "a norm": (
        lambda net: net.features[0].append(nn.BatchNorm2d(32, affine=False)),
        "features.0.3.num_batches_tracked",
    ),
    "a buffer": (lambda net: net.register_buffer("seen", torch.zeros(1)), "^seen came into the network"),
    "frozen weights that are pruned": (
        lambda net: prune.l1_unstructured(net.features[0][0], "weight", amount=0.5),
        "^features.0.0.weight is not in the network any more",
    ),
    "frozen weights that are parametrized": (
        lambda net: parametrize.register_parametrization(net.features[0][0], "weight", nn.Identity()),
        "^features.0.0.weight is not in the network any more",
    ),
    "tied biases": (
        lambda net: setattr(net.features[3].conv[0][1], "bias", net.features[3].conv[1][1].bias),
        "bias is not in the network any more, as a layer was added, replaced, tied",
    ),
}


@pytest.mark.parametrize("method", ["TinyTL-B", "FT-Full"])
@pytest.mark.parametrize("what", ADDED)
def test_a_network_with_other_tensors_than_it_was_built_with_is_not_saved(what, method, make_model, tmp_path):
    model = make_model(method, lean=False)
    change, message = ADDED[what]
    change(model.backbone.to(memory_format=torch.contiguous_format))  # in which weights can be pruned
    model.requires_grad_(False)
    with pytest.raises(TinyTLError, match=message):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_pruned_weights_are_saved_once_they_are_plain_again(make_model, tmp_path):
    model = make_model("FT-Full", lean=False).to(memory_format=torch.contiguous_format)
    conv = model.backbone.features[0][0]
    prune.l1_unstructured(conv, "weight", amount=0.5)
    prune.remove(conv, "weight")
    model.save_pretrained(tmp_path)
    found = TinyTLModel.from_pretrained(tmp_path).backbone.features[0][0].weight
    assert torch.equal(found, conv.weight) and (found == 0).float().mean() == 0.5


@pytest.mark.parametrize("method", ["TinyTL-B", "TinyTL-L+B"])
@pytest.mark.parametrize("frozen_weights", ["fp32", "int8"])
def test_what_is_stored_otherwise_is_no_other_network(frozen_weights, method, make_model, tmp_path):
    model = make_model(method, frozen_weights=frozen_weights).train()
    model(IMAGES).sum().backward()
    model.save_pretrained(tmp_path)
    assert torch.equal(TinyTLModel.from_pretrained(tmp_path)(IMAGES), model.eval()(IMAGES))


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("method", ["TinyTL-L+B", "TinyTL-B", "FT-Full"])
def test_gradients_lie_as_their_parameters_so_that_several_processes_need_not_copy_them(method, backend, make_model):
    model = make_model(method, backend=backend).train()
    model(IMAGES).square().sum().backward()
    found = {name: (p.grad.stride(), p.stride()) for name, p in model.named_parameters() if p.requires_grad}
    assert found and {name: strides for name, strides in found.items() if len(set(strides)) > 1} == {}


def test_timms_network_says_how_many_classes_it_has(make_model):
    net = make_model("FT-Last", "timm/mobilenetv3_small_050").eval().backbone
    assert net.num_classes == net.forward_head(net.forward_features(IMAGES)).shape[1] == 4


@pytest.mark.parametrize("config", ["mobilenet_v2", None, nn.Linear(3, 3)])
def test_what_is_no_config_says_how_models_are_made(config):
    with pytest.raises(
        TinyTLError, match=r"^config=.*: build a model with TinyTLModel.from_backbone or from_pretrained"
    ):
        TinyTLModel(config)


def test_a_network_in_place_of_its_name_is_named_in_one_line(make_model):
    network = make_model("FT-Last").backbone
    with pytest.raises(TinyTLError, match=r"^name=a MobileNetV2: use the name .*state_dict\(\), with weights=$"):
        TinyTLModel.from_backbone(network, num_classes=2)
    with pytest.raises(TinyTLError, match=r"^lite=a MobileNetV2: use a LiteConfig"):
        make_model(lite=network)
    with pytest.raises(TinyTLError, match=r"^head=LiteConfig\(.*\): use a HeadConfig"):
        make_model(head=LiteConfig())


@pytest.mark.parametrize("count", [0, -1, None])
def test_a_number_of_classes_that_there_cannot_be_is_named(count, make_model):
    with pytest.raises(
        TinyTLError, match=rf"^num_classes={count}: use 1 or more, or name the classes with label_names$"
    ):
        make_model(num_classes=count)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("num_classes", "; use weights, lean,"),
        ("torch_dtype", r"move and cast what was loaded with model\.to\(\)$"),
        ("device", r"move and cast what was loaded with model\.to\(\)$"),
        ("revison", r"did you mean revision\?$"),
        ("local_file_only", r"did you mean local_files_only\?$"),
    ],
)
def test_arguments_of_other_libraries_get_no_far_fetched_hint(name, hint, make_model, tmp_path):
    make_model("FT-Last").save_pretrained(tmp_path)
    with pytest.raises(TinyTLError, match=f"^{name}=1: loading an adapter has no such argument.*{hint}"):
        TinyTLModel.from_pretrained(tmp_path, **{name: 1})


@pytest.mark.parametrize("tensors", [None, "adapter_model.safetensors", [("a", torch.zeros(1))], {"a": np.zeros(1)}])
def test_what_are_no_tensors_by_name_is_said(tensors, make_model):
    with pytest.raises(TinyTLError, match=r"^mine: use tensors by name, as adapter_tensors\(\) gives them$"):
        make_model("FT-Last").load_adapter_tensors(tensors, source="mine")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"lr": lr}, f"^lr={lr}: use a number, 0 or more") for lr in (-1e-3, float("nan"), float("inf"), True)),
        *(
            ({"weight_decay": decay}, f"^weight_decay={decay}: use a number, 0 or more")
            for decay in (-0.1, None, "0.1")
        ),
        ({"decay_all": "no"}, "^decay_all=no: use True or False"),
    ],
)
def test_rates_that_an_optimizer_would_take_in_silence_are_refused(options, message, make_model):
    with pytest.raises(TinyTLError, match=message):
        make_model("FT-Last").parameter_groups(**{"lr": 1e-3, "weight_decay": 0.0, **options})


@pytest.mark.parametrize(
    ("pixels", "sizes", "message"),
    [
        (torch.zeros(2, 3, 40, 50), torch.full((2, 2), 40), r"^pixels: use a tensor \[N, 3, H, W\] of uint8"),
        (torch.zeros(3, 40, 50).byte(), torch.full((2,), 40), r"^pixels: use a tensor \[N, 3, H, W\] of uint8"),
        (np.zeros((2, 3, 40, 50), np.uint8), torch.full((2, 2), 40), r"^pixels: use a tensor \[N, 3, H, W\] of uint8"),
        (torch.zeros(2, 3, 40, 50).byte(), torch.full((1, 2), 40), r"^sizes: use a tensor \[2, 2\]"),
        (torch.zeros(2, 3, 40, 50).byte(), [[40, 50]] * 2, r"^sizes: use a tensor \[2, 2\]"),
        (
            torch.zeros(2, 3, 40, 50).byte(),
            torch.tensor([[40, 50], [50, 40]]),
            "heights from 1 to 40 px and widths from",
        ),
        (
            torch.zeros(2, 3, 40, 50).byte(),
            torch.tensor([[40, 50], [0, 40]]),
            "heights from 1 to 40 px and widths from",
        ),
    ],
)
def test_what_are_no_padded_images_with_their_sizes_is_named(pixels, sizes, message, make_model):
    with pytest.raises(TinyTLError, match=message):
        make_model("FT-Last").normalise(pixels, sizes)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.array([["a.jpg"]]), r"^array \[1, 1\] of <U5 holds no numbers: use PIL images"),
        (np.array([[None]]), r"^array \[1, 1\] of object holds no numbers: use PIL images"),
        (torch.zeros(3, 40, 50, dtype=torch.bool), r"^tensor \[3, 40, 50\] of torch.bool holds no numbers"),
        (torch.zeros(3, 40, 50, device="meta"), r"is on the meta device, and holds no pixels"),
    ],
)
def test_arrays_that_hold_no_pixels_are_named(image, message, make_model):
    with pytest.raises(TinyTLError, match=message):
        make_model("FT-Last").preprocess(image)


def test_a_type_checker_knows_what_the_package_has_and_what_not(tmp_path):
    (tmp_path / "user.py").write_text(
        "import tinytl_hf\nmodel: tinytl_hf.TinyTLModel\nother = tinytl_hf.TinyTLModell\n"
    )
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file=",
        "--follow-imports=silent",
        "--no-site-packages",
        "user.py",
    ]
    command += ["--ignore-missing-imports", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "MYPYPATH": str(ROOT)}
    )
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1 and errors[0].startswith("user.py:3: error: Module has no attribute"), done.stdout


@pytest.mark.parametrize("load", ["from_pretrained", "load_adapter"])
@pytest.mark.parametrize(
    "change", [lambda backbone: backbone.pop("sha256"), lambda backbone: backbone.update(sha256=None)]
)
def test_a_config_that_lost_the_hash_of_the_weights_is_said_to_have_none(change, load, make_model, tmp_path):
    model = make_model("TinyTL-B")
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    change(values["backbone"])
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    loads = {
        "from_pretrained": TinyTLModel.from_pretrained,
        "load_adapter": lambda path: model.load_adapter(path, "b"),
    }
    with pytest.raises(TinyTLError, match=r"backbone\.sha256 is missing in its adapter_config\.json"):
        loads[load](tmp_path)


def test_an_enumeration_of_torchvisions_weights_is_told_its_name(make_model, tmp_path):
    weights = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V2
    make_model("FT-Last").save_pretrained(tmp_path)
    for call in (lambda: make_model(weights=weights), lambda: TinyTLModel.from_pretrained(tmp_path, weights=weights)):
        with pytest.raises(TinyTLError, match=r"use imagenet, a file or none, .*, and here IMAGENET1K_V2 as a text$"):
            call()
