"""Turn a backbone lean, in place: find what is frozen and choose how little it may keep.

Parameter and buffer names stay. Whole residual blocks become chains where all of their layers are known,
else their convolutions with norm and activation do, else single layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from torch import Tensor, nn
from torchvision.ops import StochasticDepth
from torchvision.ops.misc import Conv2dNormActivation

from tinytl_hf.config.engine import Engine
from tinytl_hf.lean.chain import Chain
from tinytl_hf.lean.int8 import Int8Conv2d
from tinytl_hf.lean.layers import (
    LeanConv2d,
    LeanConvNormActivation,
    LeanFrozenBatchNorm2d,
    LeanInt8Conv2d,
    LeanReLU,
    LeanReLU6,
)
from tinytl_hf.lean.max_pool import LeanMaxPool2d, is_plain
from tinytl_hf.lean.paths import LeanBlockPath, LeanOpening, LeanResNetPath
from tinytl_hf.lean.recompute import Recomputed
from tinytl_hf.lean.stage import UPPER, Stage
from tinytl_hf.network.blocks import TinyTLBlock, leaves, own_layers
from tinytl_hf.network.head import Head
from tinytl_hf.network.norms import FrozenBatchNorm2d

ACTIVATIONS = {nn.ReLU: "relu", nn.ReLU6: "relu6"}
LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: LeanConv2d,
    Int8Conv2d: LeanInt8Conv2d,
    FrozenBatchNorm2d: LeanFrozenBatchNorm2d,
    nn.ReLU: LeanReLU,
    nn.ReLU6: LeanReLU6,
    nn.MaxPool2d: LeanMaxPool2d,
}
# Layers that compute of an image what depends on that image alone, and the same each time (dropout is off).
OF_ONE_IMAGE = {
    *(nn.Conv2d, Int8Conv2d, FrozenBatchNorm2d, nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.MaxPool2d),
    *(nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.Hardsigmoid, nn.Sigmoid),
    *(nn.Identity, nn.Sequential, nn.Dropout, StochasticDepth),
}
# Layers that add no full-size map. A stock ReLU saves its output, which the next layer saves anyway; dropout is off;
# linear layers see vectors only.
KEEP_NOTHING = {
    nn.Identity,
    nn.Sequential,
    nn.Dropout,
    nn.Flatten,
    StochasticDepth,
    nn.Linear,
    Head,
    nn.ReLU,
    nn.ReLU6,
}


def convert(backbone: nn.Module, blocks: dict[str, TinyTLBlock], engine: Engine) -> list[str]:
    """Make the training pass of ``backbone`` lean wherever its layers allow it.

    Args:
        backbone: A network that a method has been applied to.
        blocks: Its residual blocks by name.
        engine: Its slices.

    Returns:
        Names of the layers that stay stock and keep full-size tensors, each with its type.
    """
    done: set[nn.Module] = set()
    for block in blocks.values():
        path: Callable[[Tensor], Tensor] | None = _block_path(block, engine)
        if path is None and _images_are_independent(block):
            path = Recomputed(block, block.stock_forward, engine.slice_mb)
        if path is not None:
            done.update(block.modules())
        if block.lite_residual is not None:
            done.update(block.lite_residual.modules())
            path = LeanBlockPath(block.stock_forward if path is None else path, block.lite_residual, engine)
        block.lean_path = path
    frozen = any(isinstance(m, nn.Conv2d) and not m.weight.requires_grad for m in backbone.modules())
    for module in backbone.modules():
        if module in done or not frozen:
            continue
        if type(module) is Conv2dNormActivation and (path := _layers_path(module, engine)) is not None:
            module.__class__ = LeanConvNormActivation
            module.chain = path  # type: ignore[assignment]
            done.update(module.modules())
        elif _becomes_lean(module):
            module.__class__ = LAYERS[type(module)]
            if isinstance(module, LeanMaxPool2d):
                module.slice_mb = engine.slice_mb
            done.add(module)
    for module in backbone.modules():
        if type(module) is nn.Sequential and len(module) > 1:
            _join_opening(module)
    return [
        f"{name} ({type(module).__name__})"
        for name, module in backbone.named_modules()
        if module not in done and not list(module.children()) and _may_keep_maps(module)
    ]


def _layers_path(layers: Conv2dNormActivation, engine: Engine) -> Chain | Recomputed | None:
    """The training pass of a convolution with norm and activation, or None if one of them trains or is unknown."""
    stages = _as_stages(leaves(layers))
    if stages is not None:
        return _chain(stages, engine) if len(stages) == 1 else None
    if _images_are_independent(layers):
        return Recomputed(layers, partial(nn.Sequential.forward, layers), engine.slice_mb)
    return None


def _join_opening(layers: nn.Sequential) -> None:
    """Let a stem and the block that follows it train as one chain."""
    stem, block = layers[0], layers[1]
    if not isinstance(stem, LeanConvNormActivation) or not isinstance(block, TinyTLBlock):
        return
    path = block.lean_path
    main = path.main if isinstance(path, LeanBlockPath) else path
    if isinstance(main, Chain) and isinstance(stem.chain, Chain) and not block.gradient_checkpointing:
        joined = replace(main, stages=(*stem.chain.stages, *main.stages), branch=len(stem.chain.stages))
        layers.__class__ = LeanOpening
        layers.opening = replace(path, main=joined) if isinstance(path, LeanBlockPath) else joined  # type: ignore[assignment]


def _block_path(block: TinyTLBlock, engine: Engine) -> Chain | LeanResNetPath | None:
    """The block's training pass as chains, or None if one of its layers does not fit in."""
    main = _as_stages(block.kind.layers(block))
    shortcut, last = block.kind.shortcut(block), block.kind.last(block)
    if main is None:
        return None
    if last is None:
        return _chain(main, engine, block.kind.adds_input(block)) if shortcut is None else None
    projection = None if shortcut is None else _as_stages(leaves(shortcut))
    upper = UPPER.get(ACTIVATIONS.get(type(last), ""))
    if upper is None or (shortcut is not None and projection is None):
        return None
    added = None if projection is None else _chain(projection, engine)
    return LeanResNetPath(_chain(main, engine), added, upper)


def _chain(stages: tuple[Stage, ...], engine: Engine, residual: bool = False) -> Chain:
    return Chain(stages, residual, engine.slice_mb, backend=engine.backend)


def _images_are_independent(module: nn.Module) -> bool:
    """Whether what a frozen module computes of an image depends on that image alone, by the types of its layers."""
    layers = own_layers(module)
    if any(type(layer) not in OF_ONE_IMAGE for layer in layers):
        return False
    return not any(m.weight.requires_grad for m in layers if isinstance(m, (nn.Conv2d, nn.BatchNorm2d)))


def _as_stages(layers: Iterable[nn.Module]) -> tuple[Stage, ...] | None:
    """Group layers into frozen convolutions with norm and activation; None if they do not make such."""
    stages: list[Stage] = []
    for layer in layers:
        last = stages[-1] if stages else None
        if _is_frozen_convolution(layer):
            assert isinstance(layer, nn.Conv2d)
            stages.append(Stage(layer))
        elif last is None or last.activation is not None:
            return None
        elif type(layer) is FrozenBatchNorm2d and last.norm is None and last.conv.bias is None:
            if layer.weight.requires_grad:
                return None
            stages[-1] = Stage(last.conv, layer)
        elif type(layer) in ACTIVATIONS:
            stages[-1] = Stage(last.conv, last.norm, ACTIVATIONS[type(layer)])
        else:
            return None
    return tuple(stages) or None


def _is_frozen_convolution(layer: nn.Module) -> bool:
    """Whether it is a plain convolution with a frozen weight, whose padding is zeros that are known beforehand."""
    return (
        type(layer) in (nn.Conv2d, Int8Conv2d)
        and not layer.weight.requires_grad
        and layer.padding_mode == "zeros"
        and isinstance(layer.padding, tuple)
    )


def _becomes_lean(layer: nn.Module) -> bool:
    if type(layer) in (nn.Conv2d, Int8Conv2d):
        return _is_frozen_convolution(layer)
    if type(layer) is nn.MaxPool2d:
        return is_plain(layer)
    return type(layer) in LAYERS and not (type(layer) is FrozenBatchNorm2d and layer.weight.requires_grad)


def _may_keep_maps(layer: nn.Module) -> bool:
    """Whether a stock layer can keep tensors of the size of its maps for the backward pass."""
    if type(layer) is nn.AdaptiveAvgPool2d:
        return layer.output_size not in (1, (1, 1))
    return type(layer) not in KEEP_NOTHING
