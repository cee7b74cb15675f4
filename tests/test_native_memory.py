"""The native back-end: its kernels stay within their memory, and read tensors that lie in it in an unusual way."""

import copy

import pytest
import torch
from test_native import CL, SETS, conv, error, inverted_residual, norm, stock
from torch import nn

from tinytl_hf.config.network import LiteConfig
from tinytl_hf.lean import backend, native_backend, native_library
from tinytl_hf.lean.chain import Chain, Stage
from tinytl_hf.lean.lite_branch import Branch
from tinytl_hf.network.lite_residual import LiteResidual
from tinytl_hf.network.same_padding import SameConv2d

pytestmark = pytest.mark.skipif(not SETS, reason="the package was installed without a C compiler")
CPU = torch.device("cpu")
GUARD = 1 << 14  # values before and after the scratch memory that nobody may write


@pytest.fixture
def guarded(monkeypatch):
    """Scratch memory between values that are looked at after each call, and itself not of zeros."""

    def run(call, kernel, scratch_of):
        found = native_library.kernels()
        scratch = torch.full((getattr(found, scratch_of)(call.arguments) + 2 * GUARD,), float("nan"))
        scratch[:GUARD] = scratch[-GUARD:] = 7.0
        call.arguments.scratch = scratch[GUARD:].data_ptr()
        getattr(found, kernel)(call.arguments)
        assert (scratch[:GUARD] == 7).all() and (scratch[-GUARD:] == 7).all()

    monkeypatch.setattr(native_library.Call, "run", run)


def plain(inputs, outputs, kernel, stride, padding):
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
    layer.weight.requires_grad_(False)
    return layer


@torch.no_grad()
@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("rest", [0, 1, 2, 3])
def test_rows_that_no_kernel_reaches_have_room(rest, instruction_set, guarded, monkeypatch):
    monkeypatch.setattr(native_library, "kernels", lambda: SETS[instruction_set])
    chain = Chain((Stage(plain(256, 8, 4, 4, 0), norm(8), "relu"),), slice_mb=1e-6, backend="native")
    x = torch.randn(2, 256, 12 + rest, 7).bfloat16().contiguous(memory_format=CL)
    output, pooled, kept = native_backend.chain_forward(chain, x, torch.bfloat16, True, True)
    exact, exact_pooled = stock(chain, x, torch.float64)
    assert error(output, exact) < 5e-3 and error(pooled, exact_pooled) < 5e-3
    grads = (torch.randn_like(output), torch.randn_like(pooled), True, [True])
    assert native_backend.chain_backward(chain, kept, x.shape, torch.bfloat16, *grads)[0].isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("same", [False, True])
def test_a_padded_kernel_no_larger_than_its_stride_pools_as_stock_does(same, guarded):
    first = SameConv2d(8, 16, 3, 3, bias=False) if same else plain(8, 16, 3, 3, 1)
    chain = Chain((Stage(first, norm(16), "relu"), Stage(conv(16, 8), norm(8))), backend="native")
    first.weight.requires_grad_(False)
    threads = torch.get_num_threads()
    torch.set_num_threads(5)  # which take two rows each: a pair of rows to be pooled lay in two shares
    x = torch.randn(1, 8, 28, 28)
    output, pooled = chain.with_pooled_input(x)
    torch.set_num_threads(threads)
    exact, exact_pooled = stock(chain, x, torch.float64)
    assert error(output, exact) < 1e-6 and error(pooled, exact_pooled) < 1e-6


def apart(layer):
    """Put a stranger after each value of a norm's vectors."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(layer, name)
        tensor.data = torch.stack([tensor.data, torch.full_like(tensor.data, 1e6)], 1)[:, 0]


def test_a_chain_whose_norms_do_not_lie_value_after_value_has_the_gradients_of_one_whose_do():
    results = []
    for moves in (False, True):
        torch.manual_seed(0)
        chain = Chain(inverted_residual(16, 16, 40), True, backend="native")
        for stage in chain.stages:
            if moves:
                apart(stage.norm)
        x = torch.randn(2, 16, 9, 7, requires_grad=True)
        assert backend.of_chain(chain, CPU, x.dtype, x.shape) == ("eager" if moves else "native")
        output = chain(x)
        biases = [stage.bias for stage in chain.stages]
        results.append([output, *torch.autograd.grad(output.square().sum(), [x, *biases])])
    for usual, other in zip(*results, strict=True):
        torch.testing.assert_close(other, usual, atol=1e-4, rtol=1e-4)


def test_a_lite_branch_whose_norms_do_not_lie_value_after_value_has_the_gradients_of_one_whose_do():
    results = []
    for moves in (False, True):
        torch.manual_seed(0)
        layers = LiteResidual(16, 24, 1, 64, LiteConfig()).train()
        nn.init.uniform_(layers.norm2.weight, 0.5, 1.5)
        if moves:
            apart(layers.norm1), apart(layers.norm2)
        pooled = torch.randn(3, 16, 7, 6, requires_grad=True)
        output = Branch(layers, backend="native")(pooled)
        grads = torch.autograd.grad(output.sin().sum(), [pooled, *layers.parameters()])
        results.append([output, *grads, layers.norm2.running_mean, layers.norm2.running_var])
    for usual, other in zip(*results, strict=True):
        torch.testing.assert_close(other, usual, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_running_statistics_of_what_is_no_number_are_none_as_in_stock(value):
    torch.manual_seed(0)
    layers = LiteResidual(16, 24, 1, 64, LiteConfig()).train()
    plain_layers, pooled = copy.deepcopy(layers), torch.randn(3, 16, 7, 6)
    pooled[0, 0, 3, 3] = value
    output, expected = Branch(layers, backend="native")(pooled), plain_layers.before_upsampling(pooled)
    assert torch.equal(output.isfinite(), expected.isfinite())
    for ours, theirs in zip(layers.buffers(), plain_layers.buffers(), strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
