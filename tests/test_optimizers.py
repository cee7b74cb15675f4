"""Learning rates by role, and Muon for the convolutions of lite residuals."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import AdamW, Muon

from tinytl_hf.config.train import LrFactors, TrainConfig
from tinytl_hf.step import MuonAdamW, make_optimizer, matrices_of


def test_each_role_has_its_factor(make_model):
    model = make_model("TinyTL-L+B")
    names = {id(p): name for name, p in model.backbone.named_parameters()}
    groups = model.parameter_groups(1.0, 0.1, factors=LrFactors(head=2.0, lite=3.0, lite_last_norm=5.0, biases=7.0))
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert len(rates) == len(list(model.trainable_parameters()))
    for name, rate in rates.items():
        if "lite_residual" in name:
            assert rate == (5.0 if ".norm2." in name else 3.0), name
        else:
            assert rate == (2.0 if name.startswith("classifier.1") else 7.0), name
    layerwise = make_model("FT-Layerwise")
    rates = {group["lr"] for group in layerwise.parameter_groups(1.0, 0.0, factors=LrFactors(head=2.0))}
    assert rates == {2.0, 0.6, 0.4}


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd", "muon"])
def test_a_step_that_a_gradient_scaler_leaves_out_is_known_as_one(kind, make_model):
    Accelerator(cpu=True)  # whose state its optimizers look at
    model = make_model("TinyTL-L+B", train_size=32)
    optimizer = make_optimizer(model, TrainConfig(optimizer=kind, lr=1e-3, epochs=1))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    prepared = AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)
    for gradient in (float("inf"), 1024.0, float("nan")):
        before = [parameter.clone() for parameter in model.trainable_parameters()]
        for parameter in model.trainable_parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        scaler.scale(torch.ones(()))  # as of a loss
        prepared.step()
        same = [torch.equal(*pair) for pair in zip(before, model.trainable_parameters(), strict=True)]
        assert prepared.step_was_skipped == all(same) == (gradient != 1024.0)
        prepared.zero_grad()


def trained(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images, labels = torch.randn(4, 3, 32, 32, generator=generator), torch.arange(4)
        nn.functional.cross_entropy(model.train()(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def muon_for(model):
    return make_optimizer(model, TrainConfig(optimizer="muon", lr=1e-3, epochs=1, weight_decay=0.1))


def test_a_step_is_torchs_muon_on_each_matrix_and_adamw_on_the_rest(make_model):
    model = make_model("TinyTL-L+B", train_size=32)
    optimizer = muon_for(model)
    assert isinstance(optimizer, MuonAdamW)
    for parameter in model.trainable_parameters():
        parameter.grad = torch.randn_like(parameter)
    weights = dict(model.backbone.named_parameters())
    conv = "features.3.lite_residual.conv1.weight"
    assert model.backbone.get_submodule("features.3.lite_residual.conv1").groups == 2
    halves = [nn.Parameter(half.flatten(1).clone()) for half in weights[conv].detach().chunk(2)]
    bias = nn.Parameter(weights["features.0.1.bias"].detach().clone())
    expected_muon, expected_adamw = Muon(halves, lr=1e-2, weight_decay=0.1), AdamW([bias], lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        for half, gradient in zip(halves, weights[conv].grad.chunk(2), strict=True):
            half.grad = gradient.flatten(1)
        bias.grad = weights["features.0.1.bias"].grad
        expected_muon.step()
        expected_adamw.step()
        optimizer.step()
    # Muon computes in bf16; the columns of our matrices stand in another order.
    found = weights[conv].detach().chunk(2)
    for half, matrix in zip(halves, found, strict=True):
        torch.testing.assert_close(matrix.flatten(1), half.detach(), atol=5e-4, rtol=0.02)
    torch.testing.assert_close(weights["features.0.1.bias"].detach(), bias.detach())


def test_matrices_are_views_of_weights_as_they_lie(make_model):
    model = make_model("TinyTL-L+B", train_size=64)
    for name, weight in model.backbone.named_parameters():
        if name.endswith(("lite_residual.conv1.weight", "lite_residual.conv2.weight")):
            groups = model.backbone.get_submodule(name.removesuffix(".weight")).groups
            matrices = matrices_of(weight, groups)
            assert matrices.data_ptr() == weight.data_ptr() and matrices.shape[:2] == (groups, len(weight) // groups)


def test_muon_goes_on_from_a_saved_state_to_the_same_bits(make_model):
    straight, resumed = make_model("TinyTL-L+B", train_size=32), make_model("TinyTL-L+B", train_size=32)
    optimizer = muon_for(straight)
    trained(straight, optimizer, range(2))
    resumed.load_adapter_tensors({k: v.clone() for k, v in straight.adapter_tensors().items()}, "a copy")
    again = muon_for(resumed)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    trained(straight, optimizer, [2])
    trained(resumed, again, [2])
    for name, tensor in straight.adapter_tensors().items():
        assert torch.equal(resumed.adapter_tensors()[name], tensor), name


def test_muon_moves_the_convolutions_of_lite_residuals_alone(make_model):
    optimizer = muon_for(make_model("TinyTL-L+B"))
    shapes = [p.ndim for group in optimizer.param_groups if group["matrices"] for p in group["params"]]
    assert shapes == [4] * 34  # two in each of MobileNetV2's 17 blocks
    with_none = muon_for(make_model("FT-Last"))
    assert all(group["matrices"] == 0 for group in with_none.param_groups)
    assert optimizer.defaults["lr"] == pytest.approx(1e-3)
