"""Blocks that masks do not serve keep their input alone, max pooling one byte a value; gradients stay exact."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from tinytl_hf.config.engine import Engine
from tinytl_hf.config.network import LiteConfig
from tinytl_hf.lean import recompute
from tinytl_hf.lean.chain import Chain
from tinytl_hf.lean.convert import convert
from tinytl_hf.lean.max_pool import LeanMaxPool2d
from tinytl_hf.lean.sliced import in_slices
from tinytl_hf.measure.ledger import kept_for_backward

KEPT_BY_STOCK = {"mobilenet_v3_small": 8, "mobilenet_v3_large": 20, "efficientnet_b0": 17, "resnet18": 20}


@pytest.mark.parametrize("backbone", KEPT_BY_STOCK)
def test_hardswish_silu_excitation_and_pooling_keep_an_eighth_of_stock_or_less(backbone, make_model):
    images, labels = torch.randn(2, 3, 96, 96), torch.tensor([0, 1])
    images = images.contiguous(memory_format=torch.channels_last)
    stock, lean = (
        kept_for_backward(make_model("TinyTL-B", backbone, train_size=96, lean=lean), images, labels)
        for lean in (False, True)
    )
    assert stock / lean >= KEPT_BY_STOCK[backbone]


def test_a_slice_of_one_image_or_of_all_gives_the_same_gradients(make_model):
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for slice_mb in (1e-6, 1e3):
        model = make_model("TinyTL-B", "mobilenet_v3_small", slice_mb=slice_mb).double().train()
        model(images).square().sum().backward()
        results.append([parameter.grad for parameter in model.trainable_parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)


def test_a_recomputed_block_works_through_the_batch_in_slices():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 1)).double()
    seen = []
    layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    for layer in (layers[0], layers[2]):
        layer.weight.requires_grad_(False)
    image_mb = 8 * 6 * 6 * 8 / 1e6
    path = recompute.Recomputed(layers, layers.forward, 2 * image_mb / recompute.SHARE_OF_CHAIN)
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    path(x)
    assert seen == [1, 2, 2, 1]  # one image to learn its size, then at most two at a time
    assert gradcheck(lambda x, *_: path(x), (x, layers[0].bias, layers[2].bias), fast_mode=True)


@pytest.mark.parametrize("backbone", ["mobilenet_v3_small", "efficientnet_b0", "timm/efficientnet_b0"])
def test_what_the_last_convolution_of_a_block_gives_is_not_read_again(backbone, make_model, monkeypatch):
    if backbone.startswith("timm"):
        pytest.importorskip("timm")
    model = make_model("TinyTL-B", backbone, slice_mb=1e-6).train()
    images, found, runs = torch.randn(2, 3, 64, 64), [], []
    as_it_is = Chain.unread

    def not_numbers(chain, x):
        output = as_it_is(chain, x)
        output.detach().fill_(float("nan"))
        runs.append(chain)
        return output

    for unread in (as_it_is, not_numbers):
        monkeypatch.setattr(Chain, "unread", unread)
        model.zero_grad()
        model(images).square().sum().backward()
        found.append([parameter.grad for parameter in model.trainable_parameters()])
    again = [block for block in model._blocks.values() if isinstance(block.lean_path, recompute.Recomputed)]
    assert len(runs) == 2 * len(again) > 0  # for each image
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("backbone", ["mobilenet_v3_small", "efficientnet_b0", "convnext_tiny"])
def test_a_block_that_is_called_for_itself_gives_what_stock_gives(backbone, make_model):
    lean, stock = (make_model("TinyTL-B", backbone, lean=lean).double().train() for lean in (True, False))
    for block, plain in zip(lean._blocks.values(), stock._blocks.values(), strict=True):
        inputs = next(part for part in plain.modules() if isinstance(part, nn.Conv2d)).in_channels
        x = torch.randn(2, inputs, 12, 12, dtype=torch.float64, requires_grad=True)
        for run, expected in ((block, plain), (block.block, plain.block)):
            torch.testing.assert_close(run(x), expected(x), atol=1e-10, rtol=1e-9)


def test_slices_are_of_the_widest_map_though_a_chain_holds_it(make_model):
    model = make_model("TinyTL-B", "efficientnet_b0").train()
    block = list(model._blocks.values())[1]
    block.lean_path(torch.randn(1, 16, 32, 32))
    assert block.lean_path.widest == {torch.Size([16, 32, 32]): 96 * 32 * 32}  # before the strided convolution


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 2},
        {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0)},
        {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_lean_max_pooling_is_that_of_pytorch_and_keeps_a_byte_a_value(options, layout):
    x = torch.randn(3, 5, 11, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=layout)
    results, kept = [], 0

    def pack(tensor):
        nonlocal kept
        kept = kept + tensor.untyped_storage().nbytes()
        return tensor

    for kind in (nn.MaxPool2d, LeanMaxPool2d):
        input, kept = x.clone().requires_grad_(), 0
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = kind(**options).train()(input)
        (output * torch.arange(output.numel()).view_as(output)).sum().backward()
        results.append((output, input.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    lean = kind(**options).train()
    kept = 0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = lean(x.clone().requires_grad_())
    assert kept == output.numel()


class Sharpen(nn.Module):
    """Unknown, and of one image: its mean is that of the image."""

    def forward(self, x):
        return x * torch.tanh(x - x.mean((1, 2, 3), keepdim=True))


class Mix(nn.Module):
    """Looks at the whole batch."""

    def forward(self, x):
        return x - 0.1 * x.mean((0, 2, 3), keepdim=True)


class Numbered(nn.Module):
    """Treats the images of a batch by their number."""

    def forward(self, x):
        return x * torch.arange(1, len(x) + 1).to(x)[:, None, None, None]


class Noise(nn.Module):
    """Draws in training mode alone."""

    def forward(self, x):
        return x + 1e-12 * torch.randn_like(x) if self.training else x * 1.0


class Counter(nn.Module):
    """Remembers how often it ran."""

    def __init__(self):
        super().__init__()
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        self.runs += 1
        return x * 1.5


class OverItsInput(nn.Module):
    """Writes over what it is given, which is the block's own input where it comes first."""

    def forward(self, x):
        return x.mul_(0.5)


def small_v3(make_model, layer, first=False):
    """MobileNetV3 with one more layer in its second block, lean and stock, and the layers that stay stock."""
    models = []
    for lean in (True, False):
        model = make_model("TinyTL-B", "mobilenet_v3_small", lean=False).double()
        block = list(model._blocks.values())[1]
        block.block.insert(0, layer()) if first else block.block.append(layer())
        models.append(model.train())
        if lean:
            model.stock_layers = convert(model.backbone, model._blocks, Engine(), 64)
    return models


def test_an_unknown_layer_of_one_image_is_found_by_trial_and_runs_again_slice_by_slice(make_model):
    lean, stock = small_v3(make_model, Sharpen)
    assert not [name for name in lean.stock_layers if "block" in name]
    assert isinstance(list(lean._blocks.values())[1].lean_path, recompute.Recomputed)
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for model in (lean, stock):
        model(images).square().sum().backward()
    for ours, theirs in zip(lean.trainable_parameters(), stock.trainable_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("layer", [Mix, Numbered, Noise, Counter, OverItsInput])
def test_an_unknown_layer_that_mixes_draws_or_remembers_stays_stock_and_is_named(layer, make_model):
    lean, _ = small_v3(make_model, layer, first=layer is OverItsInput)
    assert [name for name in lean.stock_layers if layer.__name__ in name]
    block = list(lean._blocks.values())[1]
    assert block.lean_path is None
    assert layer is not Counter or block.block[-1].runs == 0  # a copy was tried


def test_blocks_of_an_unknown_kind_keep_a_sixth_of_stock_and_have_its_gradients(make_model):
    """RegNet's blocks: squeeze-and-excitation between ReLUs, in a class that no row of the table describes."""
    images, results, kept = torch.randn(2, 3, 64, 64, dtype=torch.float64), [], []
    for lean in (True, False):
        model = make_model("TinyTL-B", "regnet_y_400mf", lean=lean).double()
        assert model.stock_layers == []
        kept.append(kept_for_backward(model, images, torch.tensor([0, 1])))
        model.train()(images).square().sum().backward()
        results.append([parameter.grad for parameter in model.trainable_parameters()])
    assert kept[1] > 6 * kept[0]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-8)


def test_slices_with_a_graph_each_are_counted_freed_and_used_again_as_one_graph_is():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 3, 1).double()
    layer.weight.requires_grad_(False)
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    def run(part):
        return layer(part).sigmoid() + part

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = in_slices(run, x, [slice(0, 2), slice(2, 4), slice(4, 5)], [layer.bias])
    assert torch.equal(output, run(x))
    assert sum(kept) >= x.numel()  # what sigmoid keeps of each slice
    inputs = [x, layer.bias]
    expected = torch.autograd.grad(run(x).square().sum(), inputs)
    for last in (False, True):
        found = torch.autograd.grad(output.square().sum(), inputs, retain_graph=not last)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output.square().sum(), inputs)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["TinyTL-L+B", "TinyTL-B", "FT-Norm+Last"])
def test_convnext_keeps_an_eighth_of_stock_or_less_and_has_its_gradients(method, make_model):
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    results, kept = [], []
    for lean in (False, True):
        model = make_model(method, "convnext_tiny", lean=lean)
        for name, parameter in model.backbone.named_parameters():
            if name.endswith(("layer_scale", "norm2.weight")):
                nn.init.constant_(parameter, 0.3)  # so that blocks and lite residuals matter
        kept.append(kept_for_backward(model, images, torch.arange(8) % 4))
        small = images[:2].double()
        model.double().train()(small).square().mean().backward()
        results.append({n: p.grad for n, p in model.backbone.named_parameters() if p.requires_grad})
    assert kept[0] > 8 * kept[1]
    largest = max(gradient.abs().max() for gradient in results[0].values())
    for name, gradient in results[0].items():
        assert (results[1][name] - gradient).abs().max() <= 1e-10 * largest, name


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_convnext_with_lite_residuals_runs_each_block_twice_and_goes_back_twice_the_same(norm, make_model):
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found, seen = [], []
    for lean in (False, True):
        model = make_model("TinyTL-L+B", "convnext_tiny", lean=lean, lite=LiteConfig(norm=norm)).double().train()
        loss = model(images.double()).square().sum()
        if lean:
            for block in model._blocks.values():
                block.block[0].register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        for again in (False, True) if lean else (False,):
            found.append(torch.autograd.grad(loss, list(model.trainable_parameters()), retain_graph=not again))
    # Once for each time that it goes back, and an image to learn its size.
    assert sum(seen) == (2 * len(images) + 1) * len(model._blocks)
    largest = max(gradient.abs().max() for gradient in found[0])
    for stock, first, second in zip(*found, strict=True):
        assert torch.equal(first, second)
        assert (first - stock).abs().max() <= 1e-10 * largest


def test_a_copy_of_convnext_computes_with_its_own_layers(make_model):
    layers = copy.deepcopy(make_model("TinyTL-L+B", "convnext_tiny")).train().backbone.features
    first = layers.passes[0]
    assert next(first.mains.module.children()) is layers[0]
    first(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in layers[1][1].parameters() if parameter.requires_grad)
    assert first.mains.widest == {torch.Size([3, 64, 64]): 4 * 96 * 16 * 16}
