"""Frozen convolutions with the norms and activations after them, grouped into the stages of a chain."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from tinytl_hf.config.engine import Engine
from tinytl_hf.lean.chain import Chain
from tinytl_hf.lean.int8 import Int8Conv2d, Int8SameConv2d
from tinytl_hf.lean.layers import (
    LeanConv2d,
    LeanFrozenBatchNorm2d,
    LeanFrozenBatchNormAct2d,
    LeanInt8Conv2d,
    LeanInt8SameConv2d,
    LeanSameConv2d,
)
from tinytl_hf.lean.stage import Stage
from tinytl_hf.network.norms import FrozenBatchNorm2d, FrozenBatchNormAct2d
from tinytl_hf.network.same_padding import SameConv2d

ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.ReLU6: "relu6"}
SMOOTH_ACTIVATIONS: dict[type[nn.Module], str] = {nn.Hardswish: "hardswish", nn.SiLU: "silu"}
CONVOLUTIONS: dict[type[nn.Module], type[LeanConv2d]] = {
    nn.Conv2d: LeanConv2d,
    Int8Conv2d: LeanInt8Conv2d,
    SameConv2d: LeanSameConv2d,
    Int8SameConv2d: LeanInt8SameConv2d,
}
NORMS: dict[type[nn.Module], type[nn.Module]] = {
    FrozenBatchNorm2d: LeanFrozenBatchNorm2d,
    FrozenBatchNormAct2d: LeanFrozenBatchNormAct2d,
}


def chain_of(stages: tuple[Stage, ...], engine: Engine, residual: bool = False) -> Chain:
    """A chain that runs as the engine says."""
    return Chain(stages, residual, engine.slice_mb, backend=engine.backend)


def as_stages(layers: Iterable[nn.Module], again: bool = False) -> tuple[Stage, ...] | None:
    """Group layers into frozen convolutions with norm and activation; None if they do not make such.

    ``again`` says that they are a part of what is computed again: there, an activation may need its input.
    """
    activations = ACTIVATIONS | SMOOTH_ACTIVATIONS if again else ACTIVATIONS
    stages: list[Stage] = []
    for layer in (each for each in layers if type(each) is not nn.Identity):
        last = stages[-1] if stages else None
        if is_frozen_convolution(layer):
            assert isinstance(layer, nn.Conv2d)
            stages.append(Stage(layer))
        elif last is None or last.activation is not None:
            return None
        elif isinstance(layer, FrozenBatchNorm2d) and last.norm is None and last.conv.bias is None:
            held = layer.act if type(layer) is FrozenBatchNormAct2d else nn.Identity()
            known = type(layer) in NORMS and (type(held) is nn.Identity or type(held) in activations)
            if layer.weight is None or layer.weight.requires_grad or not known:
                return None
            stages[-1] = Stage(last.conv, layer, activations.get(type(held)))
        elif type(layer) in activations:
            stages[-1] = Stage(last.conv, last.norm, activations[type(layer)])
        else:
            return None
    return tuple(stages) or None


def is_frozen_convolution(layer: nn.Module) -> bool:
    """Whether it is a plain convolution with a frozen weight, whose padding is zeros that are known beforehand."""
    return (
        isinstance(layer, nn.Conv2d)
        and type(layer) in CONVOLUTIONS
        and not layer.weight.requires_grad
        and layer.padding_mode == "zeros"
        and isinstance(layer.padding, tuple)
    )
