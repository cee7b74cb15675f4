"""Blocks that masks do not serve keep their input alone, max pooling one byte a value; gradients stay exact."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from tinytl_hf.lean import recompute
from tinytl_hf.lean.max_pool import LeanMaxPool2d
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
