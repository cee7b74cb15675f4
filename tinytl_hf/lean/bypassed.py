"""Modules that a lean training pass does not call, as a chain or a lite residual does their work.

What a user puts in the place of their forward pass would count in evaluation alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from tinytl_hf.lean.chain import Chain
from tinytl_hf.lean.layers import LeanConvNormActivation, NormOfConvolution, UnreadLinear
from tinytl_hf.lean.paths import LeanBlockPath, LeanResNetPath, UnreadWhenAgain
from tinytl_hf.lean.runs import LeanSequence
from tinytl_hf.lean.together import Together
from tinytl_hf.network.blocks import TinyTLBlock, own_layers, own_modules


def bypassed(backbone: nn.Module) -> list[nn.Module]:
    """Those that are not called, or whose output has no meaning where they are computed again, each once."""
    return list(dict.fromkeys(part for module in backbone.modules() for part in _bypassed_by(module)))


def _bypassed_by(module: nn.Module) -> Iterator[nn.Module]:
    """Those whose work ``module`` does."""
    if isinstance(module, TinyTLBlock):
        if isinstance(_main_path(module), (Chain, LeanResNetPath)):
            yield from own_modules(module)[1:]
        yield from _from_unread_on(module)
        if module.lite_residual is not None and module.lean_path is not None:
            yield from list(module.lite_residual.modules())[1:]  # it is called itself where it has another forward
    elif isinstance(module, LeanConvNormActivation):
        yield from list(module.modules())[1:]
    elif isinstance(module, NormOfConvolution):
        yield from (*module.of, *module.modules())
    elif isinstance(module, LeanSequence):
        called = {part for run in module.passes if isinstance(run, nn.Module) for part in run.modules()}
        if any(isinstance(run, Chain) for run in module.passes):
            yield from (part for layer in module if layer not in called for part in layer.modules())


def _from_unread_on(block: TinyTLBlock) -> Iterator[nn.Module]:
    """Of a block that is computed again, what gives values without meaning then: a last layer, and what holds or
    follows it.
    """
    unread = {part for module in own_modules(block) if _is_unread(module) for part in module.modules()}
    layers = block.kind.layers(block)
    first = next((i for i, layer in enumerate(layers) if layer in unread), len(layers))
    before = {part for layer in layers[:first] for part in layer.modules()}
    if unread:
        yield from (part for part in own_modules(block)[1:] if not before.issuperset(own_layers(part)))


def _is_unread(module: nn.Module) -> bool:
    return isinstance(module, UnreadLinear) or isinstance(vars(module).get("chain"), UnreadWhenAgain)


def _main_path(block: TinyTLBlock) -> object:
    path = block.lean_path.as_one if isinstance(block.lean_path, Together) else block.lean_path
    return path.main if isinstance(path, LeanBlockPath) else path
