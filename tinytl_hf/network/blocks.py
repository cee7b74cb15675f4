"""The backbone's residual blocks, found by type and turned, in place, into blocks that take a delta.

A block keeps its class's forward pass and all its parameter names. It gains an optional lite residual,
whose output is added to its own, and optional gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import efficientnet, mnasnet, mobilenetv2, mobilenetv3, resnet

from tinytl_hf.config.run import LiteConfig
from tinytl_hf.network.lite_residual import LiteResidual
from tinytl_hf.network.norms import recompute_contexts


def is_training_pass(x: Tensor, training: bool, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether a gradient can be wanted of a pass over ``x``, or the mode is training; else modules run as stock."""
    return torch.is_grad_enabled() and (training or x.requires_grad or any(p.requires_grad for p in parameters))


class TinyTLBlock(nn.Module):
    """Mixed in before a block's own class, whose ``forward`` it calls."""

    lite_residual: LiteResidual | None
    gradient_checkpointing: bool
    lean_path: Callable[[Tensor], Tensor] | None

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the block's own output shape."""
        if self.gradient_checkpointing and self.training and is_training_pass(x, False, self.parameters()):
            return checkpoint(self._forward, x, use_reentrant=False, context_fn=recompute_contexts)
        return self._forward(x)

    def stock_forward(self, x: Tensor) -> Tensor:
        """The pass of the block's own class, without the lite residual."""
        return super().forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if self.lean_path is not None and is_training_pass(x, self.training, self.parameters()):
            return self.lean_path(x)
        output = self.stock_forward(x)
        if self.lite_residual is None:
            return output
        height, width = output.shape[-2:]
        return output + self.lite_residual(x, (height, width))


class TinyTLInvertedResidualV2(TinyTLBlock, mobilenetv2.InvertedResidual):
    """MobileNetV2's inverted residual."""


class TinyTLInvertedResidualV3(TinyTLBlock, mobilenetv3.InvertedResidual):
    """MobileNetV3's inverted residual."""


class TinyTLMBConv(TinyTLBlock, efficientnet.MBConv):
    """EfficientNet's inverted residual."""


class TinyTLMnasBlock(TinyTLBlock, mnasnet._InvertedResidual):
    """MNASNet's inverted residual."""


class TinyTLBasicBlock(TinyTLBlock, resnet.BasicBlock):
    """The residual block of ResNet-18 and ResNet-34."""


class TinyTLBottleneck(TinyTLBlock, resnet.Bottleneck):
    """The residual block of ResNet-50 and larger."""


BLOCK_TYPES: dict[type[nn.Module], type[TinyTLBlock]] = {
    mobilenetv2.InvertedResidual: TinyTLInvertedResidualV2,
    mobilenetv3.InvertedResidual: TinyTLInvertedResidualV3,
    efficientnet.MBConv: TinyTLMBConv,
    mnasnet._InvertedResidual: TinyTLMnasBlock,
    resnet.BasicBlock: TinyTLBasicBlock,
    resnet.Bottleneck: TinyTLBottleneck,
}


def convert_blocks(backbone: nn.Module, gradient_checkpointing: bool = False) -> dict[str, TinyTLBlock]:
    """Turn the residual blocks of ``backbone`` into :class:`TinyTLBlock`, in place.

    Returns:
        The blocks by name, in forward order; empty if the backbone has none of a known type.
    """
    blocks = {}
    for name, module in backbone.named_modules():
        if type(module) in BLOCK_TYPES:
            # The layout of the object stays that of its class, as in torch.nn.utils.parametrize.
            module.__class__ = BLOCK_TYPES[type(module)]
            assert isinstance(module, TinyTLBlock)
            module.register_module("lite_residual", None)
            module.gradient_checkpointing = gradient_checkpointing
            module.lean_path = None
            blocks[name] = module
    return blocks


def add_lite_residuals(
    backbone: nn.Module, blocks: dict[str, TinyTLBlock], train_size: int, options: LiteConfig
) -> None:
    """Give each of ``blocks`` its lite residual, fitted to its maps at ``train_size`` px."""
    for block, (input, output) in zip(blocks.values(), _trace_shapes(backbone, blocks, train_size), strict=True):
        stride = max(conv.stride[0] for conv in block.modules() if isinstance(conv, nn.Conv2d))
        map_size = min(input[-2:])
        block.lite_residual = LiteResidual(input[1], output[1], stride, map_size, options)


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
