"""What PyTorch's own tools do with a model in training mode: they work, or one line says what to do."""

import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from shared import slow
from torch.func import functional_call, grad, jvp, vmap

from tinytl_hf import TinyTLError, TinyTLModel

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
FIX = r"call model\.eval\(\) first, or build the model with lean=False"
# One of each kind of training pass: chains with lite residuals, chains in slices, what is computed again, runs of it.
NETWORKS = [
    ("TinyTL-L+B", "mobilenet_v2"),
    ("TinyTL-B", "resnet18"),
    ("TinyTL-L+B", "mobilenet_v3_small"),
    ("FT-Last", "mobilenet_v2"),
    slow("TinyTL-L+B", "convnext_tiny"),
]
pytestmark = pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and still used


def of_one(model):
    return lambda image: model(image[None])[0]


def gradients(model, images, over=None):
    """The sum of the logits' gradients of what trains or, with ``over`` images, of each of them."""
    given = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    gradient = grad(lambda given, images: functional_call(model, given, (images,)).sum())
    return gradient(given, images) if over is None else vmap(gradient, (None, 0))(given, images[:, None])


@pytest.mark.parametrize(("method", "backbone"), NETWORKS)
def test_what_cannot_follow_lean_training_is_told_so(method, backbone, make_model):
    model = make_model(method, backbone).train()
    for part in (model, model.backbone):
        with pytest.raises(TinyTLError, match=rf"^torch\.jit\.trace: .*; {FIX}$"):
            torch.jit.trace(part, IMAGES)
        with pytest.raises(TinyTLError, match=rf"^torch\.func: .*; {FIX}$"):
            vmap(of_one(part), randomness="different")(IMAGES)
        with pytest.raises(TinyTLError, match=rf"^torch\.func: .*; {FIX}$"):
            jvp(part, (IMAGES,), (IMAGES,))
        with pytest.raises(TinyTLError, match=rf"^torch\.func: .*; {FIX}$"):
            gradients(part, IMAGES)
        with pytest.raises(TinyTLError, match=r"^torch\.jit\.script: .*; use torch\.jit\.trace or torch\.export"):
            torch.jit.script(part)
    with pytest.raises(TinyTLError, match=rf"^torch\.fx: .*; {FIX}$"):
        torch.fx.symbolic_trace(model.backbone)
    with pytest.raises(TinyTLError, match=r"^torch\.fx: .*; trace model\.backbone, in evaluation mode or of a model"):
        torch.fx.symbolic_trace(model)
    model(IMAGES).sum().backward()  # it is as it was
    assert all(parameter.grad is not None for parameter in model.trainable_parameters())


@pytest.mark.parametrize("lean", [True, False])
def test_the_fixes_that_are_named_work(lean, make_model):
    model = make_model("TinyTL-B", "mobilenet_v2", lean=lean).train(not lean)
    model.backbone.classifier[0].p = 0.0  # so that two passes are the same
    expected = model(IMAGES)
    torch.testing.assert_close(torch.jit.trace(model, IMAGES)(IMAGES), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(model.backbone)(IMAGES), expected)
    torch.testing.assert_close(vmap(of_one(model))(IMAGES), expected)
    model(IMAGES).sum().backward()
    of_all, of_each = gradients(model, IMAGES), gradients(model, IMAGES, over=0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(of_all[name], parameter.grad, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(of_each[name].sum(0), parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("method", "backbone"), NETWORKS)
def test_a_copy_trains_as_the_model_does(method, backbone, make_model):
    model = make_model(method, backbone).train()
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    found = []
    for each in (model, *copies):
        torch.manual_seed(0)
        each(IMAGES).square().sum().backward()
        found.append([parameter.grad for parameter in each.trainable_parameters()])
    assert found[0] and all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


@pytest.mark.parametrize(("method", "backbone"), NETWORKS)
def test_gradients_of_gradients_are_refused_where_somebody_asks_for_them(method, backbone, make_model):
    model = make_model(method, backbone).train()
    model(IMAGES).square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    images = IMAGES.clone().requires_grad_()
    model(images).square().sum().backward(create_graph=True)
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad.detach(), gradient, rtol=1e-3, atol=1e-4)
    with pytest.raises(TinyTLError, match=r"^create_graph=True: .* build the model with lean=False for that$"):
        images.grad.square().sum().backward()


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize(("method", "backbone"), NETWORKS[:3])
def test_weights_on_another_device_than_the_images_are_named(method, backbone, backend, make_model):
    model = make_model(method, backbone, backend=backend).train().to("meta")
    with pytest.raises(TinyTLError, match=r"^images are on cpu and parameters of the model on meta: move them to one"):
        model(IMAGES)


def test_a_lite_residual_on_another_device_is_named(make_model):
    model = make_model("TinyTL-L+B", "mobilenet_v2").train()
    model.backbone.features[4].lite_residual.to("meta")
    with pytest.raises(TinyTLError, match=r"^images are on cpu and parameters of the model on meta: move them to one"):
        model(IMAGES)


def test_weights_that_are_offloaded_evaluate_and_say_that_they_do_not_train(make_model):
    model = make_model("TinyTL-L+B", "mobilenet_v2").eval()
    expected = model(IMAGES)
    model = cpu_offload(model, torch.device("cpu"))
    assert torch.equal(model(IMAGES), expected)
    with pytest.raises(TinyTLError, match=r"weights that are offloaded take model\.eval\(\) or lean=False$"):
        model.train()(IMAGES)


def test_weights_that_are_offloaded_are_neither_saved_nor_loaded_nor_trained_beside(make_model, tmp_path):
    make_model("TinyTL-B").save_pretrained(tmp_path / "other")
    model, other = make_model("TinyTL-L+B"), TinyTLModel.from_pretrained(tmp_path / "other")
    model.save_pretrained(tmp_path / "before")
    offloaded = cpu_offload(model, torch.device("cpu"))
    tensors = {name: torch.ones(tensor.shape) for name, tensor in offloaded.adapter_tensors().items()}
    message = r"is on the meta device, and holds no values; .* call accelerate\.hooks\.remove_hook_from_module"
    for call in (
        lambda: offloaded.save_pretrained(tmp_path / "offloaded"),
        lambda: offloaded.load_adapter_tensors(tensors, source="ones"),
        lambda: offloaded.load_adapter(tmp_path / "other", "other"),
        lambda: other.to("meta").save_pretrained(tmp_path / "offloaded"),
    ):
        with pytest.raises(TinyTLError, match=message):
            call()
    assert not (tmp_path / "offloaded").exists()
    remove_hook_from_module(offloaded, recurse=True)
    offloaded.save_pretrained(tmp_path / "after")
    before, after = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("before", "after"))
    assert before == after


@pytest.mark.parametrize("method", ["TinyTL-B", "FT-Full"])
def test_a_model_is_not_made_without_values(method, make_model, tmp_path):
    make_model(method).save_pretrained(tmp_path)
    with torch.device("meta"), pytest.raises(TinyTLError, match="on the meta device, and holds no values; build the"):
        TinyTLModel.from_pretrained(tmp_path)


def test_images_for_weights_that_are_offloaded_are_images(make_model):
    model, image = make_model("TinyTL-B").eval(), torch.full((3, 70, 80), 200, dtype=torch.uint8)
    expected = model.preprocess(image)
    assert torch.equal(cpu_offload(model, torch.device("cpu")).preprocess(image), expected)


def test_features_of_a_network_whose_forward_was_replaced_are_refused_not_its_logits(make_model):
    message = r"its forward pass was replaced, by hand or by Accelerate's hooks, and features\(\) and trained_blocks"
    model = make_model("TinyTL-B").eval()
    logits, features = model(IMAGES), model.features(IMAGES)
    dispatched = dispatch_model(model, {"backbone.features": "cpu", "backbone.classifier": "cpu"}, force_hooks=True)
    assert torch.equal(dispatched(IMAGES), logits)
    with pytest.raises(TinyTLError, match=message):
        dispatched.features(IMAGES)
    assert torch.equal(remove_hook_from_module(dispatched, recurse=True).features(IMAGES), features)
    last = make_model("TinyTL-B", trained_blocks=3).train()
    forward = last.backbone.features.forward
    last.backbone.features.forward = lambda images: forward(images)
    with pytest.raises(TinyTLError, match=f"^Sequential: {message}"):
        last(IMAGES)
    last.backbone.features.forward = forward
    assert last(IMAGES).shape == (len(IMAGES), 4)
