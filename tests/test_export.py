"""A model in evaluation mode is stock PyTorch, so that PyTorch's own tools take it as it is, gradients on or off."""

import pytest
import torch
from shared import slow

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def exported(model):
    return torch.export.export(model, (IMAGES,)).module()


def traced(model):
    return torch.jit.trace(model, IMAGES)


def compiled(model):
    return torch.compile(model, backend="eager", fullgraph=True)


TOOLS = [
    slow(exported, "mobilenet_v2"),
    slow(exported, "mobilenet_v3_small"),
    (traced, "mobilenet_v2"),
    slow(compiled, "resnet18"),
]


@pytest.mark.parametrize(("tool", "backbone"), TOOLS)
@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and still used
def test_a_tool_of_pytorch_takes_an_eval_model_without_no_grad(tool, backbone, make_model):
    model = make_model("TinyTL-L+B", backbone).eval()
    expected = model(IMAGES)
    assert expected.requires_grad
    torch.testing.assert_close(tool(model)(IMAGES), expected)


def test_in_evaluation_mode_gradients_are_stock_ones(make_model):
    lean, plain = (make_model("TinyTL-L+B", "mobilenet_v3_small", lean=lean).double().eval() for lean in (True, False))
    results = []
    for each in (lean, plain):
        images = IMAGES.double().requires_grad_()
        each(images).square().sum().backward()
        results.append([images.grad, *(p.grad for p in each.trainable_parameters())])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
