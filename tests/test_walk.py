"""Every network of timm with up to 10 M parameters trains by the methods that it claims, or is refused with a reason.

It trains: lean gives the outputs and gradients of stock layers in float64, and step 0 is the base network itself.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from shared import slow
from torch import nn

from tinytl_hf import TinyTLError, TinyTLModel
from tinytl_hf.adapter.build import check_fits
from tinytl_hf.network import timm_nets
from tinytl_hf.network.backbones import create_backbone
from tinytl_hf.network.methods import METHODS, Role, parameter_roles

timm = pytest.importorskip("timm")
BOUND = 1e-9  # relative to the largest output or gradient
LIVE = 1e-6  # of the gradients' largest values, the median's least share of the largest
IMAGES, CLASSES = 2, 3
# In px. The second is tried where rounding exceeds the bound at the first: on maps of one px, the batch norms of lite
# residuals have two values a channel, and amplify it.
SIZES = (64, 96)
LARGEST = 10_000_000  # parameters
SAMPLE = {  # how the biases train, and whether there are lite residuals
    "test_efficientnet_ln": ({"masks", "recompute", "stock"}, True),
    "test_byobnet": ({"masks", "recompute"}, False),
    "regnetx_002": ({"masks"}, True),
    "convnext_zepto_rms": ({"masks", "recompute", "stock"}, False),
    "test_vit": "cls_token belongs to a VisionTransformer",
    "test_nfnet": "gain belongs to a ScaledStdConv2d",
    "levit_conv_128s": "its classifier is a tuple",
}


@pytest.mark.parametrize("name", [slow(name) if name.startswith(("regnet", "convnext")) else name for name in SAMPLE])
def test_a_network_trains_by_the_methods_that_it_claims_or_says_why_not(name):
    methods = ("TinyTL-B", "TinyTL-L+B", "FT-Full")
    found = walk(name, methods)
    if isinstance(SAMPLE[name], str):
        assert SAMPLE[name] in found["refused"]
    else:
        paths, lite = SAMPLE[name]
        assert set(found["paths"]["TinyTL-B"]) == paths
        assert found["methods"] == [method for method in methods if lite or method != "TinyTL-L+B"]


@pytest.mark.slow
def test_every_network_trains_by_the_methods_that_it_claims_or_says_why_not():
    """With ``TINYTL_WALK`` set to a file, what was found goes there, and what it holds is not tried again."""
    log = Path(os.environ["TINYTL_WALK"]) if "TINYTL_WALK" in os.environ else None
    known = {} if log is None or not log.exists() else dict(map(json.loads, log.read_text().splitlines()))
    for name in timm.list_models():
        if name in known or parameters(name) > LARGEST:
            continue
        try:
            known[name] = walk(name)
        except Exception as error:  # the walk goes on, and tells at its end
            known[name] = {"wrong": f"{type(error).__name__}: {error}"}
        if log is not None:
            with log.open("a") as file:
                file.write(json.dumps([name, known[name]]) + "\n")
    assert {name: found["wrong"] for name, found in known.items() if "wrong" in found} == {}
    assert sum("methods" in found for found in known.values()) > len(known) / 2


def parameters(name):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(name).parameters())


def walk(name, methods=tuple(METHODS)):
    """Try a network.

    Returns:
        ``{"refused": reason}``, or the methods that it trains by, why by no others, how many of its blocks have lite
        residuals, and by method how its parts train.

    Raises:
        AssertionError: It trains by a method and is wrong.
    """
    name = timm_nets.PREFIX + name
    cfg = timm_nets.pretrained_cfg(name)
    *first, last = (cfg.input_size[-1],) if cfg.fixed_input_size else SIZES
    for size in first:
        try:
            return _walk(name, methods, size)
        except AssertionError:
            continue
    return _walk(name, methods, last)


def _walk(name, methods, size):
    images = torch.randn(IMAGES, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, base = {"methods": [], "without": {}, "paths": {}, "lite": 0}, None
    for method in methods:
        try:
            lean, stock = (_model(name, method, size, lean) for lean in (True, False))
        except TinyTLError as error:
            assert "\n" not in str(error)
            found["without"][method] = str(error)
            continue
        base = _with_live_norms(create_backbone(name, "none", CLASSES).double(), images) if base is None else base
        for model in (lean, stock):
            _take_over(method, model, base)
        with torch.no_grad():
            _check_close(lean.eval()(images), base(images), f"{method}: step 0")
        _check_gradients(method, lean, stock, images)
        found["methods"].append(method)
        found["paths"][method] = sorted(set(lean.training_paths.values()))
        found["lite"] = max(found["lite"], sum(block.lite_residual is not None for block in lean._blocks.values()))
    if found["methods"]:
        check_fits(lean.config, lean.float().adapter_tensors(), name)  # as an adapter of it is when it is loaded
    return found if found["methods"] else {"refused": next(iter(found["without"].values()))}


def _model(name, method, size, lean):
    torch.manual_seed(0)
    options = {"num_classes": CLASSES, "weights": "none", "train_size": size, "lean": lean}
    return TinyTLModel.from_backbone(name, method=method, **options).double()


def _with_live_norms(base, images):
    """Give norms scales that are not zero, and the statistics of the images.

    Else maps and gradients of many networks with random weights vanish in depth, and all would be as it should.
    """
    roles = parameter_roles(base)
    for key, parameter in base.named_parameters():
        if roles[key] is Role.NORM_SCALE:
            nn.init.uniform_(parameter, 0.5, 1.5, generator=torch.Generator().manual_seed(1))
    norms = [module for module in base.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        base.train()(images)
    return base.eval()


def _take_over(method, model, base):
    own = model.backbone.state_dict()
    for key, tensor in base.state_dict().items():
        assert key in own, f"{method}: {key} is gone"
        own[key].copy_(tensor)


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
    sizes = sorted(gradient.abs().max() for gradient in their_grads.values() if gradient is not None)
    largest = sizes[-1]
    assert sizes[len(sizes) // 2] > LIVE * largest, f"{method}: the gradients vanish"
    for key, gradient in their_grads.items():
        if gradient is None:
            assert our_grads[key] is None, f"{method}: gradient of {key}"
        else:
            assert (our_grads[key] - gradient).abs().max() <= BOUND * largest, f"{method}: gradient of {key}"


def _check_close(ours, theirs, what):
    assert theirs.isfinite().all(), f"{what}: not finite"
    assert (ours - theirs).abs().max() <= BOUND * theirs.abs().max(), what
