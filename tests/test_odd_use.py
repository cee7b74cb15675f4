"""What users do with a lean model beside training it as a run does: what stock PyTorch gives, or one clear error."""

import copy

import pytest
import torch
import torch.nn.functional as F
from shared import slow
from torch import nn
from torch.func import functional_call

from tinytl_hf import TinyTLError
from tinytl_hf.lean.chain import Chain
from tinytl_hf.lean.native_library import instruction_sets

LITE, TIMM = ("TinyTL-L+B", "mobilenet_v2"), ("TinyTL-B", "timm/test_efficientnet")
LEAN = ("TinyTL-B", "TinyTL-L+B")


@torch.no_grad()
def shake(model):
    """Values of their own for norms and biases: those of a new network hide a norm that is done twice."""
    torch.manual_seed(1)
    for name, tensor in model.backbone.state_dict().items():
        if name.endswith(("running_var", "weight")) and tensor.ndim == 1:
            tensor.copy_(torch.rand_like(tensor) + 0.5)
        elif name.endswith(("running_mean", "bias")):
            tensor.copy_(torch.randn_like(tensor) * 0.1)
    return model


def pair(make_model, method, backbone, **options):
    """The same model, lean and stock, in training mode."""
    models = [shake(make_model(method, backbone, lean=lean, **options)).train() for lean in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    return models


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def step(model, images):
    """The logits, and the gradients."""
    model.zero_grad()
    logits = model(images)
    F.cross_entropy(logits, torch.arange(len(images)) % 4).backward()
    return {"logits": logits, **{name: parameter.grad for name, parameter in trained(model).items()}}


def off(found, expected):
    """The largest error of a tensor, as a share of its size; small ones count as a part of the largest."""
    least = 1e-3 * max(float(tensor.detach().norm()) for tensor in expected.values())
    errors = {
        name: float((found[name] - tensor).detach().norm()) / max(float(tensor.detach().norm()), least)
        for name, tensor in expected.items()
    }
    return max(errors.values())


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize(("method", "backbone"), [LITE, TIMM, ("TinyTL-B", "resnet18")])
def test_images_that_are_not_rgb_are_refused(method, backbone, backend, channels, make_model):
    model = make_model(method, backbone, backend=backend).train()
    with pytest.raises(TinyTLError, match=rf"shape \[\d, {channels}, 64, 64\].*takes \[images, 3, height, width\]"):
        model(torch.randn(2, channels, 64, 64))


def test_a_lite_residual_refuses_maps_of_other_channels(make_model):
    branch = make_model().train().backbone.features[2].lean_path.branch
    ours, pytorchs = r"shape \[2, 8, 9, 9\].* takes maps of 16 channels", r"\[2, 8, 9, 9\] to have 16 channels"
    with pytest.raises((TinyTLError, RuntimeError), match=ours if instruction_sets() else pytorchs):
        branch(torch.randn(2, 8, 9, 9))


EVALUATED = {
    "stem": lambda net: [next(net.children()) if hasattr(net, "conv_stem") else next(net.features.children())],
    "first block": lambda net: [next(part for part in net.modules() if hasattr(part, "lite_residual"))],
    "norms": lambda net: [part for part in net.modules() if isinstance(part, nn.BatchNorm2d)],
    "convolutions": lambda net: [part for part in net.modules() if isinstance(part, nn.Conv2d)],
    "one convolution": lambda net: [[part for part in net.modules() if isinstance(part, nn.Conv2d)][6]],
    "lite residuals": lambda net: [part for name, part in net.named_modules() if name.endswith("lite_residual")],
}


@pytest.mark.parametrize("evaluated", EVALUATED)
@pytest.mark.parametrize(
    ("method", "backbone"),
    [LITE, slow(*TIMM), slow("TinyTL-L+B", "timm/mobilenetv3_small_100"), ("TinyTL-B", "mobilenet_v3_small")],
)
def test_parts_in_evaluation_mode_give_what_stock_gives(method, backbone, evaluated, make_model):
    lean, stock = pair(make_model, method, backbone)
    for model in (lean, stock):
        for part in EVALUATED[evaluated](model.backbone):
            part.eval()
    images = torch.randn(8, 3, 64, 64)
    assert off(step(lean, images), step(stock, images)) < 2e-2  # batch statistics of few values


def test_a_copy_asks_its_own_convolutions_for_their_mode(make_model):

    lean, stock = pair(make_model, *TIMM)
    twin = copy.deepcopy(lean)
    lean.eval()
    images = torch.randn(2, 3, 64, 64)
    assert off(step(twin, images), step(stock, images)) < 1e-4


@pytest.fixture(params=[torch.float64, torch.bfloat16])
def default_dtype(request):
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("method", "backbone"), [LITE, TIMM, ("TinyTL-B", "resnet18")])
def test_the_default_type_does_not_reach_the_kernels(method, backbone, default_dtype, make_model):
    model, images = pair(make_model, method, backbone)[0], torch.randn(4, 3, 64, 64)
    expected = step(copy.deepcopy(model), images)  # statistics are summed up around the running ones
    torch.set_default_dtype(default_dtype)
    assert off(step(model, images), expected) < 1e-5


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "timm/efficientnet_b0", "resnet18"])
def test_a_model_with_int8_weights_can_be_cast(backbone, make_model):
    images = torch.randn(4, 3, 64, 64)
    lean, stock = pair(make_model, "FT-Norm+Last", backbone, frozen_weights="int8")
    with torch.no_grad():
        expected = stock(images)
        lean, stock = (model.to(torch.bfloat16)(images.bfloat16()) for model in (lean, stock))
    assert (lean - expected).norm() < 1.5 * (stock - expected).norm() + 1e-2 * expected.norm()


@pytest.mark.parametrize("backend", ["auto", slow("eager")])
@pytest.mark.parametrize("trained_blocks", [None, 2])
@pytest.mark.parametrize(
    ("method", "backbone"),
    [LITE, TIMM, *(slow("TinyTL-L+B", name) for name in ("resnet18", "mobilenet_v3_small", "convnext_tiny"))],
)
def test_an_empty_batch_gives_no_logits_and_changes_nothing(method, backbone, trained_blocks, backend, make_model):
    model = make_model(method, backbone, trained_blocks=trained_blocks, backend=backend).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "num_batches" not in name}
    logits = model(torch.empty(0, 3, 64, 64))
    logits.sum().backward()
    assert logits.shape == (0, 4) and all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
    assert model(torch.randn(4, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_a_batch_of_one_value_a_channel_is_refused_before_statistics_take_it_in(backend, make_model):
    model = make_model(train_size=32, backend=backend).train()
    with pytest.raises(TinyTLError, match="more than one value a channel"):
        model(torch.randn(1, 3, 32, 32))
    assert all(tensor.isfinite().all() for tensor in model.buffers())


@pytest.mark.parametrize("backend", ["auto", slow("eager")])
@pytest.mark.parametrize(
    ("method", "backbone"),
    [
        LITE,
        slow("TinyTL-L+B", "resnet18"),
        ("TinyTL-L+B", "mobilenet_v3_small"),
        *((m, "convnext_tiny") for m in LEAN),
    ],
)
def test_parameters_that_are_not_its_own_give_no_wrong_gradients(method, backbone, backend, make_model):
    model = pair(make_model, method, backbone, backend=backend)[0]
    images, kinds = torch.randn(4, 3, 64, 64), torch.arange(4)

    def gradients(given):
        loss = F.cross_entropy(functional_call(model, given, (images,)), kinds)
        return dict(zip(given, torch.autograd.grad(loss, given.values()), strict=True))

    same = {name: parameter.detach().clone().requires_grad_() for name, parameter in trained(model).items()}
    other = {name: (0.9 * parameter).detach().requires_grad_() for name, parameter in same.items()}
    expected = step(copy.deepcopy(model), images)
    del expected["logits"]
    assert off(gradients(same), expected) < 1e-4
    with pytest.raises(TinyTLError, match="with its own parameters, and was given others"):
        gradients(other)


def test_biases_of_chains_may_be_others(make_model):
    lean, stock = pair(make_model, "TinyTL-B", "mobilenet_v2")
    given = {name: (0.9 * parameter).detach().requires_grad_() for name, parameter in trained(lean).items()}
    images, found = torch.randn(4, 3, 64, 64), []
    for model in (lean, stock):
        loss = functional_call(model, given, (images,)).square().sum()
        found.append(dict(zip(given, torch.autograd.grad(loss, given.values()), strict=True)))
    assert off(*found) < 1e-4


@pytest.mark.parametrize(
    ("method", "backbone"), [*((m, "convnext_tiny") for m in LEAN), ("TinyTL-B", "timm/convnext_atto")]
)
def test_factors_of_a_block_may_train_that_did_not_when_it_became_lean(method, backbone, make_model):
    models, images = pair(make_model, method, backbone), torch.randn(2, 3, 64, 64)
    for model in models:
        for name, parameter in model.backbone.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or name.endswith(("layer_scale", "gamma")))
    lean, stock = (step(model.backbone, images) for model in models)
    assert any(name.endswith(("layer_scale", "gamma")) for name in lean) and off(lean, stock) < 1e-2


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "convnext_tiny"])
def test_training_mode_without_gradients_gives_what_it_gives_with_them(backbone, mode, make_model):
    model = make_model("TinyTL-L+B", backbone).train()
    images = torch.randn(4, 3, 64, 64)
    expected = copy.deepcopy(model)(images)
    with mode():
        assert torch.equal(model(images), expected)


def test_without_gradients_no_masks_are_made(make_model, monkeypatch):
    model = make_model("TinyTL-B", "resnet18").train()
    made = []
    room = Chain.empty_kept
    monkeypatch.setattr(
        Chain, "empty_kept", lambda chain, x, dtype, keeps: made.append(keeps) or room(chain, x, dtype, keeps)
    )
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    assert made and not any(made)
