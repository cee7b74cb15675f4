"""Lite residuals and up-sampling on the Triton back-end, as in test_triton.py."""

import pytest
import torch
import torch.nn.functional as F
from test_triton import DEVICE, errors

from tinytl_hf.config.network import LiteConfig
from tinytl_hf.lean.layers import upsample_add
from tinytl_hf.lean.lite_branch import Branch
from tinytl_hf.network.lite_residual import LiteResidual
from tinytl_hf.network.norms import GlobalBatchNorm2d, keep_running_statistics

pytest.importorskip("triton")
from tinytl_hf.lean import triton_branch, triton_launch

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


def lite_residual(dtype, in_channels=16, out_channels=24, stride=1):
    torch.manual_seed(6)
    lite = LiteResidual(in_channels, out_channels, stride, 12, LiteConfig(kernel_size=3)).to(DEVICE, dtype).train()
    with torch.no_grad():
        for each in (lite.norm1, lite.norm2):
            each.weight.copy_(torch.rand(each.num_features) + 0.5)
            each.bias.copy_(torch.randn(each.num_features))
    return lite


def run_branch(lite, pooled, grad, backend="triton"):
    """Output, and gradients of the input and of the parameters."""
    pooled, branch = pooled.detach().requires_grad_(), Branch(lite, 5.0, backend)
    y = branch(pooled)
    return [y.detach(), *torch.autograd.grad(y, [pooled, *branch.parameters], grad)]


def vectors(lite):
    return [tensor for name, tensor in lite.state_dict().items() if "running" in name or "num_batches" in name]


@pytest.mark.parametrize(("size", "stride"), [((6, 5), 1), ((9, 8), 2), ((1, 1), 1)])
def test_a_branch_has_the_gradients_and_statistics_of_the_eager_engine(size, stride):
    lite, twin = (lite_residual(torch.float64, stride=stride) for _ in range(2))
    pooled = torch.randn(3, 16, *size, dtype=torch.float64, device=DEVICE) * 3 + 2
    grad = torch.randn(3, 24, *[(side + stride - 1) // stride for side in size], dtype=torch.float64, device=DEVICE)
    for ours, theirs in zip(run_branch(lite, pooled, grad), run_branch(twin, pooled, grad, "eager"), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    for ours, theirs in zip(vectors(lite), vectors(twin), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_branch_rounds_no_worse_than_stock_layers(dtype):
    lite, plain, exact = (lite_residual(kind) for kind in (torch.float32, dtype, torch.float64))
    for each in (lite, plain, exact):
        each.load_state_dict({name: tensor.to(dtype) for name, tensor in lite.state_dict().items()})
    pooled = (torch.randn(4, 16, 8, 7, device=DEVICE) + 3).to(dtype)
    grad = torch.randn(4, 24, 8, 7, device=DEVICE).to(dtype)
    wanted = run_branch(exact, pooled.double(), grad.double(), "eager")
    for each in (plain.norm1, plain.norm2):
        each.float()  # as under autocast
    x = pooled.clone().requires_grad_()
    y = plain.before_upsampling(x)
    theirs = [y.detach(), *torch.autograd.grad(y, [x, *Branch(plain).parameters], grad)]
    found = run_branch(lite, pooled, grad)
    assert found[0].dtype == dtype and {each.dtype for each in found[2:]} == {torch.float32}
    for ours, stocks in zip(errors(found, wanted), errors(theirs, wanted), strict=True):
        assert ours < 2 * stocks + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_statistics_do_not_cancel_and_add_up_over_processes(offset, monkeypatch):
    torch.manual_seed(7)
    halves = [torch.randn(2, 9, 17, 12, device=DEVICE) * (i + 1) + offset + i for i in range(2)]
    whole = torch.cat(halves).double().flatten(0, 2)
    pixels, values = halves[0].numel() // 12, len(whole)
    seen = []
    monkeypatch.setattr(triton_branch, "sum_over_processes", lambda moments: seen.append(moments) or moments)
    for half in halves:
        triton_branch._over_processes(triton_launch.statistics(half), pixels, values)
    monkeypatch.setattr(triton_branch, "sum_over_processes", lambda _: sum(seen))
    merged = triton_branch._over_processes(triton_launch.statistics(halves[0]), pixels, values)
    both = torch.cat(halves)
    layer = GlobalBatchNorm2d(12).to(DEVICE)
    assert len(triton_launch.statistics(both).partial) > 2 and len(merged.partial) == 1
    for parts, maps in ((triton_launch.statistics(both), both), (merged, both.clone())):
        mean, inverse = triton_launch.normalise(layer, parts, values, maps, False)
        torch.testing.assert_close(mean.double(), whole.mean(0), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(inverse.double(), (whole.var(0, False) + layer.eps).rsqrt(), atol=0, rtol=1e-5)


def test_a_batch_that_is_computed_again_is_not_counted_again():
    lite = lite_residual(torch.float32)
    pooled = torch.randn(3, 16, 5, 5, device=DEVICE)
    before = [each.clone() for each in vectors(lite)]
    with keep_running_statistics():
        run_branch(lite, pooled, torch.randn(3, 24, 5, 5, device=DEVICE))
    assert all(map(torch.equal, before, vectors(lite)))


def test_over_two_processes_with_the_same_images_a_branch_is_that_of_one(monkeypatch):
    lite, twin = (lite_residual(torch.float64) for _ in range(2))
    pooled = torch.randn(3, 16, 5, 5, dtype=torch.float64, device=DEVICE)
    grad = torch.randn(3, 24, 5, 5, dtype=torch.float64, device=DEVICE)
    alone = run_branch(twin, pooled, grad)
    exchanged = []
    monkeypatch.setattr("tinytl_hf.network.norms.world_size", lambda: 2)
    monkeypatch.setattr(triton_branch, "sum_over_processes", lambda own: exchanged.append(own.shape) or own * 2)
    for ours, theirs in zip(run_branch(lite, pooled, grad), alone, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    assert len(exchanged) == 4  # one each way for each norm


@pytest.mark.parametrize(
    ("large", "size", "layout"),
    [
        ((8, 9), (4, 5), torch.channels_last),
        ((5, 9), (1, 4), torch.channels_last),
        ((5, 5), (5, 5), torch.contiguous_format),  # which eager adds to
        ((4, 3), (7, 5), torch.channels_last),
        ((3, 8), (2, 2), torch.channels_last),
    ],
)
def test_up_sampling_is_pytorchs_and_its_gradient_the_adjoint(large, size, layout):
    torch.manual_seed(8)
    maps = torch.randn(2, 12, *large, dtype=torch.float64, device=DEVICE).contiguous(memory_format=layout)
    small = torch.randn(2, 12, *size, dtype=torch.float64, device=DEVICE, requires_grad=True)
    expected = maps + F.interpolate(small, size=large, mode="bilinear", align_corners=False)
    grad = torch.randn_like(maps)
    (wanted,) = torch.autograd.grad(expected, [small], grad)
    found = upsample_add(maps, small, "triton")
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(*torch.autograd.grad(found, [small], grad), wanted, atol=1e-12, rtol=1e-12)
