"""Training memory as the TinyTL paper computes it: analytic, nothing is measured."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tinytl_hf.model import TinyTLModel
from tinytl_hf.network.blocks import TinyTLBlock
from tinytl_hf.network.head import Head
from tinytl_hf.network.kinds import class_name
from tinytl_hf.network.lite_residual import LiteResidual
from tinytl_hf.network.methods import NORMS_OF_TIMM, weights_of

FLOAT_BYTES = 4
MASKED = (nn.ReLU, nn.ReLU6, nn.LeakyReLU)
# Activations and norms that need their input whatever trains, with those of timm that are none of PyTorch's.
SMOOTH = (nn.Hardswish, nn.SiLU, nn.GELU, nn.Hardsigmoid, nn.Sigmoid, nn.Mish, nn.LayerNorm, nn.GroupNorm)
ACTIVATIONS_OF_TIMM = "timm.layers.activations."


def paper_rule(model: TinyTLModel, batch_size: int, frozen_bits: int = 8) -> float:
    """Training memory in bytes by the rule of the TinyTL paper (section 4.1): analytic, nothing is measured.

    One image at the model's resolution walks through the stock network. A convolution, linear layer or norm keeps
    its fp32 input if its own weight trains; if anything but the head trains, a ReLU keeps one bit a value and a
    smooth activation or a norm with statistics of its own (a layer norm, say) its fp32 input, but for those before the
    first trained block. While a layer runs it takes its input and, if it is a convolution or linear layer, its output
    too (one group's share of it); a block that adds its input back holds that as well. The highest sum, times
    ``batch_size``, and the parameters make up the figure.

    Not counted, as in the paper: gradients, optimizer state, running statistics, temporaries of the backward pass,
    what ConvNeXt's layer scales keep where they train, a lite residual's pooled and up-sampled maps and, where a block
    has one but adds nothing back itself, its input.

    MobileNetV2 of torchvision, 10 classes, 224 px, batch 8: FT-Full 447.2 MB, FT-Norm+Last 224.1, TinyTL-L+B 63.9,
    TinyTL-L 63.9, TinyTL-B 48.1, FT-Last 47.2 MB. The paper has FT-Full's of this network (447.8 MB with 100 classes,
    figure 4); its table 2, of ProxylessNAS-Mobile, stands next to ours in ``network/README.md``.

    Args:
        model: The model; it may be lean or stock.
        batch_size: Images a step.
        frozen_bits: Bits in which a frozen parameter would be stored.
    """
    size = model.config.preprocessing.train_size
    walk = _Walk(model)
    modes = {module: module.training for module in model.modules()}
    hooks = [hook for module in modes for hook in walk.follow(module)]
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    stored = weights_of(model.backbone)
    weights = sum(weight.numel() * (FLOAT_BYTES if weight.requires_grad else frozen_bits / 8) for weight in stored)
    return batch_size * walk.peak + weights


class _Walk:
    """What one image's forward pass takes by the paper's rule, in bytes."""

    def __init__(self, model: TinyTLModel) -> None:
        head = {p for module in model.modules() if isinstance(module, Head) for p in module.parameters()}
        self.backpropagates = any(p not in head for p in model.trainable_parameters())
        self.in_prefix = model.config.trained_blocks is not None
        self.peak = self.kept = self.residual = 0.0

    def follow(self, module: nn.Module) -> list[RemovableHandle]:
        """Hook a layer that counts, or a block that holds its input."""
        if isinstance(module, TinyTLBlock):
            return [module.register_forward_pre_hook(self._enter), module.register_forward_hook(self._leave)]
        if isinstance(module, LiteResidual):  # its ReLU is no layer of its own
            return [module.norm1.register_forward_hook(lambda _, __, maps: self._run(nn.ReLU(), (maps,), maps))]
        if isinstance(module, nn.BatchNorm2d) and list(module.children()):  # it runs before the activation it holds
            return [module.register_forward_pre_hook(lambda norm, inputs: self._run(norm, inputs, inputs[0]))]
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d, *MASKED)) or _needs_input(module):
            return [module.register_forward_hook(self._run, prepend=True)]  # a norm before the ReLU that follows it
        return []

    def _enter(self, block: TinyTLBlock, inputs: tuple[Tensor, ...]) -> None:
        if any(parameter.requires_grad for parameter in block.parameters()):
            self.in_prefix = False
        if block.kind.adds_input(block):
            self.residual = FLOAT_BYTES * inputs[0].numel()

    def _leave(self, block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.residual = 0.0

    def _run(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        read = temporary = FLOAT_BYTES * inputs[0].numel()
        if isinstance(layer, nn.Conv2d):
            temporary += FLOAT_BYTES * output.numel() // layer.groups
        elif isinstance(layer, nn.Linear):
            temporary += FLOAT_BYTES * output.numel()
        self.peak = max(self.peak, temporary + self.kept + self.residual)
        is_masked = isinstance(layer, MASKED)
        if is_masked or _needs_input(layer):
            share = 1 / 32 if is_masked else 1.0
            self.kept += share * read if self.backpropagates and not self.in_prefix else 0.0
        elif isinstance(layer.weight, Tensor) and layer.weight.requires_grad:
            self.kept += read


def _needs_input(layer: nn.Module) -> bool:
    name = class_name(type(layer))
    return isinstance(layer, SMOOTH) or name in NORMS_OF_TIMM or name.startswith(ACTIVATIONS_OF_TIMM)
