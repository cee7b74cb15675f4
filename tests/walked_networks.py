"""One network, by every method that it claims: trains, lean as stock, and starts as the base; or why it does not."""

import torch
from torch import nn

from tinytl_hf import TinyTLError, TinyTLModel
from tinytl_hf.lean.notes import MASKS, RECOMPUTE
from tinytl_hf.network.backbones import create_backbone

METHODS = ("TinyTL-B", "TinyTL-L", "TinyTL-L+B", "FT-Last", "FT-Norm+Last", "FT-Full", "FT-Layerwise")
BOUND = 1e-9  # of float64, relative to the largest output or gradient
IMAGES, CLASSES = 2, 3


def walk(name, size=64, methods=METHODS):
    """Try a network.

    Returns:
        ``{"refused": reason}``, or the methods that it trains by, and how ``TinyTL-B`` is lean:
        ``masks``, ``recompute`` (with masks elsewhere) or ``partly`` (something stays stock).

    Raises:
        AssertionError: It trains by a method and is wrong.
    """
    images = torch.randn(IMAGES, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = {"methods": []}
    for method in methods:
        try:
            lean = _model(name, method, size, lean=True)
        except TinyTLError as error:
            if method == methods[0]:
                return {"refused": str(error)}
            found.setdefault("without", {})[method] = str(error)
            continue
        _check_step_0(name, method, lean, images)
        _check_gradients(method, lean, _model(name, method, size, lean=False), images)
        found["methods"].append(method)
        if method == "TinyTL-B":
            paths = set(lean.training_paths.values())
            stock = bool(lean.stock_layers)
            found["lean"] = (
                "partly" if stock or paths - {MASKS, RECOMPUTE} else "masks" if paths == {MASKS} else RECOMPUTE
            )
    return found


def _model(name, method, size, lean):
    torch.manual_seed(0)
    options = {"num_classes": CLASSES, "weights": "none", "train_size": size, "lean": lean}
    return TinyTLModel.from_backbone(name, method=method, **options).double()


def _check_step_0(name, method, model, images):
    base = create_backbone(name, "none", CLASSES).double().eval()
    own = model.backbone.state_dict()
    for key, tensor in base.state_dict().items():
        assert key in own, f"{method}: {key} is gone"
        tensor.copy_(own[key])
    with torch.no_grad():
        _check_close(model.eval()(images), base(images), f"{method}: step 0")


def _check_gradients(method, lean, stock, images):
    results = []
    for model in (lean.train(), stock.train()):
        for key, parameter in model.backbone.named_parameters():
            if key.endswith("lite_residual.norm2.weight"):
                nn.init.constant_(parameter, 0.3)  # so that lite residuals matter
        output = model(images)
        output.square().mean().backward()
        results.append((output, {k: p.grad for k, p in model.backbone.named_parameters() if p.requires_grad}))
    (ours, our_grads), (theirs, their_grads) = results
    _check_close(ours, theirs, f"{method}: output")
    present = [gradient for gradient in their_grads.values() if gradient is not None]
    largest = max(gradient.abs().max() for gradient in present)
    assert largest > 0, f"{method}: nothing trains"
    for key, gradient in their_grads.items():
        if gradient is None:
            assert our_grads[key] is None, f"{method}: gradient of {key}"
        else:
            assert (our_grads[key] - gradient).abs().max() <= BOUND * largest, f"{method}: gradient of {key}"


def _check_close(ours, theirs, what):
    assert theirs.isfinite().all(), f"{what}: not finite"
    assert (ours - theirs).abs().max() <= BOUND * theirs.abs().max(), what
