"""A training loop of one's own: hooks, modes and parameters that a user changes between the passes, as in PyTorch."""

import inspect
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from shared import slow
from started_runs import CONTEXT, HANG
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel
from torchvision.models.feature_extraction import create_feature_extractor

from tinytl_hf import TinyTLError, TinyTLModel
from tinytl_hf.config.network import HeadConfig

IMAGES, KINDS = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.arange(4)
# Chains, slices with a graph, blocks that are computed again, lite residuals in one run with their blocks.
KINDS_OF_PASSES = [
    *(("TinyTL-L+B", "mobilenet_v2"), ("TinyTL-B", "resnet18"), ("TinyTL-L+B", "mobilenet_v3_small")),
    slow("TinyTL-L+B", "convnext_tiny"),
]


@pytest.fixture
def make(make_model):
    def with_lite_residuals_in_use(method, backbone, **options):
        model = make_model(method, backbone, **options).train()
        for name, parameter in model.named_parameters():
            if name.endswith("lite_residual.norm2.weight"):
                nn.init.constant_(parameter, 0.5)
        return model

    return with_lite_residuals_in_use


def gradients(model, between=lambda: None):
    model.zero_grad()
    loss = F.cross_entropy(model(IMAGES), KINDS)
    between()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def off(found, expected):
    least = 1e-3 * max(float(gradient.norm()) for gradient in expected.values())
    return max(float((found[n] - g).norm()) / max(float(g.norm()), least) for n, g in expected.items())


@pytest.mark.parametrize(("method", "backbone"), KINDS_OF_PASSES)
def test_a_hook_on_a_parameter_runs_once_and_gets_its_whole_gradient(method, backbone, make):
    model, calls = make(method, backbone, slice_mb=0.05), []
    expected = gradients(model)
    hooks = [p.register_hook(lambda grad: (calls.append(1), 0.1 * grad)[1]) for p in model.trainable_parameters()]
    found = gradients(model)
    assert len(calls) == len(hooks) == len(expected)
    assert off(found, {name: 0.1 * gradient for name, gradient in expected.items()}) < 1e-2
    for hook in hooks:
        hook.remove()
    seen = []
    torch.autograd.graph.register_multi_grad_hook(list(model.trainable_parameters()), lambda grads: seen.append(1))
    gradients(model)
    assert seen == [1]


def test_lbfgs_takes_weights_that_lie_in_one_row_as_the_readme_says(make):
    model, losses = make("TinyTL-L+B", "mobilenet_v2"), []
    expected = gradients(model)
    model.to(memory_format=torch.contiguous_format)
    assert off(gradients(model), expected) < 1e-2

    def closure():
        model.zero_grad()
        losses.append(F.cross_entropy(model(IMAGES), KINDS))
        losses[-1].backward()
        return losses[-1]

    torch.optim.LBFGS(model.trainable_parameters(), lr=0.1, max_iter=2).step(closure)
    assert losses[1] < losses[0]


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")
@pytest.mark.parametrize(
    ("method", "backbone", "name"),
    [
        *(("TinyTL-L+B", "mobilenet_v2", "features.4"), ("FT-Full", "mobilenet_v2", "features.4")),
        *(("TinyTL-L", "resnet18", "layer2.1"), slow("TinyTL-L", "convnext_tiny", "features.1.1")),
    ],
)
def test_torchvisions_feature_extractor_takes_a_stock_network_of_any_method(method, backbone, name, make):
    model, twin, seen = make(method, backbone, lean=False), make(method, backbone, lean=False), []
    extractor = create_feature_extractor(model.backbone, [name])
    twin.backbone.get_submodule(name).register_forward_hook(lambda _, __, maps: seen.append(maps))
    for training in (True, False):
        twin.train(training)(IMAGES)
        found = extractor.train(training)(IMAGES)[name]
        torch.testing.assert_close(found, seen.pop(), atol=1e-5, rtol=1e-5)
    ours, theirs = (dict(each.backbone.get_submodule(name).named_buffers()) for each in (model, twin))
    statistics = [each for each in ours if "running" in each]
    torch.testing.assert_close([ours[each] for each in statistics], [theirs[each] for each in statistics])


@pytest.mark.parametrize(("method", "backbone"), KINDS_OF_PASSES)
def test_eval_between_the_passes_changes_no_gradient(method, backbone, make):
    model = make(method, backbone)
    expected = gradients(model)
    assert off(gradients(model, model.eval), expected) < 1e-2


@pytest.mark.parametrize(("method", "backbone"), KINDS_OF_PASSES)
def test_a_step_between_the_passes_is_refused_or_changes_no_gradient(method, backbone, make):
    model = make(method, backbone)
    inner = [p for name, p in model.named_parameters() if p.requires_grad and p is not model._head.weight]

    def step():
        with torch.no_grad():
            for parameter in inner:
                parameter.add_(0.1)

    if (method, backbone) == ("TinyTL-B", "resnet18"):  # its biases are read by nothing that goes back
        assert off(gradients(model, step), gradients(make(method, backbone))) < 1e-4
    else:
        with pytest.raises(
            (TinyTLError, RuntimeError),
            match=r"by an inplace|changed in place between",
        ):
            gradients(model, step)


@pytest.mark.parametrize(("method", "backbone"), KINDS_OF_PASSES[:3])
def test_freezing_between_the_passes_leaves_the_gradient_of_the_images(method, backbone, make):
    model, images = make(method, backbone), IMAGES.clone().requires_grad_()
    F.cross_entropy(model(images), KINDS).backward()
    expected, images.grad = images.grad, None
    loss = F.cross_entropy(model(images), KINDS)
    model.requires_grad_(False)
    loss.backward()
    assert off({"images": images.grad}, {"images": expected}) < 1e-2


def test_an_average_of_ones_own_formula_is_saved_by_the_model_as_the_readme_says(make, tmp_path):
    model = make("TinyTL-L+B", "mobilenet_v2")
    averaged = AveragedModel(model, avg_fn=lambda average, new, number: 0.9 * average + 0.1 * new)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.trainable_parameters():
                parameter.add_(0.1)
        averaged.update_parameters(model)
    model.load_adapter_tensors(averaged.module.adapter_tensors(), source="the average")
    model.save_pretrained(tmp_path)
    loaded = TinyTLModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(IMAGES), model.eval()(IMAGES))
    torch.testing.assert_close(loaded(IMAGES), averaged.eval()(IMAGES), rtol=1e-3, atol=1e-3)


class PlusRow(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.row = nn.Parameter(torch.zeros(len(weight), 1, 1, 1))

    def forward(self, weight):
        return weight + self.row


def test_a_parametrization_that_trains_is_refused_at_the_next_training_pass(make_model):
    model = make_model("TinyTL-B").train()
    model(IMAGES)
    conv = model.backbone.features[2].conv[0][0]
    parametrize.register_parametrization(conv, "weight", PlusRow(conv.weight))
    with pytest.raises(TinyTLError, match=r"conv.0.0.parametrizations.weight.0.row requires a gradient"):
        model.train()(IMAGES)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.zeros(3, 64, 64), np.zeros((1, 3, 64, 64), np.float32), [1]],
)
def test_what_is_no_batch_of_normalised_images_is_refused(images, make_model):
    with pytest.raises(TinyTLError, match=r"use normalised ones \[N, 3, H, W\]"):
        make_model("TinyTL-B", "resnet18").train()(images)


BROKEN = {
    "weight norm": (
        lambda model: parametrizations.weight_norm(model._head),
        "classifier.1.weight is not in the network",
    ),
    "another head": (
        lambda model: model.backbone.classifier.__setitem__(1, nn.Linear(1280, 7)),
        "classifier.1.weight has another shape",
    ),
    "other norms": (nn.SyncBatchNorm.convert_sync_batchnorm, "norm1.* is not in the network any more"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_network_whose_adapter_could_not_be_loaded_is_not_saved(how, make_model, tmp_path):
    model = make_model("TinyTL-L+B")
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    change, message = BROKEN[how]
    change(model)
    with pytest.raises(TinyTLError, match=message):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("dtype", ["bf16", "FP16", torch.float16])
def test_an_unknown_type_leaves_the_adapter_that_is_there(dtype, make_model, tmp_path):
    model = make_model("FT-Last")
    model.save_pretrained(tmp_path)
    with pytest.raises(TinyTLError, match=rf"^dtype is {re.escape(repr(dtype))}, not 'fp32' or 'fp16'$"):
        model.save_pretrained(tmp_path, dtype=dtype)
    TinyTLModel.from_pretrained(tmp_path)


def test_other_frozen_weights_are_recorded_so_that_the_adapter_is_not_loaded_over_those_it_was_not_trained_on(
    make_model, tmp_path, caplog
):
    model = make_model("TinyTL-B")
    before = model.config.backbone.sha256
    with torch.no_grad():
        model.backbone.features[0][0].weight.mul_(2)
    model.save_pretrained(tmp_path)
    assert "the frozen weights are not those of none any more" in caplog.text
    assert json.loads((tmp_path / "adapter_config.json").read_text())["backbone"]["sha256"] != before
    with pytest.raises(TinyTLError, match="was trained on other weights of mobilenet_v2 than none holds"):
        TinyTLModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 2.5}, "num_classes=2.5: use a whole number"),
        ({"num_classes": True}, "num_classes=True: use a whole number"),
        ({"train_size": "64"}, "train_size=64: use a whole number"),
        ({"eval_size": 0}, "eval_size=0"),
        ({"crop_pct": "a"}, "crop_pct=a: use a share"),
        ({"trained_blocks": "3"}, "trained_blocks=3: use a whole number"),
        ({"weights": None}, "weights=None: use imagenet"),
        ({"frozen_weights": "int4"}, "frozen_weights is 'int4'"),
        ({"lite": {}}, "lite={}: use a LiteConfig of tinytl_hf.config.network"),
        ({"head": 0.1}, "head=0.1: use a HeadConfig of tinytl_hf.config.network"),
        ({"lean": "no"}, "lean=no: use true or false"),
        ({"backend": "cuda"}, "backend=cuda: use one of auto"),
        ({"slice_mb": 0}, "slice_mb=0: use a number of MB above 0"),
        ({"slice_mb": float("inf")}, "slice_mb=inf: use a finite number of MB, up to 1e9"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(options, message, make_model):
    with pytest.raises(TinyTLError, match=message):
        make_model("FT-Last", **options)


def test_numbers_of_numpy_and_the_command_lines_all_are_taken(make_model, tmp_path):
    head = HeadConfig(dropout=np.float32(0.1))
    model = make_model("TinyTL-B", train_size=np.int64(64), trained_blocks=np.int64(3), head=head)
    model.save_pretrained(tmp_path)
    assert TinyTLModel.from_pretrained(tmp_path).config.trained_blocks == 3
    assert make_model("TinyTL-B", trained_blocks="all").config.trained_blocks is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "ONNX"}, "format=ONNX: use one of onnx"),
        ({"format": "onnx", "input": "int8"}, "input=int8: use one of float, uint8"),
        ({"format": "onnx", "overwrite": "yes"}, "overwrite=yes: use true or false"),
        ({"format": "onnx", "opset": 17}, "opset=17: export has no such option"),
    ],
)
def test_options_of_an_export_are_checked(options, message, make_model, tmp_path):
    with pytest.raises(TinyTLError, match=message):
        make_model("FT-Last").export(tmp_path / "m.onnx", **options)
    assert not any(tmp_path.iterdir())


def go_on(folder):
    """Train a model that PyTorch saved, and save its gradients and its adapter."""
    model, images = torch.load(f"{folder}/model.pt", weights_only=False)
    model(images).square().sum().backward()
    grads = {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
    torch.save(grads, f"{folder}/grads.pt")
    model.save_pretrained(f"{folder}/adapter")


def go_on_in_a_fork(folder):
    process = CONTEXT.Process(target=go_on, args=(folder,))
    process.start()
    process.join(HANG)
    assert process.exitcode == 0


def go_on_in_an_interpreter_that_has_imported_torch_alone(folder):
    code = f"import torch\n{inspect.getsource(go_on)}\ngo_on({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("method", "backbone", "other_process"),
    [
        (*KINDS_OF_PASSES[0], go_on_in_a_fork),
        *(slow(*row, go_on_in_an_interpreter_that_has_imported_torch_alone) for row in KINDS_OF_PASSES[:3]),
    ],
)
def test_a_whole_model_saved_by_pytorch_trains_on_in_another_process(method, backbone, other_process, make, tmp_path):
    model = make(method, backbone)
    torch.save((model, IMAGES), tmp_path / "model.pt")
    other_process(tmp_path)
    model(IMAGES).square().sum().backward()
    for name, grad in torch.load(tmp_path / "grads.pt").items():
        assert torch.equal(model.get_parameter(name).grad, grad), name
    model.load_adapter(tmp_path / "adapter", "saved")
    before, after = model.eval()(IMAGES), model.set_adapter("saved") or model(IMAGES)
    assert torch.equal(before, after)


@pytest.mark.parametrize("frozen_weights", ["fp32", "int8"])
def test_a_model_says_how_many_parameters_train(frozen_weights, capsys):
    options = {"method": "TinyTL-B", "num_classes": 10, "weights": "none", "frozen_weights": frozen_weights}
    TinyTLModel.from_backbone("mobilenet_v2", **options).print_trainable_parameters()
    assert capsys.readouterr().out == "trainable params: 29,866 || all params: 2,236,682 || trainable%: 1.3353\n"


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", ["TinyTL-L+B", "FT-Full"])
def test_images_of_another_type_than_the_model_are_named_with_the_fix(method, training, make_model):
    model = make_model(method).train(training)
    for own in FLOATS:
        model.to(own)
        for other in FLOATS:
            if other is own:
                assert model(IMAGES.to(other)).dtype == model.features(IMAGES.to(other)).dtype == own
                continue
            message = rf"^images are of {other} and the model of {own}: use images.to\({own}\)"
            for call in (model, model.features):
                with pytest.raises(TinyTLError, match=message):
                    call(IMAGES.to(other))
    with pytest.raises(TinyTLError, match=r"the model of torch\.bfloat16"):
        model(torch.randn(4, 1280))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen_weights", ["fp32", "int8"])
def test_mixed_precision_takes_images_of_any_type_but_float64(frozen_weights, training, make_model):
    model = make_model("TinyTL-L+B", frozen_weights=frozen_weights).train(training)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in FLOATS[1:]:
            assert model(IMAGES.to(dtype)).dtype == torch.bfloat16
        with pytest.raises(TinyTLError, match=r"^images are of torch.float64 and the model of torch.float32"):
            model(IMAGES.double())


def test_an_adapter_of_more_classes_than_logits_is_not_saved(make_model, tmp_path):
    model = make_model("FT-Last", num_classes=None, label_names=["cat", "dog"])
    model.label_names[0] = "lion"
    model.save_pretrained(tmp_path / "renamed")
    assert TinyTLModel.from_pretrained(tmp_path / "renamed").label_names == ["lion", "dog"]
    model.label_names.append("bird")
    with pytest.raises(TinyTLError, match=r"^label_names: there are 3, and the head has 2 logits; build a model with"):
        model.save_pretrained(tmp_path / "added")
    assert not (tmp_path / "added").exists()
