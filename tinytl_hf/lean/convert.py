"""Turn a backbone lean, in place: find what is frozen and choose how little it may keep.

Parameter and buffer names stay. Whole residual blocks become chains where all of their layers are known,
else their convolutions with norm and activation do, else single layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import Tensor, nn
from torchvision.models import efficientnet, mnasnet, mobilenetv2, mobilenetv3, resnet
from torchvision.ops.misc import Conv2dNormActivation

from tinytl_hf.lean.chain import SLICE_MB, Chain
from tinytl_hf.lean.int8 import Int8Conv2d
from tinytl_hf.lean.layers import (
    LeanConv2d,
    LeanConvNormActivation,
    LeanFrozenBatchNorm2d,
    LeanInt8Conv2d,
    LeanReLU,
    LeanReLU6,
)
from tinytl_hf.lean.paths import LeanBlockPath, LeanOpening, LeanResNetPath
from tinytl_hf.lean.stage import Stage
from tinytl_hf.network.blocks import TinyTLBlock
from tinytl_hf.network.norms import FrozenBatchNorm2d

ACTIVATIONS = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish", nn.SiLU: "silu"}
LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: LeanConv2d,
    Int8Conv2d: LeanInt8Conv2d,
    FrozenBatchNorm2d: LeanFrozenBatchNorm2d,
    nn.ReLU: LeanReLU,
    nn.ReLU6: LeanReLU6,
}


def convert(backbone: nn.Module, blocks: dict[str, TinyTLBlock], slice_mb: float = SLICE_MB) -> list[str]:
    """Make the training pass of ``backbone`` lean wherever its layers allow it.

    Args:
        backbone: A network that a method has been applied to.
        blocks: Its residual blocks by name.
        slice_mb: About how much of a chain's widest map exists at a time, in MB.

    Returns:
        Names of the layers that stay stock and keep full-size tensors, each with its type.
    """
    done: set[nn.Module] = set()
    for block in blocks.values():
        path: Callable[[Tensor], Tensor] | None = _block_path(block, slice_mb)
        if path is not None:
            done.update(block.modules())
        if block.lite_residual is not None:
            done.update(block.lite_residual.modules())
            path = LeanBlockPath(block.stock_forward if path is None else path, block.lite_residual)
        block.lean_path = path
    frozen = any(isinstance(m, nn.Conv2d) and not m.weight.requires_grad for m in backbone.modules())
    for module in backbone.modules():
        if module in done or not frozen:
            continue
        stages = _stages(module) if type(module) is Conv2dNormActivation else None
        if stages is not None and len(stages) == 1:
            module.__class__ = LeanConvNormActivation
            module.chain = Chain(stages, slice_mb=slice_mb)  # type: ignore[assignment]
            done.update(module.modules())
        elif type(module) in LAYERS and not _trains_weight(module):
            module.__class__ = LAYERS[type(module)]
            done.add(module)
    for module in backbone.modules():
        if type(module) is nn.Sequential and len(module) > 1:
            _join_opening(module)
    return [
        f"{name} ({type(module).__name__})"
        for name, module in backbone.named_modules()
        if module not in done and not list(module.children()) and _keeps_maps(module)
    ]


def _join_opening(layers: nn.Sequential) -> None:
    """Let a stem and the block that follows it train as one chain."""
    stem, block = layers[0], layers[1]
    if not isinstance(stem, LeanConvNormActivation) or not isinstance(block, TinyTLBlock):
        return
    path = block.lean_path
    main = path.main if isinstance(path, LeanBlockPath) else path
    if isinstance(main, Chain) and not block.gradient_checkpointing:
        joined = replace(main, stages=(*stem.chain.stages, *main.stages), branch=len(stem.chain.stages))
        layers.__class__ = LeanOpening
        layers.opening = replace(path, main=joined) if isinstance(path, LeanBlockPath) else joined  # type: ignore[assignment]


def _block_path(block: TinyTLBlock, slice_mb: float) -> Chain | LeanResNetPath | None:
    """The block's training pass as chains, or null if one of its layers does not fit in."""
    if not isinstance(block, (resnet.BasicBlock, resnet.Bottleneck)):
        layers, residual = _inverted_residual(block)
        stages = _stages(layers)
        return None if stages is None else Chain(stages, residual, slice_mb)
    main_layers = [block.conv1, block.bn1, block.relu, block.conv2, block.bn2]
    if isinstance(block, resnet.Bottleneck):
        main_layers += [block.relu, block.conv3, block.bn3]
    main = _as_stages(main_layers)
    shortcut = None if block.downsample is None else _stages(block.downsample)
    if block.downsample is not None and shortcut is None:
        return None
    chains = [None if stages is None else Chain(stages, slice_mb=slice_mb) for stages in (main, shortcut)]
    return None if chains[0] is None else LeanResNetPath(chains[0], chains[1])


def _inverted_residual(block: TinyTLBlock) -> tuple[nn.Module, bool]:
    """The layers of an inverted residual, and whether its input is added to their output."""
    if isinstance(block, mobilenetv2.InvertedResidual):
        return block.conv, block.use_res_connect
    if isinstance(block, mnasnet._InvertedResidual):
        return block.layers, block.apply_residual
    assert isinstance(block, (mobilenetv3.InvertedResidual, efficientnet.MBConv))
    return block.block, block.use_res_connect


def _stages(module: nn.Module) -> tuple[Stage, ...] | None:
    return _as_stages(leaf for leaf in module.modules() if not list(leaf.children()))


def _as_stages(layers: Iterable[nn.Module]) -> tuple[Stage, ...] | None:
    """Group layers into frozen convolutions with norm and activation; null if they do not make such."""
    stages: list[Stage] = []
    for layer in layers:
        last = stages[-1] if stages else None
        if isinstance(layer, nn.Conv2d) and not layer.weight.requires_grad and isinstance(layer.padding, tuple):
            stages.append(Stage(layer))
        elif last is None or last.activation is not None:
            return None
        elif isinstance(layer, FrozenBatchNorm2d) and last.norm is None and last.conv.bias is None:
            if layer.weight.requires_grad:
                return None
            stages[-1] = Stage(last.conv, layer)
        elif type(layer) in ACTIVATIONS:
            stages[-1] = Stage(last.conv, last.norm, ACTIVATIONS[type(layer)])
        else:
            return None
    return tuple(stages) or None


def _trains_weight(module: nn.Module) -> bool:
    return any(name == "weight" and parameter.requires_grad for name, parameter in module.named_parameters())


def _keeps_maps(module: nn.Module) -> bool:
    """Whether a stock layer keeps tensors of the size of its maps for the backward pass."""
    return isinstance(
        module, (nn.Conv2d, nn.BatchNorm2d, nn.Hardswish, nn.SiLU, nn.Hardsigmoid, nn.Sigmoid, nn.MaxPool2d)
    )
