"""Blocks and layers are known by their exact type; what is unknown works as it is, and is named if it stays stock."""

import logging

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision.models import efficientnet

from tinytl_hf.config.engine import Engine
from tinytl_hf.config.network import LiteConfig
from tinytl_hf.lean.convert import convert
from tinytl_hf.network import blocks as network_blocks
from tinytl_hf.network import timm_nets, torchvision_nets
from tinytl_hf.network.blocks import BLOCK_KINDS, convert_blocks
from tinytl_hf.network.head import Head
from tinytl_hf.network.kinds import class_name
from tinytl_hf.network.methods import apply_method, changing_buffers

OF_KNOWN_KINDS = (
    *("mobilenet_v2", "mobilenet_v3_small", "efficientnet_v2_s", "mnasnet1_0", "resnet18"),
    # ConvBnAct and InvertedResidual; UniversalInvertedResidual; EdgeResidual and SAME padding; DepthwiseSeparableConv
    *(
        "timm/mobilenetv3_small_050",
        "timm/mobilenetv4_conv_small_035",
        "timm/test_efficientnet",
        "timm/tf_efficientnet_lite0",
    ),
    *(
        "timm/tf_efficientnet_lite0",
        "timm/mobilenetv1_100",
        "timm/test_resnet",
        "timm/resnet18",
        "timm/regnetx_002",
        "timm/efficientnet_es",
    ),
)
IMAGES = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class NormAct(nn.BatchNorm2d):
    """A norm that holds its activation, as timm has them."""

    def forward(self, input):
        return F.relu(super().forward(input))


class PaddingConv(nn.Conv2d):
    """A convolution that pads as its input needs it, as timm has them."""

    def forward(self, input):
        return super().forward(F.pad(input, (0, 1, 0, 1)))


def small_network(odd_norm=False, odd_conv=False, padding_mode="zeros"):
    """A backbone of a stem, two blocks of MobileNetV2 and a head, with an unusual layer if asked for."""
    torch.manual_seed(0)
    stem = (PaddingConv if odd_conv else nn.Conv2d)(
        3, 8, 2, stride=2, padding=0, bias=False, padding_mode=padding_mode
    )
    norm = (NormAct if odd_norm else nn.BatchNorm2d)(8)
    block = torchvision.models.mobilenetv2.InvertedResidual
    network = nn.Sequential(
        nn.Sequential(stem, norm, nn.ReLU6()),
        block(8, 8, 1, 6),
        block(8, 16, 2, 6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        Head(16, 4),
    ).double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network


def by_method(network, method, lean):
    blocks = convert_blocks(network)
    apply_method(network, blocks, method, 64, LiteConfig())
    return convert(network, blocks, Engine(), 64) if lean else []


@pytest.mark.parametrize("odd", [{"odd_norm": True}, {"odd_conv": True}, {"padding_mode": "reflect"}])
@pytest.mark.parametrize("method", ["TinyTL-B", "FT-Last", "FT-Norm+Last"])
def test_a_subclass_of_a_layer_keeps_what_it_does_and_is_named(odd, method):
    step_0 = small_network(**odd).eval()(IMAGES)
    lean, plain = small_network(**odd), small_network(**odd)
    stock_layers, _ = by_method(lean, method, True), by_method(plain, method, False)
    kind = "NormAct" if "odd_norm" in odd else "PaddingConv" if "odd_conv" in odd else "Conv2d"
    assert [name for name in stock_layers if kind in name]
    assert torch.equal(lean.eval()(IMAGES), step_0)
    results = []
    for network in (lean, plain):
        loss = network.train()(IMAGES).square().mean()
        loss.backward()
        results.append({name: p.grad for name, p in network.named_parameters() if p.requires_grad})
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], atol=1e-12, rtol=1e-9)


class OddReLU(nn.ReLU):
    """A subclass that mixes the images a little, and keeps its output for the backward pass as its parent does."""

    def forward(self, input):
        return super().forward(input + 1e-3 * input.detach().mean())


@pytest.mark.parametrize("method", ["TinyTL-L", "TinyTL-L+B"])
def test_a_lite_residual_does_not_write_over_what_a_stock_block_keeps(method, make_model):
    results = []
    for lean in (True, False):
        model = make_model(method, "resnet18", lean=False).double()
        blocks = model._blocks
        for block in blocks.values():
            block.relu = OddReLU()
            nn.init.ones_(block.lite_residual.norm2.weight)
        if lean:
            assert [name for name in convert(model.backbone, blocks, Engine(), 64) if "OddReLU" in name]
        model.train()(IMAGES).square().sum().backward()
        results.append([parameter.grad for parameter in model.trainable_parameters()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-7)


def test_an_unknown_layer_inside_a_block_runs_once_a_step(make_model):
    calls = []
    model = make_model("TinyTL-B", "mobilenet_v3_small", lean=False)
    block = next(iter(model._blocks.values()))
    block.block.append(CountingIdentity(calls))
    stock_layers = convert(model.backbone, model._blocks, Engine(), 64)
    assert [name for name in stock_layers if "CountingIdentity" in name]
    model.train()(IMAGES.float()).sum().backward()
    assert len(calls) == 1


class CountingIdentity(nn.Identity):
    """A layer with a memory, which must not be computed a second time."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def forward(self, input):
        self.calls.append(1)
        return input


def test_a_frozen_norm_of_an_unknown_class_stays_frozen_in_training_mode():
    network = small_network(odd_norm=True)
    by_method(network, "TinyTL-B", lean=True)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network.train()(IMAGES)
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    assert changing_buffers(network) == set()
    assert network.train()[0][1].training is False and network[0][0].training is True


def test_an_unknown_norm_that_trains_on_batch_statistics_has_its_buffers_in_the_adapter():
    network = small_network(odd_norm=True)
    by_method(network, "FT-Norm+Last", lean=True)
    assert {"0.1.running_mean", "0.1.running_var", "0.1.num_batches_tracked"} <= changing_buffers(network)


def test_a_parameter_of_another_name_than_weight_and_bias_is_refused():
    network = small_network()
    network[0][0].gain = nn.Parameter(torch.ones(8))
    with pytest.raises(ValueError, match=r"parameter 0\.0\.gain belongs to a Conv2d, which no method knows"):
        apply_method(network, convert_blocks(network), "TinyTL-B", 64, LiteConfig())


@pytest.mark.parametrize("name", OF_KNOWN_KINDS)
def test_the_table_of_blocks_says_what_a_block_computes(name):
    """The layers of each kind, run in the order of its row, give what the block's own forward pass gives."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        library = timm_nets if name.startswith("timm/") else torchvision_nets
        network = library.build(name).double().eval()
    seen = []

    def check(block, inputs, output):
        kind, x = BLOCK_KINDS[class_name(type(block))], inputs[0].clone()
        y = x.clone()
        if any(isinstance(layer, nn.AdaptiveAvgPool2d) for layer in kind.layers(block)):  # torchvision's
            return  # squeeze-and-excitation multiplies: no sequence of layers
        for layer in kind.layers(block):
            y = layer(y)
        if kind.adds_input(block):
            shortcut = kind.shortcut(block)
            y = y + (x if shortcut is None else shortcut(x))
        torch.testing.assert_close(y if kind.last(block) is None else kind.last(block)(y), output)
        seen.append(type(block).__name__)

    for module in network.modules():
        if class_name(type(module)) in BLOCK_KINDS:
            module.register_forward_hook(check)
    with torch.no_grad():
        network(IMAGES)
    assert len(seen) >= 2


def test_every_block_of_efficientnet_v2_gets_a_lite_residual(make_model, caplog):
    with caplog.at_level(logging.WARNING):
        model = make_model("TinyTL-L+B", "efficientnet_v2_s")
    assert "lite residual" not in caplog.text
    lite = [n for n, module in model.backbone.named_modules() if n.endswith(".lite_residual") and module is not None]
    blocks = [m for m in model.backbone.modules() if isinstance(m, (efficientnet.MBConv, efficientnet.FusedMBConv))]
    assert len(lite) == len(blocks) == 40


def test_blocks_without_a_lite_residual_are_named(make_model, caplog, monkeypatch):
    monkeypatch.delitem(network_blocks.BLOCK_KINDS, class_name(efficientnet.FusedMBConv))
    with caplog.at_level(logging.WARNING):
        make_model("TinyTL-L", "efficientnet_v2_s")
    assert "30 of 40 blocks get a lite residual" in caplog.text and "features.1.0 (FusedMBConv)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        make_model("TinyTL-B", "efficientnet_v2_s")
    assert caplog.text == ""
