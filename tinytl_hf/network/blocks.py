"""The backbone's residual blocks, found by type and turned, in place, into blocks that take a delta.

A block keeps its class's forward pass and all its parameter names. It gains an optional lite residual,
whose output is added to its own, and optional gradient checkpointing. What this package needs to know of a class
of blocks is a row of :data:`BLOCK_KINDS`, and nowhere else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinytl_hf.config.network import LiteConfig
from tinytl_hf.errors import TinyTLError
from tinytl_hf.network.kinds import class_name
from tinytl_hf.network.lite_residual import LiteResidual
from tinytl_hf.network.mixed import mixed
from tinytl_hf.network.norms import recompute_contexts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockKind:
    """What a class of residual blocks computes: its layers, then the input added, then an activation.

    Two kinds multiply by more than their layers: squeeze-and-excitation, and ConvNeXt's ``layer_scale``, a factor for
    each channel before the addition.

    Attributes:
        layers: Its layers, in forward order, up to the addition; a norm with what it holds is one.
        adds_input: Whether the input, or its shortcut, is added to what they give.
        shortcut: What the input passes through before it is added; None where it is added as it is.
        last: The activation after the addition; None where there is none.
        wide: Whether the block's input is a large share of all that stock PyTorch keeps of it.
    """

    layers: Callable[[Any], list[nn.Module]]
    adds_input: Callable[[Any], bool]
    shortcut: Callable[[Any], nn.Module | None] = lambda block: None
    last: Callable[[Any], nn.Module | None] = lambda block: None
    wide: bool = False


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a single layer: it has no children, or is a norm, which may hold its activation."""
    return isinstance(module, nn.BatchNorm2d) or not list(module.children())


def leaves(module: nn.Module) -> list[nn.Module]:
    """The layers of ``module`` in the order in which they were made; what a norm holds is a part of the norm."""
    return [module] if is_layer(module) else [leaf for child in module.children() for leaf in leaves(child)]


def own_modules(module: nn.Module) -> list[nn.Module]:
    """``module`` and all that is in it, without its lite residual, if it is a block that has one."""
    lite = module.lite_residual if isinstance(module, TinyTLBlock) else None
    left_out = set() if lite is None else set(lite.modules())
    return [part for part in module.modules() if part not in left_out]


def own_layers(module: nn.Module) -> list[nn.Module]:
    """Those of :func:`own_modules` that are single layers, an activation in a norm too."""
    return [part for part in own_modules(module) if is_layer(part)]


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``module`` and all that is in it, without those of its lite residual."""
    return [parameter for part in own_modules(module) for parameter in part.parameters(recurse=False)]


def _present(*layers: nn.Module | None) -> list[nn.Module]:
    """Layers of a block, some of which only some blocks of a kind have; parts that are made of layers give these."""
    return [leaf for layer in layers if layer is not None for leaf in _of_part(layer)]


def _of_part(part: nn.Module) -> list[nn.Module]:
    return leaves(part) if class_name(type(part)) == "timm.layers.conv_bn_act.ConvNormAct" else [part]


_TORCHVISION, _TIMM = "torchvision.models", "timm.models"
# By the full name of the exact class: subclasses do not match, as their forward pass may differ.
BLOCK_KINDS = {
    f"{_TORCHVISION}.mobilenetv2.InvertedResidual": BlockKind(lambda b: leaves(b.conv), lambda b: b.use_res_connect),
    f"{_TORCHVISION}.mobilenetv3.InvertedResidual": BlockKind(lambda b: leaves(b.block), lambda b: b.use_res_connect),
    f"{_TORCHVISION}.efficientnet.MBConv": BlockKind(lambda b: leaves(b.block), lambda b: b.use_res_connect),
    f"{_TORCHVISION}.efficientnet.FusedMBConv": BlockKind(lambda b: leaves(b.block), lambda b: b.use_res_connect),
    f"{_TORCHVISION}.mnasnet._InvertedResidual": BlockKind(lambda b: leaves(b.layers), lambda b: b.apply_residual),
    f"{_TORCHVISION}.convnext.CNBlock": BlockKind(lambda b: leaves(b.block), lambda b: True, wide=True),
    f"{_TORCHVISION}.resnet.BasicBlock": BlockKind(
        lambda b: [b.conv1, b.bn1, b.relu, b.conv2, b.bn2],
        lambda b: True,
        shortcut=lambda b: b.downsample,
        last=lambda b: b.relu,
    ),
    f"{_TORCHVISION}.resnet.Bottleneck": BlockKind(
        lambda b: [b.conv1, b.bn1, b.relu, b.conv2, b.bn2, b.relu, b.conv3, b.bn3],
        lambda b: True,
        shortcut=lambda b: b.downsample,
        last=lambda b: b.relu,
    ),
    f"{_TIMM}._efficientnet_blocks.ConvBnAct": BlockKind(lambda b: [b.conv, b.bn1, b.aa], lambda b: b.has_skip),
    f"{_TIMM}._efficientnet_blocks.DepthwiseSeparableConv": BlockKind(
        lambda b: _present(b.conv_s2d, b.bn_s2d, b.conv_dw, b.bn1, b.aa, b.se, b.conv_pw, b.bn2), lambda b: b.has_skip
    ),
    f"{_TIMM}._efficientnet_blocks.InvertedResidual": BlockKind(
        lambda b: _present(
            *(b.conv_s2d, b.bn_s2d, b.conv_pw, b.bn1, b.conv_dw, b.bn2, b.aa, b.se, b.conv_pwl, b.bn3),
        ),
        lambda b: b.has_skip,
    ),
    f"{_TIMM}._efficientnet_blocks.EdgeResidual": BlockKind(
        lambda b: [b.conv_exp, b.bn1, b.aa, b.se, b.conv_pwl, b.bn2], lambda b: b.has_skip
    ),
    f"{_TIMM}._efficientnet_blocks.UniversalInvertedResidual": BlockKind(
        lambda b: _present(b.dw_start, b.pw_exp, b.dw_mid, b.se, b.pw_proj, b.dw_end, b.layer_scale),
        lambda b: b.has_skip,
    ),
    f"{_TIMM}.resnet.BasicBlock": BlockKind(
        lambda b: _present(b.conv1, b.bn1, b.drop_block, b.act1, b.aa, b.conv2, b.bn2, b.se),
        lambda b: True,
        shortcut=lambda b: b.downsample,
        last=lambda b: b.act2,
    ),
    f"{_TIMM}.resnet.Bottleneck": BlockKind(
        lambda b: _present(
            *(b.conv1, b.bn1, b.act1, b.conv2, b.bn2, b.drop_block, b.act2, b.aa, b.conv3, b.bn3, b.se),
        ),
        lambda b: True,
        shortcut=lambda b: b.downsample,
        last=lambda b: b.act3,
    ),
    f"{_TIMM}.regnet.Bottleneck": BlockKind(
        lambda b: _present(b.conv1, b.conv2, b.se, b.conv3),
        lambda b: b.downsample is not None,
        shortcut=lambda b: None if isinstance(b.downsample, nn.Identity) else b.downsample,
        last=lambda b: b.act3,
    ),
}


class TinyTLBlock(nn.Module):
    """Mixed in before a block's own class, whose ``forward`` it calls.

    Attributes:
        made_of: As of :class:`Mixed`.
        lite_residual: Its lite residual, or None.
        gradient_checkpointing: Whether its training pass is computed a second time for the backward pass.
        lean_path: Its training pass, lite residual included, in place of the stock one; or None.
    """

    made_of: tuple[str, type, type]
    lite_residual: LiteResidual | None
    gradient_checkpointing: bool
    lean_path: Callable[[Tensor], Tensor] | None

    @property
    def kind(self) -> BlockKind:
        """The row of :data:`BLOCK_KINDS` that describes it."""
        _, _, own = self.made_of
        return BLOCK_KINDS[class_name(own)]

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the block's own output shape."""
        if self.gradient_checkpointing and self.training and self._has_gradients(x):
            return checkpoint(self._forward, x, use_reentrant=False, context_fn=recompute_contexts)
        return self._forward(x)

    def stock_forward(self, x: Tensor) -> Tensor:
        """The pass of the block's own class, without the lite residual."""
        return super().forward(x)

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` asks a module for."""
        raise TinyTLError(
            "torch.jit.script: it cannot read the blocks of a model; use torch.jit.trace or torch.export in "
            "evaluation mode, or model.export()"
        )

    def _has_gradients(self, x: Tensor) -> bool:
        """Whether there is anything to compute backward; without it, checkpointing would keep inputs for nothing."""
        return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))

    def _forward(self, x: Tensor) -> Tensor:
        if self.lean_path is not None and self.training:
            return self.lean_path(x)
        output = self.stock_forward(x)
        if self.lite_residual is None:
            return output
        return output + self.lite_residual(x, output.shape[-2:])


def convert_blocks(backbone: nn.Module, gradient_checkpointing: bool = False) -> dict[str, TinyTLBlock]:
    """Turn the residual blocks of ``backbone`` into :class:`TinyTLBlock`, in place.

    Returns:
        The blocks by name, in forward order; empty if the backbone has none of a known kind.
    """
    blocks = {}
    for name, module in backbone.named_modules():
        if class_name(type(module)) in BLOCK_KINDS:
            # The layout of the object stays that of its class, as in torch.nn.utils.parametrize.
            own = type(module)
            module.__class__ = mixed(f"TinyTL{own.__name__.strip('_')}", TinyTLBlock, own)
            assert isinstance(module, TinyTLBlock)
            module.register_module("lite_residual", None)
            module.gradient_checkpointing = gradient_checkpointing
            module.lean_path = None
            blocks[name] = module
    return blocks


def unknown_blocks(backbone: nn.Module, blocks: dict[str, TinyTLBlock]) -> dict[str, nn.Module]:
    """Parts that look like blocks, as they hold convolutions, but are of no known kind.

    Plain sequences of layers, such as a stem or the last layers before the head, are no blocks.
    """
    plain = (nn.Sequential, nn.ModuleList, nn.ModuleDict, type(backbone))
    found: dict[str, nn.Module] = {}
    for name, module in backbone.named_modules():
        if isinstance(module, plain) or next(module.children(), None) is None:
            continue
        inside = any(name == outer or name.startswith(f"{outer}.") for outer in (*blocks, *found))
        if inside or any(isinstance(part, TinyTLBlock) for part in module.modules()):
            continue
        if any(isinstance(part, nn.Conv2d) for part in module.modules()):
            found[name] = module
    return found


def name_unknown_blocks(backbone: nn.Module, blocks: dict[str, TinyTLBlock]) -> None:
    """Where blocks have lite residuals, warn of parts that look like blocks but get none, as their kind is unknown."""
    if all(block.lite_residual is None for block in blocks.values()):
        return
    found = unknown_blocks(backbone, blocks)
    if found:
        logger.warning(
            "%d of %d blocks get a lite residual; of an unknown kind and left alone: %s",
            len(blocks),
            len(blocks) + len(found),
            ", ".join(f"{name} ({type(module).__name__})" for name, module in found.items()),
        )


def add_lite_residuals(
    backbone: nn.Module, blocks: dict[str, TinyTLBlock], train_size: int, options: LiteConfig
) -> None:
    """Give each of ``blocks`` its lite residual, fitted to its maps at ``train_size`` px."""
    for block, (input, output) in zip(blocks.values(), _trace_shapes(backbone, blocks, train_size), strict=True):
        map_size = min(input[-2:])
        block.lite_residual = LiteResidual(input[1], output[1], _stride(block, input, output), map_size, options)


def _stride(block: nn.Module, input: torch.Size, output: torch.Size) -> int:
    """How many times a block reduces its maps: by a convolution or, as anti-aliased networks do, by a pool after one.

    That of convolutions counts where maps are too small to tell.
    """
    of_convolutions = max(conv.stride[0] for conv in block.modules() if isinstance(conv, nn.Conv2d))
    of_maps = next(stride for stride in range(1, input[-1] + 1) if input[-1] // stride <= output[-1])
    return max(of_convolutions, of_maps)


def _trace_shapes(
    backbone: nn.Module, blocks: dict[str, TinyTLBlock], train_size: int
) -> list[tuple[torch.Size, torch.Size]]:
    """Input and output shape of each block for one image of ``train_size`` px."""
    shapes: list[tuple[torch.Size, torch.Size]] = []
    hooks = [
        block.register_forward_hook(lambda _, args, output: shapes.append((args[0].shape, output.shape)))
        for block in blocks.values()
    ]
    was_training = backbone.training
    try:
        with torch.no_grad():
            backbone.eval()(torch.zeros(1, 3, train_size, train_size))
    finally:
        backbone.train(was_training)
        for hook in hooks:
            hook.remove()
    return shapes
