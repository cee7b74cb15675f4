"""Runs of wide blocks that are computed again as one, so that of several blocks one input is kept.

A block of ConvNeXt has an input that is a sixth of all that stock PyTorch keeps of it. What stands between such
blocks, stem and down-sampling, joins the run before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from tinytl_hf.lean.independence import heavy_weights_are_frozen, independent_by_type
from tinytl_hf.lean.recompute import Recomputed
from tinytl_hf.network.blocks import TinyTLBlock

BLOCKS_OF_A_RUN = 3  # more would keep less, and have more maps at a time when they are computed again


class LeanSequence(nn.Sequential):
    """A network's layers, some of which train as one.

    Attributes:
        passes: The training passes, in forward order: of single layers, and of runs of them.
    """

    passes: tuple[Callable[[Tensor], Tensor], ...]

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Sequential``."""
        if not self.training:
            return super().forward(input)
        for run in self.passes:
            input = run(input)
        return input


def join_recomputed(layers: nn.Sequential, slice_mb: float) -> set[nn.Module]:
    """Let neighbours among ``layers`` that would be computed again one by one be so as one, where they allow it.

    Returns:
        The modules that have become part of a run.
    """
    passes: list[Callable[[Tensor], Tensor]] = []
    joined: set[nn.Module] = set()
    for run in _runs(list(_units(layers))):
        if len(run) == 1 or not any(isinstance(unit, TinyTLBlock) for unit in run):
            passes.extend(run)
            continue
        whole = nn.Sequential(*run)
        for unit in run:
            joined.update(unit.modules())
            if isinstance(unit, TinyTLBlock):
                unit.lean_path = None
        passes.append(Recomputed(whole, whole.forward, slice_mb))
    if joined:
        layers.__class__ = LeanSequence
        layers.passes = tuple(passes)  # type: ignore[assignment]
    return joined


def _units(layers: nn.Sequential) -> Iterator[nn.Module]:
    """Blocks and single layers, those of sequences of blocks one by one."""
    for layer in layers:
        if type(layer) is nn.Sequential and any(isinstance(part, TinyTLBlock) for part in layer):
            yield from _units(layer)
        else:
            yield layer


def _runs(units: list[nn.Module]) -> Iterator[list[nn.Module]]:
    """Neighbours that may be joined, with at most so many blocks; what may not be stands alone."""
    run: list[nn.Module] = []
    for unit in units:
        full = isinstance(unit, TinyTLBlock) and sum(isinstance(u, TinyTLBlock) for u in run) == BLOCKS_OF_A_RUN
        if run and (full or not _may_join(unit)):
            yield run
            run = []
        if _may_join(unit):
            run.append(unit)
        else:
            yield [unit]
    if run:
        yield run


def _may_join(unit: nn.Module) -> bool:
    if isinstance(unit, TinyTLBlock):
        return unit.kind.wide and isinstance(unit.lean_path, Recomputed) and not unit.gradient_checkpointing
    return heavy_weights_are_frozen(unit) and independent_by_type(unit)
