"""Fewer passes through memory in a part that is computed again: what its convolutions do in place of other layers.

They do the work of the norms and activations after them, neighbours run as one chain, and of the last one, whose
output nobody reads in the backward pass, only the gradient is computed there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from itertools import pairwise

from torch import Tensor, nn
from torchvision.ops import Permute
from torchvision.ops.misc import Conv2dNormActivation

from tinytl_hf.config.engine import Engine
from tinytl_hf.lean.chain import Chain
from tinytl_hf.lean.grouping import CONVOLUTIONS, as_stages, chain_of, is_frozen_convolution
from tinytl_hf.lean.independence import independent_by_type
from tinytl_hf.lean.layers import LeanConv2d, LeanConvNormActivation, NormOfConvolution, UnreadLinear
from tinytl_hf.lean.paths import Activated, UnreadWhenAgain
from tinytl_hf.lean.stage import Stage
from tinytl_hf.lean.together import Together, done_by_another
from tinytl_hf.network.blocks import TinyTLBlock, leaves, own_modules
from tinytl_hf.network.norms import FrozenBatchNormAct2d


def fuse(backbone: nn.Module, again: Collection[nn.Module], read: Collection[nn.Module], engine: Engine) -> None:
    """Fuse what can be among the modules of ``again``, which are computed again.

    What blocks of ``read`` give is an input of other modules that are computed again with them.
    """
    modules = [module for module in backbone.modules() if module in again]
    blocks = [module for module in modules if isinstance(module, TinyTLBlock)]
    for block in blocks:
        for layer, following in pairwise(block.kind.layers(block)):
            join_norm(layer, following, engine)
    for module in modules:
        _fold_norm(module, engine)
    for block in blocks:
        units = _units(block)
        _join_neighbours(units)
        if units and block.kind.last(block) is None and block not in read:
            _leave_last_unread(block, units[-1])


def join_norm(conv: nn.Module, norm: nn.Module, engine: Engine) -> bool:
    """Let a frozen convolution do the work of the norm that it alone feeds, and of what that holds; or say no."""
    if not is_frozen_convolution(conv) or type(norm) is not FrozenBatchNormAct2d:
        return False
    assert isinstance(conv, nn.Conv2d)
    if norm.weight is None or norm.weight.requires_grad or conv.bias is not None or not independent_by_type(norm.act):
        return False
    stages = as_stages([conv, norm], again=True)
    path = Activated(chain_of((Stage(conv, norm),), engine), norm.act) if stages is None else chain_of(stages, engine)
    train_by(conv, path)
    norm.__class__ = NormOfConvolution
    norm.of = (conv,)  # type: ignore[assignment]
    return True


def _fold_norm(module: nn.Module, engine: Engine) -> None:
    """Let a convolution do its norm's work, where the two are a module, and keep nothing."""
    if type(module) is Conv2dNormActivation:
        stages = as_stages(leaves(module), again=True)
        conv_and_norm, activation = as_stages(leaves(module)[:2]), leaves(module)[2:]
        if stages is not None and len(stages) == 1:
            train_by(module, chain_of(stages, engine))
        elif conv_and_norm is not None and len(conv_and_norm) == len(activation) == 1:
            train_by(module, Activated(chain_of(conv_and_norm, engine), *activation))
    elif is_frozen_convolution(module):
        assert isinstance(module, nn.Conv2d)
        train_by(module, chain_of((Stage(module),), engine))


def train_by(layer: nn.Conv2d | Conv2dNormActivation, path: Callable[[Tensor], Tensor]) -> None:
    """Let a convolution, or torchvision's module of one with norm and activation, train by this pass."""
    whole = type(layer) is Conv2dNormActivation
    layer.__class__ = LeanConvNormActivation if whole else CONVOLUTIONS[type(layer)]
    layer.chain = path


def _units(block: TinyTLBlock) -> list[nn.Module]:
    """A block's layers in forward order, but those that do nothing; a convolution with norm and activation is one."""
    whole = [part for part in own_modules(block) if isinstance(part, LeanConvNormActivation)]
    part_of = {leaf: part for part in whole for leaf in leaves(part)}
    units = [part_of.get(layer, layer) for layer in block.kind.layers(block)]
    return [unit for unit in dict.fromkeys(units) if not isinstance(unit, (nn.Identity, NormOfConvolution, Permute))]


def _join_neighbours(units: Iterable[nn.Module]) -> None:
    """Let convolutions with an activation, one after the other, run as one chain, which the first one runs."""
    run: list[LeanConv2d | LeanConvNormActivation] = []
    for unit in [*units, nn.Identity()]:
        if isinstance(unit, (LeanConv2d, LeanConvNormActivation)) and _is_activated(unit.chain):
            run.append(unit)
            continue
        if len(run) > 1:
            chains = [each.chain for each in run if isinstance(each.chain, Chain)]
            joined = replace(chains[0], stages=tuple(stage for chain in chains for stage in chain.stages))
            for unit, chain in zip(run, chains, strict=True):
                unit.chain = Together(tuple(run), joined if unit is run[0] else done_by_another, chain)
        run = []


def _is_activated(path: object) -> bool:
    return isinstance(path, Chain) and path.stages[-1].activation is not None


def _leave_last_unread(block: TinyTLBlock, unit: nn.Module) -> None:
    """Compute only the gradient of a block's last layer in the backward pass, where nothing there needs its output.

    Whether something does, the layer looks itself each time: what trains can change.
    """
    if type(unit) is nn.Linear:
        unit.__class__ = UnreadLinear
        unit.block = (block,)  # type: ignore[assignment]
    elif (
        isinstance(unit, (LeanConv2d, LeanConvNormActivation))
        and isinstance(unit.chain, Chain)
        and not _is_activated(unit.chain)
    ):
        unit.chain = UnreadWhenAgain(unit.chain, block)
