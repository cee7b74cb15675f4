"""The native back-end: every kernel of every instruction set that this processor has, against stock PyTorch."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from shared import slow
from torch import nn

from tinytl_hf import TinyTLModel
from tinytl_hf.config.engine import Engine
from tinytl_hf.config.network import LiteConfig
from tinytl_hf.lean import backend, bits, eager_backend, native_backend, native_library
from tinytl_hf.lean.chain import Chain, Stage
from tinytl_hf.lean.int8 import quantise
from tinytl_hf.lean.lite_branch import Branch
from tinytl_hf.network.lite_residual import LiteResidual
from tinytl_hf.network.norms import FrozenBatchNorm2d
from tinytl_hf.network.same_padding import SameConv2d

SETS = native_library.instruction_sets()
pytestmark = pytest.mark.skipif(not SETS, reason="the package was installed without a C compiler")
CL = torch.channels_last


# The best one and the one for any processor; those between are built of the same sources.
@pytest.fixture(params=[name if name in (next(iter(SETS)), "portable") else slow(name) for name in SETS] or [None])
def instruction_set(request, monkeypatch):
    monkeypatch.setattr(native_library, "kernels", lambda: SETS[request.param])


@pytest.fixture(params=[slow(1), 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def norm(channels):
    layer = FrozenBatchNorm2d(channels)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            tensor.copy_(torch.rand(channels) + 0.3)
        layer.bias.sub_(0.5)
    layer.weight.requires_grad_(False)
    return layer


def conv(inputs, outputs, kernel=1, stride=1, groups=1, bias=False):
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)
    layer.weight.requires_grad_(False)
    return layer


def inverted_residual(inputs, outputs, middle, stride=1, kernel=3, activation="relu6"):
    return (
        Stage(conv(inputs, middle), norm(middle), activation),
        Stage(conv(middle, middle, kernel, stride, middle), norm(middle), activation),
        Stage(conv(middle, outputs), norm(outputs)),
    )


def stem():
    depthwise = Stage(conv(32, 32, 3, 1, 32), norm(32), "relu6")
    return Stage(conv(3, 32, 3, 2), norm(32), "relu6"), depthwise, Stage(conv(32, 20), norm(20))


# Each: the chain, and the shape of its input. 40 and 24 channels leave tails in vectors of 16.
CHAINS = {
    "residual": lambda: (Chain(inverted_residual(16, 16, 40), True), (3, 16, 9, 7)),
    "relu, 5x5": lambda: (Chain(inverted_residual(16, 16, 24, 1, 5, "relu"), True), (2, 16, 8, 11)),
    "stride 2": lambda: (Chain(inverted_residual(16, 20, 96, 2)), (2, 16, 15, 14)),
    "stride 2, 5x5": lambda: (Chain(inverted_residual(9, 24, 40, 2, 5)), (2, 9, 14, 15)),
    "stem": lambda: (Chain(stem(), branch=1), (2, 3, 33, 31)),
    "ResNet": lambda: (
        Chain((Stage(conv(16, 24, 3, 2), norm(24), "relu"), Stage(conv(24, 18, 3), norm(18)))),
        (2, 16, 13, 12),
    ),
    "without norms": lambda: (
        Chain((Stage(conv(5, 16, bias=True), None, "relu"), Stage(conv(16, 3, 3, bias=True)))),
        (2, 5, 6, 5),
    ),
    "one stage": lambda: (Chain((Stage(conv(16, 40), norm(40), "relu6"),)), (2, 16, 5, 5)),
    "7x7 stride 2": lambda: (Chain((Stage(conv(3, 64, 7, 2), norm(64), "relu"),)), (2, 3, 33, 30)),
    "one pixel": lambda: (Chain(inverted_residual(16, 16, 96), True), (1, 16, 1, 1)),
    "SiLU": lambda: (Chain(inverted_residual(16, 16, 40, activation="silu"), True), (3, 16, 9, 7)),
    "SiLU, stride 2": lambda: (Chain(inverted_residual(9, 20, 44, 2, 5, "silu")[:2]), (2, 9, 14, 15)),
    "hardswish": lambda: (Chain(inverted_residual(16, 18, 44, 1, 5, "hardswish")), (2, 16, 8, 11)),
    "hardswish stem": lambda: (Chain((Stage(conv(3, 20, 3, 2), norm(20), "hardswish"),)), (2, 3, 33, 31)),
}
ACTIVATIONS = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}


def make(name, seed=0, **options):
    torch.manual_seed(seed)
    chain, shape = CHAINS[name]()
    x = 2 * torch.randn(shape).contiguous(memory_format=CL)
    return replace(chain, backend="native", **options), x


def stock(chain, x, dtype):
    """Output and pooled input by stock layers, in ``dtype``."""
    pooled = None
    y = inputs = x.to(dtype)
    for i, stage in enumerate(chain.stages):
        if i == chain.branch:
            inputs, pooled = y, F.avg_pool2d(y, 2) if min(y.shape[2:]) > 1 else None
        y = copy.deepcopy(stage.conv).to(dtype)(y)
        if stage.norm is not None:
            y = copy.deepcopy(stage.norm).to(dtype)(y)
        if stage.activation is not None:
            y = ACTIVATIONS[stage.activation](y)
    return (y + inputs if chain.residual else y), pooled


def stock_output(chain, dtype):
    return lambda maps: stock(chain, maps, dtype)[0]


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm().clamp(min=1e-9)).item()


@torch.no_grad()
@pytest.mark.parametrize("cache_mb", [1e-6, 0.02, 10.0])
@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_is_as_exact_as_stock_in_any_slices_and_threads(name, cache_mb, threads, instruction_set):
    chain, x = make(name, slice_mb=cache_mb)
    assert native_backend.fits(chain, x.dtype, x.shape) is None
    pools = min(chain.block_input_size(x.shape)) > 1
    exact, exact_pooled = stock(chain, x, torch.float64)
    output, pooled, kept = native_backend.chain_forward(chain, x, x.dtype, True, pools)
    assert error(output, exact) <= 2 * error(stock(chain, x, torch.float32)[0], exact) + 1e-7
    assert not pools or error(pooled, exact_pooled) < 1e-6
    _, _, expected = eager_backend.chain_forward(chain, x, x.dtype, True, False)
    for ours, theirs in zip(kept, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and ours.dtype == torch.uint8:
            assert torch.equal(ours, theirs)  # the bits of the eager back-end, in its order
        elif ours is not None:
            assert error(ours, theirs.double()) < 1e-6
    grad = torch.randn_like(output)
    grad_pooled = torch.randn_like(pooled) if pools else None
    for needs_input in (True, False):
        wanted = [needs_input, [stage.bias is not None for stage in chain.stages]]
        arguments = (x.shape, x.dtype, grad, grad_pooled, *wanted)
        ours = native_backend.chain_backward(chain, kept, *arguments)
        double = replace(chain, stages=tuple(in_double(stage) for stage in chain.stages))
        of_pooled = None if grad_pooled is None else grad_pooled.double()
        theirs = eager_backend.chain_backward(double, kept, x.shape, torch.float64, grad.double(), of_pooled, *wanted)
        for found, reference in zip([ours[0], *ours[1]], [theirs[0], *theirs[1]], strict=True):
            assert (found is None) == (reference is None)
            assert found is None or error(found, reference) < 2e-6


def in_double(stage):
    layers = [None if layer is None else copy.deepcopy(layer).double() for layer in (stage.conv, stage.norm)]
    return Stage(*layers, stage.activation)


@pytest.mark.parametrize("name", CHAINS)
def test_bf16_maps_give_gradients_no_further_off_than_stock(name, threads, instruction_set):
    errors = []
    for seed in range(8):  # as an activation's edge that one value falls beyond is most of an error
        chain, x = make(name, seed, slice_mb=(1e-6, 10.0)[seed % 2])
        x = x.bfloat16()
        exact = bf16_gradients(stock_output(chain, torch.float64), x, torch.float64)
        ours = bf16_gradients(chain, x, torch.bfloat16)
        theirs = bf16_gradients(stock_output(chain, torch.bfloat16), x, torch.bfloat16)
        assert ours[0].dtype == ours[1].dtype == torch.bfloat16
        errors.append([[error(each, true) for each, true in zip(run, exact, strict=True)] for run in (ours, theirs)])
    for found, other in torch.tensor(errors).mean(0).T:  # of the output, of the gradient
        assert found <= 1.1 * other + 1e-3


@torch.no_grad()
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", ["residual", "stride 2, 5x5", "stem", "ResNet", "one stage"])
def test_all_that_a_chain_gives_in_bf16_is_within_its_rounding(name, int8, threads, instruction_set):
    chain, x = make(name)
    if int8:
        quantise(nn.ModuleList(stage.conv for stage in chain.stages))
        chain = replace(chain, stages=tuple(map(replace, chain.stages)))
    x = x.bfloat16() if name != "stem" else x  # as images come from a loop of the user's own
    pools = min(chain.block_input_size(x.shape)) > 1
    output, pooled, kept = native_backend.chain_forward(chain, x, torch.bfloat16, True, pools)
    expected = eager_backend.chain_forward(chain, x.float(), torch.float32, True, pools)
    assert error(output, expected[0].double()) < 5e-3
    assert not pools or error(pooled, expected[1].double()) < 5e-3
    grad = torch.randn(output.shape).bfloat16()
    grad_pooled = torch.randn(pooled.shape).bfloat16() if pools else None
    for needs_input in (True, False):
        wanted = [needs_input, [stage.bias is not None for stage in chain.stages]]
        ours = native_backend.chain_backward(chain, kept, x.shape, torch.bfloat16, grad, grad_pooled, *wanted)
        of_pooled = None if grad_pooled is None else grad_pooled.float()
        theirs = eager_backend.chain_backward(chain, kept, x.shape, torch.float32, grad.float(), of_pooled, *wanted)
        for found, reference in zip([ours[0], *ours[1]], [theirs[0], *theirs[1]], strict=True):
            assert found is None or error(found, reference.double()) < 1e-2


def bf16_gradients(run, x, dtype):
    """The output for ``x`` in ``dtype``, and the gradient of ``x``."""
    maps = x.to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = run(maps)
    grad = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype)
    return output, torch.autograd.grad(output, maps, grad)[0]


def test_an_int8_weight_is_used_as_it_is(instruction_set):
    chain, x = make("residual")
    convs = nn.ModuleList(stage.conv for stage in chain.stages)
    quantise(convs)
    chain = replace(chain, stages=tuple(map(replace, chain.stages)))
    eager = replace(chain, backend="eager")
    torch.testing.assert_close(chain(x), eager(x), atol=1e-5, rtol=1e-5)
    assert error(chain(x.bfloat16()), eager(x).double()) < 5e-3


@pytest.mark.parametrize("activation", ["silu", "hardswish"])
def test_smooth_activations_and_their_slopes_are_those_of_pytorch_at_every_size_of_value(activation, instruction_set):
    values = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([-3.0, 3.0, 0.0, -1e30, 1e30])])
    plain = conv(1, 1, bias=True)
    nn.init.ones_(plain.weight), nn.init.zeros_(plain.bias)
    chain = Chain((Stage(plain, None, activation),), backend="native")
    results = []
    plain_kind = ACTIVATIONS[activation]
    for run, dtype in ((chain, torch.float32), (plain_kind, torch.float32), (plain_kind, torch.float64)):
        x = values.to(dtype).view(-1, 1, 1, 1).requires_grad_()
        run(x).sum().backward()
        results.append((run(x).detach().double(), x.grad.double()))
    for ours, theirs, exact in zip(*results, strict=True):
        largest = ((theirs - exact).abs() / exact.abs().clamp(min=1)).max()
        assert ((ours - exact).abs() / exact.abs().clamp(min=1)).max() <= largest + 1.2e-7


@pytest.mark.parametrize("name", ["residual", "SiLU", "hardswish"])
def test_what_is_not_a_number_stays_one(name, instruction_set):
    chain, x = make(name)
    x[0, 0, 4, 4] = float("nan")
    assert chain(x)[0].isnan().any() and not chain(x)[1:].isnan().any()
    assert chain(x.bfloat16())[0].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("channels", "stride", "kernel", "groups", "shape"),
    [
        ((16, 24), 2, 5, 2, (2, 16, 28, 27)),
        ((24, 24), 1, 5, 2, (3, 24, 14, 13)),
        ((40, 24), 1, 3, 1, (2, 40, 3, 3)),
        ((16, 16), 1, 1, 1, (4, 16, 1, 1)),
        ((48, 20), 2, 3, 2, (5, 48, 7, 7)),
        ((10, 14), 1, 3, 2, (2, 10, 7, 6)),  # groups of 5, which cannot be read in pairs
        ((9, 7), 2, 3, 1, (3, 9, 8, 8)),
        ((24, 24), 1, 3, 2, (1, 24, 7, 7)),  # an odd number of pixels
    ],
)
def test_a_lite_branch_is_as_exact_as_stock(channels, stride, kernel, groups, shape, dtype, threads, instruction_set):
    # In bf16 a value that falls beyond the ReLU's edge is most of an error: its mean over draws says more.
    draws, times, slack = (1, 1.5, 1e-6) if dtype == torch.float32 else (8, 1.2, 1e-3)
    size = 64 if kernel > 1 else 1
    lite = LiteConfig(kernel_size=kernel, groups=groups)
    errors = []
    for seed in range(draws):
        torch.manual_seed(seed)
        layers = LiteResidual(*channels, stride, size, lite).train()
        nn.init.uniform_(layers.norm2.weight, 0.5, 1.5)
        nn.init.normal_(layers.norm1.bias)
        errors.append(branch_errors(layers, torch.randn(shape).to(dtype)))
    ours, theirs = torch.tensor(errors).mean(0)
    assert (ours <= times * theirs + slack).all(), (ours, theirs)


def branch_errors(layers, pooled):
    """Errors of the native back-end and of stock PyTorch: output, gradients of input and weights, running variance."""
    plain, reference = copy.deepcopy(layers), copy.deepcopy(layers).double()

    def outcome(layers, run, dtype):
        maps = pooled.to(dtype).contiguous(memory_format=CL).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = run(maps)
        torch.manual_seed(1)
        grad = torch.randn(output.shape).to(output.dtype)
        found = [output, *torch.autograd.grad(output, [maps, *layers.parameters()], grad), layers.norm2.running_var]
        return [each.detach() for each in found]

    ours = outcome(layers, Branch(layers, None, "native"), pooled.dtype)
    theirs = outcome(plain, plain.before_upsampling, pooled.dtype)
    exact = outcome(reference, reference.before_upsampling, torch.float64)
    largest = max(each.norm() for each in exact[1:-1])
    # A gradient that is nothing but rounding says nothing.
    told = [i for i, true in enumerate(exact) if true.norm() > 1e-3 * largest]
    return [[error(run[i], exact[i]) if i in told else 0.0 for i in range(len(exact))] for run in (ours, theirs)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "small"), [((14, 14), (7, 7)), ((28, 28), (7, 7)), ((7, 9), (2, 3)), ((3, 3), (1, 1)), ((4, 4), (7, 3))]
)
def test_up_sampling_is_that_of_pytorch(size, small, dtype, threads, instruction_set):
    maps, source = (torch.randn(2, 12, *each).contiguous(memory_format=CL).to(dtype) for each in (size, small))
    expected = maps.double() + F.interpolate(source.double(), size=size, mode="bilinear")
    of_small = torch.ops.aten.upsample_bilinear2d_backward(maps.double(), list(size), list(source.shape), False)
    limit = 1e-6 if dtype == torch.float32 else 4e-3
    assert error(native_backend.upsample_backward(maps, source.shape, dtype), of_small) < limit
    native_backend.upsample_add(maps, source)
    assert error(maps, expected) < limit


def test_copies_of_a_model_in_use_give_the_same_bits_each_time(make_model, threads):
    model = make_model("TinyTL-L+B", backend="native").train()
    images = torch.randn(5, 3, 40, 40)

    def gradients():
        same = copy.deepcopy(model)  # with the same running statistics
        same(images).sum().backward()
        return [parameter.grad for parameter in same.trainable_parameters()]

    model(images)
    first = gradients()
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, gradients(), strict=True))


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "resnet18", "mnasnet1_0", "mobilenet_v3_small"])
def test_a_whole_model_has_the_gradients_of_stock(backbone, make_model):
    lean = make_model("TinyTL-L+B", backbone, backend="native").train()
    plain = make_model("TinyTL-L+B", backbone, lean=False).train()
    plain.load_state_dict(lean.state_dict())
    images = torch.randn(4, 3, 64, 64)
    found = []
    for model in (lean, plain.double()):
        model(images.to(next(model.parameters()).dtype)).square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    scale = max(grad.abs().max() for grad in found[1].values())
    assert found[0].keys() == found[1].keys()
    for name, grad in found[1].items():
        assert (found[0][name] - grad).abs().max() < 2e-3 * scale, name  # a value at 0 or 6 may fall to either side


def test_what_the_kernels_cannot_run_is_named_and_runs_on_eager(caplog):
    backend._say_once.cache_clear()
    caplog.set_level("INFO", "tinytl_hf")
    odd = Chain((Stage(conv(8, 12), norm(12), "relu"),), backend="native")
    x = torch.randn(2, 8, 6, 6)
    assert "multiple of 8" in native_backend.fits(odd, torch.float32, x.shape)
    assert "only fp32" in native_backend.fits(make("residual")[0], torch.float16, x.shape)
    grouped = Chain((Stage(conv(8, 16, 3, groups=2), norm(16), "relu"),), backend="native")
    assert "grouped" in native_backend.fits(grouped, torch.float32, x.shape)
    same = SameConv2d(8, 16, 3, 2, bias=False)
    same.weight.requires_grad_(False)
    oblong = Chain((Stage(same, norm(16), "relu"),), backend="native")
    assert native_backend.fits(oblong, torch.float32, x.shape) is None  # the same padding in rows and columns
    for chain, maps in ((odd, x), (grouped, x), (oblong, torch.randn(2, 8, 6, 7))):
        assert backend.of_chain(chain, torch.device("cpu"), torch.float32, maps.shape) == "eager"
        torch.testing.assert_close(chain(maps), stock(chain, maps, torch.float32)[0], atol=1e-5, rtol=1e-5)
    wide = Branch(LiteResidual(2048, 64, 1, 4, LiteConfig()), backend="native")
    assert backend.of_branch(wide, torch.device("cpu"), torch.float32) == "eager"
    assert backend.of_branch(wide, torch.device("cpu"), torch.float32) == "eager"
    said = [record.getMessage() for record in caplog.records if record.name == backend.__name__]
    for words in ("multiple of 8", "grouped, dilated", "between rows and columns", "1,048,576 weights"):
        assert any(words in line for line in said), words
    assert len(said) == 4 and backend.left_to_eager[-4:] == said  # each once


@torch.no_grad()
def test_masks_are_read_as_eager_packs_them():
    chain, x = make("one stage")
    output, _, (mask,) = native_backend.chain_forward(chain, x, x.dtype, True, False)
    assert torch.equal(bits.pack(output.permute(0, 2, 3, 1), 6.0), mask.view(-1))


def test_a_model_says_who_runs_it():
    assert backend.describe(Engine(), torch.device("cpu")).startswith(f"lean, native {next(iter(SETS))}")
    assert backend.describe(Engine(lean=False), torch.device("cpu")) == "stock"
    assert TinyTLModel.from_backbone("mobilenet_v2", num_classes=2, weights="none").engine.backend == "auto"
