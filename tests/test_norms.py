import copy

import pytest
import torch
from torch import nn

from tinytl_hf.config.network import LiteConfig
from tinytl_hf.network.norms import FrozenBatchNorm2d, GlobalBatchNorm2d, keep_running_statistics, replace_batch_norms


def stock_norm(channels=6):
    norm = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return norm


def replaced(norm, kind):
    parent = nn.Sequential(copy.deepcopy(norm))
    replace_batch_norms(parent, kind)
    return parent[0]


def test_a_frozen_norm_stays_frozen_in_training_mode():
    norm, x = stock_norm(), torch.randn(4, 6, 5, 5)
    frozen = replaced(norm, FrozenBatchNorm2d).train()
    before = copy.deepcopy(frozen.state_dict())
    assert torch.equal(frozen(x), norm.eval()(x))
    assert all(torch.equal(frozen.state_dict()[name], tensor) for name, tensor in before.items())
    assert frozen.state_dict().keys() == norm.state_dict().keys()


def test_a_global_norm_on_one_process_is_the_stock_norm():
    norm, x = stock_norm(), torch.randn(4, 6, 5, 5)
    ours = replaced(norm, GlobalBatchNorm2d)
    for _ in range(3):
        assert torch.equal(ours.train()(x), norm.train()(x))
    assert torch.equal(ours.eval()(x), norm.eval()(x))
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in norm.state_dict().items())


def test_recomputing_leaves_the_running_statistics():
    norm, x = GlobalBatchNorm2d(6), torch.randn(4, 6, 5, 5)
    before = copy.deepcopy(norm.state_dict())
    with keep_running_statistics():
        output = norm(x)
    assert all(torch.equal(norm.state_dict()[name], tensor) for name, tensor in before.items())
    assert torch.equal(output, norm(x))
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize(
    ("method", "helps"),
    [("FT-Full", "or a method that freezes norms, such as TinyTL-B"), ("TinyTL-L+B", "or --lite.norm group")],
)
def test_what_is_told_to_help_where_a_channel_has_one_value_helps(method, helps, make_model):
    image = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match=f"use a larger batch or image, {helps}$"):
        make_model(method, "mobilenet_v3_small", train_size=32).train()(image)
    other = {"method": "TinyTL-B"} if method == "FT-Full" else {"lite": LiteConfig(norm="group")}
    assert make_model(backbone="mobilenet_v3_small", train_size=32, **other).train()(image).isfinite().all()


def test_one_value_a_channel_is_refused():
    with pytest.raises(ValueError, match="more than one value"):
        GlobalBatchNorm2d(6)(torch.randn(1, 6, 1, 1))
