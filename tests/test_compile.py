"""``torch.compile`` takes a lean training pass whole: each chain, lite branch and up-sampling is one operator."""

import copy
import pickle
from functools import partial

import pytest
import torch
from shared import NATIVE, slow
from test_lean import kept_bytes, whole_model
from torch import nn
from torch._dynamo.utils import counters
from torch.library import opcheck

from tinytl_hf.errors import TinyTLError
from tinytl_hf.lean import operators
from tinytl_hf.lean.lite_branch import Branch
from tinytl_hf.network.lite_residual import LiteResidual

BACKENDS = ["eager", NATIVE]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def models(make_model, backend, backbone="mobilenet_v2"):
    """A lean model and its copy, in fp32."""
    model = whole_model(make_model, "TinyTL-L+B", backbone, True, backend=backend).float()
    return model, copy.deepcopy(model)


def train_step(run, module, x):
    x = x.detach().clone().requires_grad_()
    y = run(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": x.grad, **found, **dict(module.named_buffers())}


def assert_equal(found, expected, rtol=1e-4):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = tensor.abs().max().item()
        torch.testing.assert_close(
            found[name], tensor, atol=rtol * scale, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("backend", [slow("eager"), NATIVE, slow("triton")])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_block_with_its_lite_residual_is_one_graph_with_the_same_gradients(backend, autocast, make_model):
    blocks = [model.backbone.features[3] for model in models(make_model, backend)]
    x = torch.randn(2, 24, 15, 16)
    compiled = torch.compile(blocks[0], backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, autocast):
        found, expected = train_step(compiled, blocks[0], x), train_step(blocks[1], blocks[1], x)
        copies = {name: tensor.clone() for name, tensor in found.items()}
        train_step(compiled, blocks[0], x.flip(0))
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
    assert_equal(copies, expected, rtol=0.03 if autocast else 1e-4)
    assert copies["lite_residual.norm1.num_batches_tracked"] == 1


@pytest.mark.parametrize("backend", [slow("eager"), NATIVE])
def test_a_smaller_last_batch_a_larger_image_and_no_gradient_are_served_too(backend, make_model):
    blocks = [model.backbone.features[3] for model in models(make_model, backend)]
    compiled = torch.compile(blocks[0], backend="aot_eager", fullgraph=True)
    for shape in ((4, 24, 12, 12), (3, 24, 12, 12), (2, 24, 17, 14), (5, 24, 10, 9)):
        for block in blocks:
            block.zero_grad()
        x = torch.randn(*shape)
        assert_equal(train_step(compiled, blocks[0], x), train_step(blocks[1], blocks[1], x))
    assert counters["stats"]["unique_graphs"] == 3  # one of any size is compiled at the third size
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), blocks[1](x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_block_keeps_no_more(backend, make_model):
    blocks = [model.backbone.features[3] for model in models(make_model, backend)]
    compiled = torch.compile(blocks[0], backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 24, 16, 16, requires_grad=True)
    train_step(compiled, blocks[0], x)  # which compiles it
    ours, theirs = (kept_bytes(partial(run, x))[0] for run in (compiled, blocks[1]))
    masks, pooled = 2 * (2 * 144 * 16 * 16) // 8, 2 * 24 * 8 * 8 * 4
    statistics = 2 * (24 + 24) * 4
    assert theirs == masks + pooled + statistics and ours <= theirs + 64


@pytest.mark.slow
@pytest.mark.filterwarnings("error::UserWarning:torch._dynamo")
@pytest.mark.parametrize("backbone", ["mobilenet_v2", "resnet18"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_whole_model_is_one_graph(backbone, backend, make_model, caplog):
    model, plain = models(make_model, backend, backbone)
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(4, 3, 64, 64)
    assert_equal(train_step(compiled, model, x), train_step(plain, plain, x), rtol=1e-3)
    train_step(compiled, model, x.flip(0))
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
    assert not [record for record in caplog.records if "recompile" in record.getMessage()]


@pytest.mark.parametrize(
    ("backbone", "method"),
    [
        ("mobilenet_v3_small", "TinyTL-B"),
        slow("mobilenet_v3_small", "TinyTL-L+B"),
        slow("efficientnet_b0", "TinyTL-B"),
        slow("convnext_tiny", "TinyTL-B"),
        slow("convnext_tiny", "TinyTL-L+B"),
    ],
)
def test_what_is_computed_again_stays_outside_of_the_graphs(backbone, method, make_model):
    model = make_model(method, backbone).train()
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(4, 3, 64, 64)
    assert_equal(train_step(compiled, model, x), train_step(plain, plain, x), rtol=1e-3)
    assert counters["stats"]["unique_graphs"] > 1


@pytest.mark.parametrize("backend", [*BACKENDS, slow("triton")])
def test_the_operators_keep_pytorchs_rules(backend, make_model):
    path = models(make_model, backend)[0].backbone.features[2].lean_path
    chain, branch = path.main, path.branch
    x = torch.randn(2, 16, 9, 10).contiguous(memory_format=torch.channels_last).requires_grad_()
    biases = [stage.bias for stage in chain.stages]
    outputs = opcheck_with_result(operators.chain_forward, (x, biases, chain.handle, torch.float32, True, True))
    y, pooled, *masks = (output.detach() for output in outputs)
    given = (masks, list(x.shape), chain.handle, torch.float32)
    opcheck_with_result(operators.chain_backward, (y, pooled, *given, True, [True] * 3))
    opcheck_with_result(operators.chain_backward, (y, None, *given, False, [False, True, False]))

    parameters = list(branch.parameters)
    pooled.requires_grad_()
    outputs = opcheck_with_result(operators.branch_forward, (pooled, parameters, branch.handle, torch.float32))
    small, *statistics = (output.detach() for output in outputs)
    parameters = [parameter.detach() for parameter in parameters]
    given = (small, pooled.detach(), parameters, statistics, branch.handle, torch.float32)
    opcheck_with_result(operators.branch_backward, (*given, True))

    maps = torch.randn_like(y).requires_grad_()
    small.requires_grad_()
    opcheck_with_result(operators.upsample_add, (maps, small, backend))
    opcheck_with_result(operators.upsample_backward, (y, list(small.shape), torch.float32, backend))


def test_what_triton_gives_lies_apart_as_pytorch_wants_of_an_operator(make_model):
    pytest.importorskip("triton")
    path = models(make_model, "triton")[0].backbone.features[2].lean_path
    chain, branch = path.main, path.branch
    x = torch.randn(2, 16, 9, 10).contiguous(memory_format=torch.channels_last)
    biases, parameters = [stage.bias for stage in chain.stages], list(branch.parameters)
    with torch.no_grad():  # PyTorch itself raises where outputs of an operator share memory
        y, pooled, *masks = operators.chain_forward(x, biases, chain.handle, torch.float32, True, True)
        given = (masks, list(x.shape), chain.handle, torch.float32, True, [True] * 3)
        made = operators.chain_backward(y, pooled, *given)
        small, *statistics = operators.branch_forward(pooled, parameters, branch.handle, torch.float32)
        given = (pooled, parameters, statistics, branch.handle, torch.float32)
        made += [*operators.branch_backward(small, *given, True), *statistics, *masks]
    assert all(each.nbytes == each.untyped_storage().nbytes() for each in made)


def opcheck_with_result(operator, arguments):
    opcheck(operator, arguments)
    return operator(*arguments)


def test_a_copy_has_a_handle_of_its_own_and_no_graph_computes_with_others_tensors(make_model):
    chain = make_model("TinyTL-L+B").train().backbone.features[3].lean_path.main
    twin, loaded = copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))
    assert len({chain.handle, twin.handle, loaded.handle}) == 3
    x = torch.randn(1, 24, 4, 4)
    operators.run_chain(twin, x, torch.float32, False)[0].sum().backward()
    assert twin.stages[0].bias.grad is not None and chain.stages[0].bias.grad is None
    biases = [stage.bias + 1 for stage in chain.stages]
    with pytest.raises(TinyTLError, match="compile the model alone"):
        operators.chain_forward(x, biases, chain.handle, torch.float32, False, False)


def test_a_lite_residual_alone_is_one_graph(make_model):
    torch.manual_seed(0)
    lite = next(m for m in make_model().modules() if isinstance(m, LiteResidual)).train()
    nn.init.ones_(lite.norm2.weight)
    twin = copy.deepcopy(lite)
    x = torch.randn(3, lite.conv1.in_channels, 5, 6)
    compiled = torch.compile(Branch(lite, backend="eager"), backend="aot_eager", fullgraph=True)
    assert_equal(train_step(compiled, lite, x), train_step(twin.before_upsampling, twin, x))
