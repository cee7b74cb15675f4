"""Runs of wide blocks that are computed again as one, so that of several blocks one input is kept.

A block of ConvNeXt has an input that is a sixth of all that stock PyTorch keeps of it, so to keep the input of each
saves too little. Stem and down-sampling, between such blocks, join the run before them or, where lite residuals end
the runs, the run after them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TypeGuard

from torch import Tensor, nn

from tinytl_hf.lean.independence import heavy_weights_are_frozen, independent_by_type
from tinytl_hf.lean.lite_runs import LiteRun
from tinytl_hf.lean.paths import LeanBlockPath
from tinytl_hf.lean.recompute import SHARE_FOR_RUNS, Recomputed
from tinytl_hf.lean.together import has_hooks, is_watched
from tinytl_hf.network.blocks import TinyTLBlock, own_modules

BLOCKS_OF_A_RUN = 3  # more would keep less, and have more maps of a slice at a time when they are computed again
BLOCKS_OF_A_RUN_WITH_LITE_RESIDUALS = 2  # as lite_runs.py says


class LeanSequence(nn.Sequential):
    """A network's layers, some of which train as one, and those of sequences within it one by one.

    Sequences within it are opened, as they would hold their own input while they run, which no layer needs any more.

    Attributes:
        passes: The training passes, in forward order: of single layers, and of runs of them. A part of the sequence,
            as ``layers[:2]``, has none.
        opened: Sequences in it whose layers are among those of the passes.
    """

    passes: tuple[Callable[[Tensor], Tensor], ...] = ()
    opened: tuple[nn.Module, ...] = ()

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Sequential``."""
        if not self.training or not self.passes or any(map(has_hooks, self.opened)):
            return super().forward(input)
        for run in self.passes:
            for each in _units_with_hooks(run) or (run,):
                input = each(input)
        return input


def _units_with_hooks(run: Callable[[Tensor], Tensor]) -> tuple[nn.Module, ...]:
    """The units of a run, each by itself, if somebody looks at one of them."""
    units = units_of(run)
    return units if any(map(is_watched, units)) else ()


def units_of(run: Callable[[Tensor], Tensor]) -> tuple[nn.Module, ...]:
    """The blocks and layers that a training pass computes again as one; none where it is another kind of pass."""
    whole = run.mains if isinstance(run, LiteRun) else run
    return tuple(whole.module.children()) if isinstance(whole, Recomputed) else ()


def join_recomputed(
    layers: nn.Sequential, slice_mb: float | None, prefix: Collection[nn.Module] = ()
) -> tuple[set[nn.Module], set[nn.Module]]:
    """Let neighbours among ``layers`` that would be computed again one by one be so as one, where they allow it.

    Those in ``prefix`` are never computed again. Sequences of blocks among them are opened.

    Returns:
        The modules that no longer train by themselves, but as part of what is computed again; and the blocks of which
        the output is read there.
    """
    passes: list[Callable[[Tensor], Tensor]] = []
    joined: set[nn.Module] = set()
    read: set[nn.Module] = set()
    for run in _runs(list(_units(layers)), prefix):
        blocks = [unit for unit in run if isinstance(unit, TinyTLBlock)]
        with_lite = any(block.lite_residual is not None for block in blocks)
        if len(run) == 1 or not blocks or (with_lite and run[-1] is not blocks[-1]):
            passes.extend(run)
            continue
        joined.update(part for unit in run for part in own_modules(unit))
        read.update(run[:-1])
        if with_lite:
            passes.append(LiteRun.of(run, slice_mb))
            continue
        for block in blocks:
            block.lean_path = None
        whole = nn.Sequential(*run)
        passes.append(Recomputed(whole, whole.forward, slice_mb, SHARE_FOR_RUNS))
    if passes != list(layers):
        run_as(layers, passes)
    return joined, read


def run_as(layers: nn.Sequential, passes: Iterable[Callable[[Tensor], Tensor]]) -> None:
    """Let a sequence train by these passes."""
    layers.__class__ = LeanSequence
    layers.passes = tuple(passes)  # type: ignore[assignment]
    layers.opened = tuple(_opened(layers))  # type: ignore[assignment]


def _units(layers: nn.Sequential) -> Iterator[nn.Module]:
    """Blocks and single layers, those of sequences of blocks one by one."""
    for layer in layers:
        if _is_opened(layer):
            yield from _units(layer)
        else:
            yield layer


def _opened(layers: nn.Sequential) -> Iterator[nn.Module]:
    """The sequences of blocks in a sequence, of any depth."""
    for layer in filter(_is_opened, layers):
        yield layer
        yield from _opened(layer)


def _is_opened(layer: nn.Module) -> TypeGuard[nn.Sequential]:
    return type(layer) is nn.Sequential and any(isinstance(part, TinyTLBlock) for part in layer)


def _runs(units: list[nn.Module], prefix: Collection[nn.Module]) -> Iterator[list[nn.Module]]:
    """Neighbours that may be joined, with at most so many blocks; what may not be stands alone."""
    run: list[nn.Module] = []
    for unit in units:
        joins = unit not in prefix and _may_join(unit)
        if run and (not joins or _is_full(run, unit)):
            yield run
            run = []
        if joins:
            run.append(unit)
        else:
            yield [unit]
    if run:
        yield run


def _is_full(run: list[nn.Module], unit: nn.Module) -> bool:
    """Whether ``unit`` begins the next run: the run has all the blocks that it may have; or it has to end with one."""
    blocks = [other for other in run if isinstance(other, TinyTLBlock)]
    with_lite = any(block.lite_residual is not None for block in blocks)
    full = len(blocks) == (BLOCKS_OF_A_RUN_WITH_LITE_RESIDUALS if with_lite else BLOCKS_OF_A_RUN)
    if isinstance(unit, TinyTLBlock):
        return full or any((block.lite_residual is None) != (unit.lite_residual is None) for block in blocks)
    return with_lite and full


def _may_join(unit: nn.Module) -> bool:
    if isinstance(unit, TinyTLBlock):
        path = unit.lean_path.main if isinstance(unit.lean_path, LeanBlockPath) else unit.lean_path
        return unit.kind.wide and isinstance(path, Recomputed) and not unit.gradient_checkpointing
    return heavy_weights_are_frozen(unit) and independent_by_type(unit)
