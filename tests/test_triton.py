"""The Triton back-end against stock PyTorch and the eager engine: on a GPU, or by Triton's interpreter on a CPU."""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from shared import slow
from test_lean import CONVOLUTIONS, gradients, norm, stock, whole_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tinytl_hf.lean import bits, int8
from tinytl_hf.lean.backend import of_chain
from tinytl_hf.lean.chain import Chain, Stage
from tinytl_hf.lean.stage import SMOOTH

pytest.importorskip("triton")
from tinytl_hf.lean import triton_backend, triton_launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
HALVES = [torch.bfloat16, torch.float16]


def exactness(of_network_or_activation, tolerance=1e-10):
    """How near float64 is to PyTorch's, whose hardswish holds 1/6 as a float32 on a GPU."""
    rounded = DEVICE == "cuda" and of_network_or_activation in ("hardswish", "mobilenet_v3_small")
    return 1e-6 if rounded else tolerance


def stage(convolution, activation, channels=(8, 8), trains_bias=True):
    options = dict(CONVOLUTIONS[convolution])
    if options.get("groups") == 8:
        options["groups"] = channels[0]
    conv = nn.Conv2d(*channels, bias=False, **options).double().requires_grad_(False)
    return Stage(conv, norm(channels[1], trains_bias), activation)


def inverted_residual(channels=16, middle=24, activation="relu6", stride="", **options):
    stages = (
        stage("pointwise", activation, (channels, middle)),
        stage(f"depthwise{stride}", activation, (middle, middle)),
        stage("pointwise", None, (middle, channels)),
    )
    return Chain(stages, **options)


def with_tensors_of(chain, dtype, device=DEVICE):
    """The same chain with parameters of another type."""
    return replace(chain, stages=tuple(_stage_of(each, dtype, device) for each in chain.stages))


def _stage_of(each, dtype, device):
    layers = nn.ModuleList([each.conv, each.norm] if each.norm is not None else [each.conv])
    copies = [type(layer).__new__(type(layer)) for layer in layers]
    for copy, layer in zip(copies, layers, strict=True):
        copy.__dict__.update(layer.__dict__)
        copy._parameters = {
            n: None if p is None else nn.Parameter(p.detach().to(device, dtype), p.requires_grad)
            for n, p in layer._parameters.items()
        }
        copy._buffers = {
            n: b.to(device, dtype) if b is not None and b.is_floating_point() else b for n, b in layer._buffers.items()
        }
    return Stage(copies[0], copies[1] if len(copies) > 1 else None, each.activation)


def run(chain, x, *grads, backend="triton"):
    """Outputs, masks, and the gradients of what trains: of ``x`` if it does, and of biases."""
    chain, x = replace(chain, backend=backend), x.detach().requires_grad_(x.requires_grad)
    outputs = chain.with_pooled_input(x) if len(grads) == 2 else (chain(x),)
    trained = [tensor for tensor in (x, *(each.bias for each in chain.stages)) if tensor is not None]
    trained = [tensor for tensor in trained if tensor.requires_grad]
    masks = outputs[0].grad_fn.saved_tensors
    return [y.detach() for y in outputs], masks, list(torch.autograd.grad(outputs, trained, grads))


def assert_same_as_eager(chain, x, *grads, tolerance=1e-10):
    assert of_chain(replace(chain, backend="triton"), x.device, x.dtype, x.shape) == "triton"
    ours, theirs = (run(chain, x, *grads, backend=name) for name in ("triton", "eager"))
    for found, expected in zip((*ours[0], *ours[2]), (*theirs[0], *theirs[2]), strict=True):
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    return ours, theirs


def assert_same_bits(found, expected):
    """On a GPU but for rounding, as cuDNN's convolutions may add up in another order each time."""
    tolerance = 1e-13 if DEVICE == "cuda" else 0.0
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def errors(found, exact):
    """The largest error of each tensor, as a share of its largest value."""
    return [
        ((f.double().cpu() - e.cpu()).abs().max() / e.abs().max()).item() for f, e in zip(found, exact, strict=True)
    ]


@pytest.mark.parametrize(
    ("convolution", "activation"),
    [
        *((convolution, "relu6") for convolution in CONVOLUTIONS),
        *(("depthwise", None), ("full stride 2", "relu")),
        *((convolution, name) for convolution in ("pointwise", "depthwise", "full stride 2") for name in SMOOTH),
    ],
)
def test_a_stage_has_the_outputs_gradients_and_masks_of_the_eager_engine(convolution, activation):
    torch.manual_seed(0)
    chain = with_tensors_of(Chain((stage(convolution, activation),)), torch.float64)
    x = torch.randn(3, 8, 7, 6, dtype=torch.float64, device=DEVICE).mul_(3).requires_grad_()
    grad = torch.randn_like(chain(x).detach())
    ours, theirs = assert_same_as_eager(chain, x, grad, tolerance=exactness(activation, 1e-11))
    assert ours[0][0].is_contiguous(memory_format=torch.channels_last)
    if activation is None:
        assert ours[1] == theirs[1] == (None,)
    elif activation in SMOOTH:
        torch.testing.assert_close(*ours[1], *theirs[1], atol=1e-12, rtol=1e-12)
    else:
        assert torch.equal(*ours[1], *theirs[1])
    (alone,) = run(chain, x.detach(), grad)[2]
    assert_same_bits(alone, ours[2][1])
    chain.stages[0].bias.requires_grad_(False)
    (alone,) = run(chain, x, grad)[2]
    assert_same_bits(alone, ours[2][0])


@pytest.mark.parametrize(
    ("layout", "slice_mb", "stride", "activation"),
    [
        (torch.contiguous_format, 2.0, "", "relu6"),
        (torch.channels_last, 1e-6, "", "relu6"),
        slow(torch.channels_last, 0.05, " 5x5 stride 2", "relu6"),
        slow(torch.channels_last, 1e-6, " 5x5 stride 2", "hardswish"),
        (torch.contiguous_format, 2.0, "", "silu"),
    ],
)
def test_a_chain_is_the_same_in_any_slices_and_layout(layout, slice_mb, stride, activation):
    torch.manual_seed(1)
    chain = inverted_residual(16, 24, activation, stride, residual=not stride, slice_mb=slice_mb)
    chain = with_tensors_of(chain, torch.float64)
    x = torch.randn(3, 16, 9, 7, dtype=torch.float64, device=DEVICE).contiguous(memory_format=layout).requires_grad_()
    grads = [torch.randn_like(each) for each in chain.with_pooled_input(x)]
    assert_same_as_eager(chain, x, *grads, tolerance=exactness(activation))


def test_a_stem_before_the_block_and_frozen_biases_change_nothing_else():
    torch.manual_seed(2)
    stem = stage("full stride 2", "relu", (3, 16))
    block = inverted_residual(residual=True)
    chain = with_tensors_of(replace(block, stages=(stem, *block.stages), branch=1), torch.float64)
    x = torch.randn(2, 3, 11, 8, dtype=torch.float64, device=DEVICE)
    grads = [torch.randn_like(each) for each in chain.with_pooled_input(x)]
    for needs_bias in ([True] * 4, [False, True, False, True], [False, False, True, False]):
        for each, needed in zip(chain.stages, needs_bias, strict=True):
            each.bias.requires_grad_(needed)
        assert_same_as_eager(chain, x, *grads)


def stock_run(chain, x, dtype, grad):
    """Outputs and gradients of the stock layers, all in one type."""
    chain = with_tensors_of(chain, dtype)
    x = x.to(DEVICE, dtype).requires_grad_()
    y = stock(chain.stages, chain.residual, x)
    return [y.detach(), *torch.autograd.grad(y, [x, *(each.bias for each in chain.stages)], grad.to(y))]


@pytest.mark.parametrize(
    ("dtype", "activation"), [(torch.float32, "relu6"), (torch.bfloat16, "relu6"), (torch.float16, "relu")]
)
def test_rounding_errors_are_no_larger_than_those_of_stock_layers(dtype, activation):
    torch.manual_seed(3)
    chain = inverted_residual(24, 40, activation, residual=True)
    x, grad = torch.randn(2, 24, 7, 6).to(dtype).double(), torch.randn(2, 24, 7, 6).to(dtype).double()
    for each in chain.stages:  # so that all contenders have the same weights
        each.conv.weight.copy_(each.conv.weight.to(dtype))
    exact = stock_run(chain, x, torch.float64, grad)
    plain = errors(stock_run(chain, x, dtype, grad), exact)
    parameters = with_tensors_of(chain, torch.float32)  # as under autocast
    given = x.to(DEVICE, dtype).requires_grad_()
    (y,), kept, (grad_input, *biases) = run(parameters, given, grad.to(DEVICE, dtype))
    assert y.dtype == grad_input.dtype == dtype and {each.dtype for each in biases} == {torch.float32}
    step = torch.finfo(dtype).eps
    assert errors([y], exact[:1])[0] < 1.5 * plain[0] + step / 10
    # Gradients depend on each bit of the masks, so those of the same masks are compared.
    wide = with_tensors_of(chain, torch.float64)
    given = (torch.float64, grad.to(DEVICE), None, True, [True] * 3)
    exact_input, exact_biases = triton_backend.chain_backward(wide, list(kept), x.shape, *given)
    found = errors([grad_input, *biases], [exact_input, *exact_biases])
    assert max(found) < (2 * step if dtype != torch.float32 else 4 * step)
    if dtype == torch.float32:
        assert max(errors([grad_input, *biases], exact[1:])) < 4 * max(plain[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", SMOOTH)
def test_smooth_chains_round_no_worse_than_stock_layers(dtype, activation):
    torch.manual_seed(3)
    chain = inverted_residual(24, 40, activation, residual=True)
    x, grad = (torch.randn(2, 24, 7, 6).to(dtype).double() for _ in range(2))
    for each in chain.stages:
        each.conv.weight.copy_(each.conv.weight.to(dtype))
    exact = stock_run(chain, x, torch.float64, grad)
    plain = errors(stock_run(chain, x, dtype, grad), exact)
    (y,), kept, gradients = run(
        with_tensors_of(chain, torch.float32), x.to(DEVICE, dtype).requires_grad_(), grad.to(DEVICE, dtype)
    )
    assert [each is None or each.dtype == torch.float32 for each in kept] == [True] * 3
    assert max(errors([y, *gradients], exact)) < (4 if dtype == torch.float32 else 1.5) * max(plain)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("convolution", ["pointwise", "depthwise", "full stride 2"])
def test_masks_tell_which_stored_values_lie_inside(dtype, convolution):
    torch.manual_seed(4)
    chain = with_tensors_of(Chain((stage(convolution, "relu6", (24, 24)),)), torch.float32)
    x = (torch.randn(2, 24, 8, 7, device=DEVICE) * 8).to(dtype)
    x[0, 0, 0, 0] = float("nan")
    y = replace(chain, backend="triton")(x)
    (mask,) = y.grad_fn.saved_tensors
    assert y.isnan().any() and (y == 6).any() and (y == 0).any()  # as with stock layers, NaN is not hidden
    assert torch.equal(mask, bits.pack_images(y.detach().permute(0, 2, 3, 1), 6.0))


def test_int8_weights_and_convolutions_without_norm_run_too():
    torch.manual_seed(5)
    layers = nn.Sequential(
        nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.Conv2d(16, 8, 3)
    )
    layers.requires_grad_(False)
    int8.quantise(layers)
    layers[0].bias.requires_grad_()
    chain = Chain((Stage(layers[0], None, "relu"), Stage(layers[1], None, "relu6"), Stage(layers[2])))
    layers.to(DEVICE)
    x = torch.randn(2, 8, 6, 5, device=DEVICE)
    assert_same_as_eager(chain, x, torch.randn(2, 8, 4, 3, device=DEVICE), tolerance=1e-4)
    single = Chain((Stage(layers[2]),))
    x = torch.randn(2, 16, 6, 5, device=DEVICE, requires_grad=True)
    assert_same_as_eager(single, x, torch.randn(2, 8, 4, 3, device=DEVICE), tolerance=1e-4)


def test_it_says_which_chains_it_cannot_run():
    shape = torch.Size((2, 8, 4, 4))
    odd = Chain((stage("pointwise", "relu", (8, 12)),))
    assert triton_backend.fits(odd, torch.float32, shape) == "12 channels before an activation, not a multiple of 8"
    assert triton_backend.fits(Chain((stage("pointwise", None, (8, 12)),)), torch.float32, shape) is None
    assert triton_backend.fits(inverted_residual(), torch.complex64, shape) == "complex64 maps"
    assert all(
        triton_backend.fits(Chain((stage(each, name),)), torch.bfloat16, shape) is None
        for each in CONVOLUTIONS
        for name in ("relu", *SMOOTH)
    )
    assert triton_backend.fits(Chain((stage("pointwise", "silu", (8, 12)),)), torch.float32, shape) is None


class Launches(TorchDispatchMode):
    """Counts what PyTorch launches: operations that are neither views nor empty tensors."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if not (operation.is_view or "empty" in str(operation)) and isinstance(result, (torch.Tensor, tuple)):
            self.counts[str(operation)] += 1
        return result


def launches_of_a_step(model, images):
    with Launches() as launched:
        F.cross_entropy(model(images), torch.arange(len(images), device=DEVICE)).backward()
    return sum(launched.counts.values())


def test_a_step_launches_hardly_more_kernels_than_stock_layers(make_model, monkeypatch, figure):
    images = torch.randn(2, 3, 64, 64, device=DEVICE)
    stock = {
        method: launches_of_a_step(make_model(method, lean=False, train_size=224).to(DEVICE).train(), images)
        for method in ("TinyTL-L+B", "FT-Full")
    }
    lean = make_model("TinyTL-L+B", train_size=224, backend="triton").to(DEVICE).train()
    kernels = Counter()  # they are counted and do not run
    monkeypatch.setattr(triton_launch, "_launch", lambda kernel, *_, **__: kernels.update([kernel.__name__]))
    total = launches_of_a_step(lean, images) + sum(kernels.values())
    figure(f"launches of a step of MobileNetV2: TinyTL-L+B by Triton {total}, stock {stock}")
    assert total < 0.9 * stock["TinyTL-L+B"] and total < 1.4 * stock["FT-Full"], (total, stock, kernels)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["mobilenet_v2", "mobilenet_v3_small"])
def test_a_whole_model_has_the_gradients_and_statistics_of_the_stock_one(make_model, backbone, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(
            triton_launch, "TILE", 1 << 15
        )  # fewer programs, as the interpreter's time is one for each
    torch.manual_seed(9)
    images = torch.randn(2, 3, 40, 40, dtype=torch.float64, device=DEVICE)
    lean, plain = (
        whole_model(make_model, "TinyTL-L+B", backbone, lean, backend="triton", train_size=40).to(DEVICE)
        for lean in (True, False)
    )
    ours, theirs = gradients(lean, images), gradients(plain, images)
    scale, near = max(gradient.abs().max() for gradient in theirs.values()), exactness(backbone)
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() <= near * scale, name
    statistics = lean.adapter_tensors()
    for name, tensor in plain.adapter_tensors().items():
        torch.testing.assert_close(statistics[name], tensor, atol=near, rtol=near)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_gpus_that_are_not_there(dtype, capability):
    script = Path(__file__).with_name("compile_triton.py")
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, script, str(capability), dtype], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert len({line.split()[0] for line in done.stdout.splitlines()}) == 13
