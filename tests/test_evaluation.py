"""Evaluation by chains gives what stock layers give, and leaves the model as it was."""

import pytest
import torch
from shared import NATIVE
from torch import nn

from tinytl_hf.device import CPU_PIXELS, forward_in_parts
from tinytl_hf.lean.chain import Chain
from tinytl_hf.lean.evaluation import evaluated_by_chains


@pytest.fixture
def chain_calls(monkeypatch):
    """The number of images of each call of a chain."""
    calls, run = [], Chain.__call__
    pooled = Chain.with_pooled_input
    monkeypatch.setattr(Chain, "__call__", lambda self, x: (calls.append(len(x)), run(self, x))[1])
    monkeypatch.setattr(Chain, "with_pooled_input", lambda self, x: (calls.append(len(x)), pooled(self, x))[1])
    return calls


def with_values(model):
    """A model whose layers all have a say in its logits, in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.normal_(0.7, 0.2, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
                module.running_mean.normal_(0, 0.05, generator=generator)
                module.running_var.fill_(0.05)
    return model.eval()


@pytest.mark.parametrize("backend", [NATIVE])
@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("mobilenet_v2", {}),
        ("mobilenet_v2", {"method": "FT-Last"}),
        ("mobilenet_v2", {"frozen_weights": "int8"}),
        ("mobilenet_v2", {"trained_blocks": 3}),
        ("mnasnet0_5", {}),
        ("timm/efficientnet_lite0", {}),
    ],
)
def test_chains_give_the_logits_of_stock_layers_several_times_as_many_images_at_a_time(
    backend, backbone, options, make_model, chain_calls
):
    model = with_values(make_model(backbone=backbone, backend=backend, **options))
    images = torch.randn(40, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = forward_in_parts(model, images, CPU_PIXELS)
        assert not chain_calls
        with evaluated_by_chains(model.backbone) as pixels:
            found = forward_in_parts(model, images, pixels)
    assert max(chain_calls) == 40 and len(chain_calls) >= 10
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert expected.std(0).max() > 1e-3 * expected.abs().max()  # the images differ
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("backend", [NATIVE])
def test_a_model_is_in_evaluation_mode_again_after_an_error_and_hooks_fire_again(backend, make_model):
    model, seen = make_model(backend=backend).eval(), []
    with pytest.raises(KeyError), evaluated_by_chains(model.backbone):
        assert any(module.training for module in model.modules())
        raise KeyError
    assert not any(module.training for module in model.modules())
    model.backbone.features[2].conv[0][0].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    assert seen == [1]


@pytest.mark.parametrize("options", [{"method": "FT-Full"}, {"lean": False}, {"backend": "eager"}])
def test_where_no_chain_runs_compiled_the_pass_is_stocks(options, make_model, chain_calls):
    model = make_model(**options).eval()
    with torch.no_grad(), evaluated_by_chains(model.backbone) as pixels:
        assert pixels == CPU_PIXELS
        model(torch.zeros(1, 3, 64, 64))
    assert not chain_calls
