"""Whether the images of a batch depend on one another in a module: known by its layers' types, or tried out.

A module whose images are independent may run slice by slice and be computed a second time. Types are matched exactly.
A module with a layer of an unknown type is tried out once, on a copy: two images, alone and together, in training
mode and float64, at the sizes that they have in the network. It passes if each image gives the same in both ways, if
no random number is drawn, if nothing that the layers hold has changed, and if the input is not written over. A trial
is no proof, but what it misses would have to look like an independent layer on every one of these counts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import Permute, SqueezeExcitation, StochasticDepth
from torchvision.ops.misc import Conv2dNormActivation

from tinytl_hf.lean.int8 import Int8Conv2d, Int8SameConv2d
from tinytl_hf.network.blocks import TinyTLBlock, own_modules
from tinytl_hf.network.kinds import class_name
from tinytl_hf.network.norms import FrozenBatchNorm2d, FrozenBatchNormAct2d, has_batch_statistics
from tinytl_hf.network.same_padding import SameConv2d

# Modules that compute of an image what depends on that image alone, and the same each time (dropout is off).
OF_ONE_IMAGE: set[type[nn.Module]] = {
    *(nn.Conv2d, Int8Conv2d, SameConv2d, Int8SameConv2d, nn.Linear),
    *(FrozenBatchNorm2d, FrozenBatchNormAct2d, nn.LayerNorm, LayerNorm2d, nn.GroupNorm),
    *(nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.MaxPool2d),
    *(nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.Hardsigmoid, nn.Sigmoid),
    *(nn.Identity, nn.Dropout, StochasticDepth, Permute),
    *(nn.Sequential, Conv2dNormActivation, SqueezeExcitation),
}
# The same of timm, by their full names, with DropPath, which is off.
NAMES_OF_ONE_IMAGE = {
    *(f"timm.layers.activations.{name}" for name in ("GELU", "HardSigmoid", "HardSwish", "Sigmoid", "Swish")),
    *("timm.layers.conv_bn_act.ConvNormAct", "timm.layers.drop.DropPath", "timm.layers.linear.Linear"),
    *("timm.layers.norm.LayerNorm", "timm.layers.norm.LayerNorm2d", "timm.layers.norm.GroupNorm1"),
    *("timm.layers.layer_scale.LayerScale2d", "timm.layers.grn.GlobalResponseNorm", "timm.layers.mlp.Mlp"),
    *("timm.layers.squeeze_excite.SEModule", "timm.models._efficientnet_blocks.SqueezeExcite"),
}
TOLERANCE = 1e-9  # of float64, relative to the largest value: kernels for one and for two images round differently


def heavy_weights_are_frozen(module: nn.Module) -> bool:
    """Whether no weight trains whose gradient needs its layer's input; a norm's scale may."""
    heavy = (nn.Conv2d, nn.Conv1d, nn.Linear, nn.BatchNorm2d)
    return not any(m.weight.requires_grad for m in own_modules(module) if isinstance(m, heavy))


def independent_by_type(module: nn.Module) -> bool:
    """Whether the images are independent by the exact types of all that ``module`` is made of."""
    return all(
        type(part) in OF_ONE_IMAGE or isinstance(part, TinyTLBlock) or class_name(type(part)) in NAMES_OF_ONE_IMAGE
        for part in own_modules(module)
    )


def may_be_independent(module: nn.Module) -> bool:
    """Whether a trial is worth its time: not where a norm uses the statistics of the batch."""
    return not any(map(has_batch_statistics, own_modules(module)))


def independent_by_trial(module: nn.Module, images: Tensor) -> bool:
    """Try ``module`` on two images ``[2, C, H, W]``; a module that fails on them is not independent."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            trial = copy.deepcopy(module).double().train()
            return _passes(trial, images.double())
    except Exception:  # whatever a layer that we do not know may raise
        return False


def _passes(trial: nn.Module, images: Tensor) -> bool:
    run: Callable[[Tensor], Any] = trial.stock_forward if isinstance(trial, TinyTLBlock) else trial
    before, given, generator = copy.deepcopy(trial), images.clone(), torch.get_rng_state()
    together = run(images)
    alone = [run(image[None]) for image in images]
    if not isinstance(together, Tensor) or together.ndim != 4 or together.data_ptr() == images.data_ptr():
        return False
    bound = TOLERANCE * together.abs().max()
    same = [bool((one[0] - two).abs().max() <= bound) for one, two in zip(alone, together, strict=True)]
    nothing_drawn = torch.equal(torch.get_rng_state(), generator)
    nothing_written = torch.equal(images, given) and all(map(_same, trial.modules(), before.modules()))
    return all(same) and nothing_drawn and nothing_written


def inputs_of(network: nn.Module, modules: Iterable[nn.Module], size: int) -> dict[nn.Module, Tensor]:
    """What each of ``modules`` gets of two random images of ``size`` px, where that is one tensor of maps.

    A copy of the network runs, so that layers with a memory do not notice.
    """
    twin = copy.deepcopy(network).eval()
    copies = dict(zip(network.modules(), twin.modules(), strict=True))
    seen: dict[nn.Module, Tensor] = {}

    def look(original: nn.Module, _: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        if len(inputs) == 1 and not options and isinstance(inputs[0], Tensor) and inputs[0].ndim == 4:
            seen[original] = inputs[0].clone()

    for module in modules:
        copies[module].register_forward_pre_hook(partial(look, module), with_kwargs=True)
    parameter = next(p for p in network.parameters() if p.is_floating_point())
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        twin(images.to(parameter))
    return seen


def _same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two copies of a layer hold the same: tensors, and attributes that can be compared."""
    for name, value in vars(one).items():
        if name != "_modules" and not _equal(value, vars(other).get(name)):
            return False
    return vars(one).keys() == vars(other).keys()


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return bool(one == other)
