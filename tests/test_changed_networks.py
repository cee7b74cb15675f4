"""Networks that a user changes after they were built: the lean training pass follows as stock's does, or says so."""

from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, update_bn
from torchvision.ops import StochasticDepth

from tinytl_hf import TinyTLError

IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def make(make_model):
    def with_statistics(method="TinyTL-B", backbone="mobilenet_v2", **options):
        model, generator = make_model(method, backbone, **options).train(), torch.Generator().manual_seed(1)
        for name, buffer in model.named_buffers():
            if "running_mean" in name:
                buffer.normal_(0, 0.2, generator=generator)
            if "running_var" in name:
                buffer.uniform_(0.5, 1.5, generator=generator)
        for name, parameter in model.named_parameters():
            if name.endswith("lite_residual.norm2.weight"):
                nn.init.constant_(parameter, 0.5)
        return model

    return with_statistics


def norms_of(model):
    return [module for module in model.backbone.modules() if isinstance(module, nn.BatchNorm2d)]


class Larger(nn.Module):
    def forward(self, weight):
        return weight * 1.5


@pytest.mark.parametrize("method", ["TinyTL-B", "TinyTL-L+B"])
def test_parametrized_scales_of_frozen_norms_are_used(method, make):
    logits = []
    for lean in (True, False):
        model = make(method, lean=lean)
        for norm in [each for each in norms_of(model) if not each.weight.requires_grad]:
            parametrize.register_parametrization(norm, "weight", Larger())
            norm.parametrizations.weight.original.requires_grad_(False)
        logits.append(model(IMAGES))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-4)


def test_a_norms_epsilon_counts_when_it_changes(make):
    logits = []
    for lean in (True, False):
        model = make(lean=lean)
        model(IMAGES)
        for norm in norms_of(model):
            norm.eps = 0.1
        logits.append(model(IMAGES))
    torch.testing.assert_close(*logits, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["TinyTL-B", "TinyTL-L+B"])
def test_an_average_of_models_takes_statistics_anew_where_they_are_of_batches(method, make):
    model = make(method)
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    frozen = model.backbone.features[0][1].running_var.clone()
    update_bn([IMAGES, IMAGES.flip(-1)], averaged)
    assert torch.equal(averaged.module.backbone.features[0][1].running_var, frozen)
    if method == "TinyTL-L+B":
        norm = averaged.module.backbone.features[1].lite_residual.norm1
        means = []
        for images in (IMAGES, IMAGES.flip(-1)):
            alone = AveragedModel(model)
            update_bn([images], alone)
            means.append(alone.module.backbone.features[1].lite_residual.norm1.running_mean)
        torch.testing.assert_close(norm.running_mean, (means[0] + means[1]) / 2)


@pytest.mark.parametrize("fill", [1.0, 50.0])
def test_running_means_of_other_data_change_no_training_pass(fill, make):
    images, logits = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(2)), []
    for changed in (False, True):
        model = make("TinyTL-L+B")
        for name, buffer in model.named_buffers():
            if changed and "lite" in name and "running_mean" in name:
                buffer.fill_(fill)
        logits.append(model(images))
    assert (logits[0] - logits[1]).abs().max() < 5e-5 * logits[0].abs().max()


def replace_activation(model):
    model.backbone.features[3].conv[0][2] = nn.Hardswish()


def add_a_layer(model):
    model.backbone.features.append(nn.Tanh())


def drop_blocks(model):
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.5


def synchronise_norms(model):
    model.backbone = nn.SyncBatchNorm.convert_sync_batchnorm(model.backbone)


@pytest.mark.parametrize(
    ("change", "backbone", "message"),
    [
        (replace_activation, "mobilenet_v2", r"features.3.conv.0.2 \(ReLU6\) is not in the network any more"),
        (add_a_layer, "mobilenet_v2", "features: layers were added or taken out"),
        (synchronise_norms, "mobilenet_v2", "is not in the network any more"),
    ],
)
def test_another_network_than_was_built_is_refused(change, backbone, message, make):
    model = make("TinyTL-B", backbone)
    model(IMAGES)
    change(model)
    with pytest.raises(TinyTLError, match=message):
        model.train()(IMAGES)
    stock = make("TinyTL-B", backbone, lean=False)
    change(stock)
    stock.eval()(IMAGES)


@pytest.mark.slow
def test_blocks_that_drop_at_random_are_refused_where_they_would_run_twice(make):
    model = make("TinyTL-B", "efficientnet_b0")
    drop_blocks(model)
    with pytest.raises(TinyTLError, match=r"features.\d.\d.stochastic_depth \(StochasticDepth\) drops at random"):
        model(IMAGES)


@pytest.mark.parametrize(
    ("method", "backbone", "hooked"),
    [
        ("TinyTL-B", "mobilenet_v2", ["features.0", "features.5"]),
        ("TinyTL-L+B", "mobilenet_v2", ["features.0", "features.5"]),
        ("TinyTL-B", "timm/mobilenetv2_100", ["bn1", "blocks.2"]),
        pytest.param("TinyTL-L+B", "convnext_tiny", ["features.3", "features.7.1"], marks=pytest.mark.slow),
        pytest.param("TinyTL-B", "convnext_tiny", ["features.3", "features.7.1"], marks=pytest.mark.slow),
    ],
)
def test_hooks_see_whole_maps_whose_gradients_count(method, backbone, hooked, make):
    if backbone.startswith("timm/"):
        pytest.importorskip("timm")
    seen = []
    for lean in (True, False):
        model, maps = make(method, backbone, lean=lean).double(), []
        for name in hooked:
            model.backbone.get_submodule(name).register_forward_hook(
                lambda _, __, output, maps=maps: maps.append(output)
            )
        (model(IMAGES.double()).sum() + sum(each.square().mean() for each in maps)).backward()
        seen.append([*maps, *(parameter.grad for parameter in model.trainable_parameters())])
    assert len(seen[0]) == len(seen[1])
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9 * float(theirs.detach().abs().max()), rtol=1e-7)


@pytest.mark.parametrize(
    ("backbone", "blocks"),
    [
        ("mobilenet_v2", ["features.1", "features.4"]),
        ("mobilenet_v3_small", ["features.2"]),
        pytest.param("convnext_tiny", ["features.1.0", "features.1.1"], marks=pytest.mark.slow),
    ],
)
def test_hooks_on_lite_residuals_see_and_change_what_they_do_in_stock_pytorch(backbone, blocks, make):
    seen = []
    for lean in (True, False):
        model, maps = make("TinyTL-L+B", backbone, lean=lean).double(), []
        for name in blocks:
            lite = model.backbone.get_submodule(f"{name}.lite_residual")
            lite.register_forward_hook(lambda _, __, output, maps=maps: maps.append(output) or 0.5 * output)
        model(IMAGES.double()).sum().backward()
        seen.append([*maps, *(parameter.grad for parameter in model.trainable_parameters())])
    assert len(seen[0]) == len(seen[1])
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9 * float(theirs.detach().abs().max()), rtol=1e-7)


def test_a_thawed_weight_is_refused_where_the_backbone_is_called_by_itself(make):
    model = make()
    model.backbone.features[18][0].weight.requires_grad_(True)
    with pytest.raises(TinyTLError, match="a frozen weight requires a gradient, which the lean engine does not"):
        model.backbone(IMAGES)


def test_a_head_of_another_kind_is_named(make):
    model = make()
    model.backbone.classifier[1] = nn.Linear(1280, 7)
    for call in (
        lambda: model.preprocess(torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()),
        lambda: model.features(IMAGES),
    ):
        with pytest.raises(TinyTLError, match="the network's head was replaced by a layer of another kind"):
            call()


# By what is to happen to a layer with another forward pass: those that the lean pass calls are followed.
FOLLOWED = [
    *(("TinyTL-L+B", "mobilenet_v2", name) for name in ("features.0", "features.3", "features.3.lite_residual")),
    *(("TinyTL-B", "mobilenet_v2", name) for name in ("features.0", "features.18", "features")),
    *(("TinyTL-L+B", "mobilenet_v3_small", f"features.4.block.{name}") for name in ("0", "1", "2", "2.fc1")),
    *(("TinyTL-L", "resnet18", name) for name in ("layer1", "layer2.1", "maxpool")),
]
REFUSED = [
    *(("TinyTL-B", "mobilenet_v2", f"features.{name}") for name in ("0.0", "0.2", "3.conv", "3.conv.0", "3.conv.1.1")),
    ("TinyTL-L+B", "mobilenet_v2", "features.3.lite_residual.norm1"),
    *(("TinyTL-B", "mobilenet_v3_small", f"features.4.block.{name}") for name in ("0.0", "3")),
    *(("TinyTL-L", "resnet18", f"layer2.0.{name}") for name in ("conv1", "bn2", "downsample", "downsample.1")),
    *(("TinyTL-B", "timm/mobilenetv3_small_100", name) for name in ("conv_stem", "bn1.act", "blocks.3.1.drop_path")),
]


def replace_forward(model, name):
    module = model.backbone.get_submodule(name)
    before = module.forward
    module.forward = lambda *inputs, **options: (1.5 * before(*inputs, **options)).sin()


@pytest.mark.parametrize(("method", "backbone", "name"), FOLLOWED)
def test_a_forward_pass_that_was_replaced_is_followed(method, backbone, name, make):
    results = []
    for lean in (True, False):
        model = make(method, backbone, lean=lean)
        replace_forward(model, name)
        logits = model(IMAGES)
        logits.square().sum().backward()
        results.append([logits, *(p.grad for p in model.trainable_parameters())])
    for found, expected in zip(*results, strict=True):
        least = 1e-2 * max(float(each.detach().norm()) for each in results[1][1:])
        assert (found - expected).norm() <= 1e-2 * max(float(expected.detach().norm()), least)


@pytest.mark.parametrize(("method", "backbone", "name"), REFUSED)
def test_a_forward_pass_that_would_not_be_called_is_refused_where_it_was_replaced(method, backbone, name, make):
    model = make(method, backbone)
    replace_forward(model, name)
    with pytest.raises(TinyTLError, match=rf"^{name} \(.*\): its forward pass was replaced, .* or lean=False$"):
        model.train()(IMAGES)
    replaced, expected = model.eval()(IMAGES), make(method, backbone, lean=False)
    replace_forward(expected, name)
    torch.testing.assert_close(replaced, expected.eval()(IMAGES), atol=1e-6, rtol=1e-5)
    assert torch.isfinite(expected.train()(IMAGES)).all()
    module = model.backbone.get_submodule(name)
    module.forward = MethodType(type(module).forward, module)  # as Accelerate puts it back
    model.train()(IMAGES)


def test_a_layer_of_another_class_is_refused(make):
    model = make("TinyTL-B", "mobilenet_v2")
    model.backbone.features[3].conv[0][2].__class__ = nn.ReLU
    with pytest.raises(TinyTLError, match=r"^features.3.conv.0.2 \(ReLU6\): its forward pass was replaced"):
        model(IMAGES)


GEOMETRIES = [
    *(
        ("TinyTL-B", "mobilenet_v2", "features.3.conv.1.0", change)
        for change in ("stride", "padding_mode", "dilation")
    ),
    ("TinyTL-L+B", "mobilenet_v2", "features.3.lite_residual.conv1", "dilation"),
    ("TinyTL-B", "mobilenet_v3_small", "features.4.block.0.0", "stride"),
    ("FT-Last", "timm/mobilenetv3_small_100", "conv_stem", "stride"),
]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("method", "backbone", "name", "what"), GEOMETRIES)
def test_a_convolution_of_another_geometry_is_refused(method, backbone, name, what, first, make):
    model = make(method, backbone)
    if first:
        model(IMAGES)
    conv = model.backbone.get_submodule(name)
    before, other = getattr(conv, what), {"stride": (3, 3), "padding_mode": "reflect", "dilation": (2, 2)}[what]
    setattr(conv, what, other)
    with pytest.raises(
        TinyTLError, match=rf"^{name} \(stride, padding, .* and is .*; build the model with lean=False"
    ):
        model.train()(IMAGES)
    setattr(conv, what, before)
    model.train()(IMAGES)


def test_a_geometry_that_changes_between_two_passes_is_followed(make):
    logits = []
    for lean in (True, False):
        model = make("TinyTL-B", "mobilenet_v2", lean=lean)
        model(IMAGES)
        for conv in (model.backbone.features[name].conv[1][0] for name in (2, 4)):
            conv.stride = (1, 1)
        logits.append(model(IMAGES))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-4)
