"""Which part of a network trains how: what is said of it in the memory report.

``masks``: a part keeps one bit for each value of a ReLU, a byte for each of a max pooling, or nothing. ``recompute``:
it keeps its input, and is computed again slice by slice. ``layer by layer``: some layers of a block keep masks, and
some stay stock. ``stock``: it keeps what plain PyTorch keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from tinytl_hf.lean.chain import Chain
from tinytl_hf.lean.convert import LAYERS, may_keep_maps
from tinytl_hf.lean.layers import LeanConv2d, LeanConvNormActivation, NormOfConvolution
from tinytl_hf.lean.paths import LeanBlockPath, LeanPart, LeanResNetPath
from tinytl_hf.lean.recompute import Recomputed
from tinytl_hf.lean.runs import LeanSequence, units_of
from tinytl_hf.lean.together import Together
from tinytl_hf.network.blocks import TinyTLBlock, is_layer, own_modules

WITH_MASKS: tuple[type[nn.Module], ...] = (LeanConvNormActivation, NormOfConvolution, *LAYERS.values())
MASKS, RECOMPUTE, BY_LAYER, STOCK = "masks", "recompute", "layer by layer", "stock"


def training_paths(backbone: nn.Module) -> dict[str, str]:
    """How each block trains, and each other layer that can keep maps, by name, in the order of the modules."""
    passes = [run for layers in backbone.modules() if isinstance(layers, LeanSequence) for run in layers.passes]
    passes += [conv.chain for conv in backbone.modules() if isinstance(conv, LeanConv2d)]
    return dict(_paths("", backbone, {unit for run in passes for unit in units_of(run)}))


def grouped(paths: Mapping[str, str]) -> dict[str, list[str]]:
    """The names of each path, neighbours that count up as one: ``features.1-17``."""
    groups: dict[str, list[str]] = {}
    before: tuple[str, str, int] | None = None  # path, name but for its number, and number of the part before
    for name, path in paths.items():
        stem, _, number = name.rpartition(".")
        names = groups.setdefault(path, [])
        if number.isdecimal() and before == (path, stem, int(number) - 1):
            first = names.pop().rpartition(".")[2].partition("-")[0]
            name = f"{stem}.{first}-{number}" if stem else f"{first}-{number}"
        names.append(name)
        before = (path, stem, int(number)) if number.isdecimal() else None
    return groups


def _paths(name: str, part: nn.Module, in_runs: set[nn.Module]) -> Iterator[tuple[str, str]]:
    if part in in_runs or isinstance(part, LeanPart):
        yield name, RECOMPUTE
    elif isinstance(part, TinyTLBlock):
        yield name, _path_of_block(part)
    elif isinstance(part, LeanConvNormActivation) and isinstance(part.chain, Recomputed):
        yield name, RECOMPUTE
    elif isinstance(part, WITH_MASKS):
        yield name, MASKS
    elif is_layer(part):
        if may_keep_maps(part):
            yield name, STOCK
    else:
        for child, module in part.named_children():
            yield from _paths(f"{name}.{child}".lstrip("."), module, in_runs)


def _path_of_block(block: TinyTLBlock) -> str:
    path = block.lean_path.as_one if isinstance(block.lean_path, Together) else block.lean_path
    main = path.main if isinstance(path, LeanBlockPath) else path
    if isinstance(main, Recomputed):
        return RECOMPUTE
    if isinstance(main, (Chain, LeanResNetPath)):
        return MASKS
    return BY_LAYER if any(isinstance(part, WITH_MASKS) for part in own_modules(block)) else STOCK
