"""Turn a backbone lean, in place: find what is frozen and choose how little it may keep.

Parameter and buffer names stay. Whole residual blocks become chains where all of their layers are known,
else their convolutions with norm and activation do, else single layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn
from torchvision.models import efficientnet, mnasnet, mobilenetv2, mobilenetv3, resnet
from torchvision.ops.misc import Conv2dNormActivation

from tinytl_hf.blocks import TinyTLBlock
from tinytl_hf.lean.block import LeanBlockPath, LeanResNetPath
from tinytl_hf.lean.chain import SLICE_MB, Chain, Stage
from tinytl_hf.lean.layers import (
    LeanConv2d,
    LeanConvNormActivation,
    LeanFrozenBatchNorm2d,
    LeanReLU,
    LeanReLU6,
)
from tinytl_hf.norms import FrozenBatchNorm2d

ACTIVATIONS = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish", nn.SiLU: "silu"}
LAYERS = {nn.Conv2d: LeanConv2d, FrozenBatchNorm2d: LeanFrozenBatchNorm2d, nn.ReLU: LeanReLU, nn.ReLU6: LeanReLU6}


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
    return [
        f"{name} ({type(module).__name__})"
        for name, module in backbone.named_modules()
        if module not in done and not list(module.children()) and _keeps_maps(module)
    ]


def _block_path(block: TinyTLBlock, slice_mb: float) -> Chain | LeanResNetPath | None:
    """The block's training pass as chains, or null if one of its layers does not fit in."""
    if isinstance(block, mobilenetv2.InvertedResidual):
        stages = _stages(block.conv)
        return None if stages is None else Chain(stages, block.use_res_connect, slice_mb)
    if isinstance(block, (mobilenetv3.InvertedResidual, efficientnet.MBConv)):
        stages = _stages(block.block)
        return None if stages is None else Chain(stages, block.use_res_connect, slice_mb)
    if isinstance(block, mnasnet._InvertedResidual):
        stages = _stages(block.layers)
        return None if stages is None else Chain(stages, block.apply_residual, slice_mb)
    assert isinstance(block, (resnet.BasicBlock, resnet.Bottleneck))
    layers = [block.conv1, block.bn1, block.relu, block.conv2, block.bn2]
    if isinstance(block, resnet.Bottleneck):
        layers += [block.relu, block.conv3, block.bn3]
    main = _as_stages(layers)
    shortcut = None if block.downsample is None else _stages(block.downsample)
    if block.downsample is not None and shortcut is None:
        return None
    chains = [None if stages is None else Chain(stages, slice_mb=slice_mb) for stages in (main, shortcut)]
    return None if chains[0] is None else LeanResNetPath(chains[0], chains[1])


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
    weight = getattr(module, "weight", None)
    return weight is not None and weight.requires_grad


def _keeps_maps(module: nn.Module) -> bool:
    """Whether a stock layer keeps tensors of the size of its maps for the backward pass."""
    return isinstance(
        module, (nn.Conv2d, nn.BatchNorm2d, nn.Hardswish, nn.SiLU, nn.Hardsigmoid, nn.Sigmoid, nn.MaxPool2d)
    )
