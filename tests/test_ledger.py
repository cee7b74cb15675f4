import pytest
import torch
from shared import assert_left_as_found, state_of
from torch import nn

from tinytl_hf.config.network import HeadConfig
from tinytl_hf.measure.ledger import kept_by_layer, kept_for_backward

pytestmark = pytest.mark.usefixtures("one_thread")

HEAD_INPUT = 1280 * 4  # bytes an image


def make_batch(images, size=64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(images, 3, size, size, generator=generator), torch.arange(images) % 4


def bytes_of_loss(images, classes=4):
    """What cross entropy keeps: the log-probabilities, and a scalar to divide by."""
    return images * classes * 4 + 4


@pytest.mark.parametrize("lean", [True, False])
def test_ledger_of_last_layer_is_the_heads_input_and_the_loss(make_model, lean):
    model = make_model("FT-Last", lean=lean)
    assert kept_for_backward(model, *make_batch(3)) == 3 * HEAD_INPUT + bytes_of_loss(3)


def test_ledger_of_lean_biases_is_one_bit_for_each_relu6(make_model):
    model = make_model("TinyTL-B")
    values = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: values.append(output.numel()))
        for module in model.modules()
        if isinstance(module, nn.ReLU6)
    ]
    with torch.no_grad():  # the stock pass, with layers one by one
        model.eval()(make_batch(2)[0])
    for hook in hooks:
        hook.remove()
    masks = sum(-(-count // 8) for count in values)
    assert kept_for_backward(model, *make_batch(2)) == masks + 2 * HEAD_INPUT + bytes_of_loss(2)


def test_ledger_sees_what_each_lite_residual_keeps(make_model):
    biases, both = make_model("TinyTL-B"), make_model("TinyTL-L+B")
    kept = []  # the pooled input, and mean and deviation of each norm's channels
    for block in both._blocks.values():
        lite = block.lite_residual
        vectors = 2 * (lite.norm1.num_features + lite.norm2.num_features)
        lite.conv1.register_forward_hook(
            lambda _, inputs, output, vectors=vectors: kept.append(inputs[0].numel() + vectors)
        )
    with torch.no_grad():
        both.eval()(make_batch(2)[0])
    assert len(kept) == 17
    batch, expected = make_batch(2), 4 * sum(kept)
    assert kept_for_backward(both, *batch) == kept_for_backward(biases, *batch) + expected


def test_ledger_of_lean_biases_is_over_50_times_smaller_than_of_stock(make_model):
    batch = make_batch(2)
    lean = kept_for_backward(make_model("TinyTL-B"), *batch)
    stock = kept_for_backward(make_model("TinyTL-B", lean=False), *batch)
    assert stock > 50 * lean


def test_ledger_leaves_the_model_and_the_generator_alone(make_model):
    model = make_model("FT-Full", head=HeadConfig(dropout=0.5)).eval()
    before, generator = state_of(model), torch.get_rng_state()
    kept_for_backward(model, *make_batch(2))
    assert_left_as_found(model, before)
    assert not any(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), generator)


def test_the_ledger_names_the_layer_that_keeps_a_map(make_model):
    model, batch = make_model("FT-Full", "resnet18", lean=False), make_batch(2)
    kept = kept_by_layer(model, *batch)
    assert sum(kept.values()) == kept_for_backward(model, *batch)
    # The first norm keeps its input; the pooling keeps its own and, as int64, where each value came from.
    assert kept["bn1"] > 4 * 2 * 64 * 32 * 32
    assert kept["maxpool"] >= 8 * 2 * 64 * 16 * 16
