"""Several adapters over one backbone in memory.

Each adapter has a tree of modules of its own, as its method decides what a norm does, which blocks have a lite
residual of which shape, and what runs lean. The frozen tensors in these trees are the same objects, so that
they exist once, and switching exchanges the trees: it copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from tinytl_hf.adapter.delta import check_values, frozen_tensors
from tinytl_hf.adapter.record import AdapterConfig
from tinytl_hf.config.check import check
from tinytl_hf.errors import TinyTLError
from tinytl_hf.network.backbones import same_network
from tinytl_hf.network.blocks import TinyTLBlock

if TYPE_CHECKING:
    from tinytl_hf.lean.prefix import Prefix

FIRST = "default"  # name of the adapter that a model is made with


class LoadedAdapter(NamedTuple):
    """What a model is made of while one of its adapters is active.

    Attributes:
        backbone: The tree of modules, with the adapter's tensors in it.
        blocks: Its residual blocks by name.
        prefix: What runs before its first trained block, where that can run by itself.
        stock_layers: Its layers that keep full-size maps while training.
        config: What the adapter says of itself.
        weights_from: Where the frozen tensors were read; empty where another adapter's are to be read elsewhere.
        folder: Its folder, or None.
    """

    backbone: nn.Module
    blocks: dict[str, TinyTLBlock]
    prefix: Prefix | None
    stock_layers: list[str]
    config: AdapterConfig
    weights_from: str
    folder: Path | None


class Adapters:
    """The adapters that a model holds, one of which is active; the others wait here."""

    def __init__(self) -> None:
        self.active = FIRST
        self._waiting: dict[str, LoadedAdapter] = {}

    @property
    def names(self) -> list[str]:
        """Names of all adapters, the active one first."""
        return [self.active, *self._waiting]

    def check_new(self, name: str, saved: AdapterConfig, current: AdapterConfig, folder: Path) -> None:
        """Raise if ``name`` is taken or no text, or if the adapter in ``folder`` is for another network."""
        check(isinstance(name, str), "name", name, "use a text")
        if not name or name in self.names:
            taken = "is loaded already; unload it first or choose another" if name else "choose a name"
            raise TinyTLError(f"name={name}: {taken}")
        if not same_network(saved.backbone.name, current.backbone.name):
            raise _other_backbone(folder, current, f"it is for {saved.backbone.name}")

    def source(self, current: LoadedAdapter, own: str) -> str:
        """The source of the frozen tensors now in memory, or ``own`` if no loaded adapter has any."""
        loaded = [current, *self._waiting.values()]
        found = (adapter.weights_from for adapter in loaded if adapter.config.backbone.sha256)
        return next(filter(None, found), own)

    def add(self, name: str, new: LoadedAdapter, current: LoadedAdapter, folder: Path, trained_on: str | None) -> None:
        """Take in an adapter, on the device and in the type of ``current``, over the frozen tensors in memory.

        Args:
            name: What to call it.
            new: The adapter.
            current: The active one.
            folder: Where it comes from.
            trained_on: Hash of the frozen tensors that it was trained on.

        Raises:
            TinyTLError: These are not the ones in memory, or none is there, as they are offloaded.
        """
        found = new.config.backbone.sha256
        if found != trained_on:
            why = f"sha256 of its frozen tensors is {trained_on}, and of these {found}"
            raise _other_backbone(folder, current.config, why)
        check_values(pool := self._frozen(current, new.config))
        for key, tensor in frozen_tensors(new.backbone).items():
            if key in pool and not torch.equal(tensor.to(pool[key]), pool[key]):
                raise _other_backbone(folder, current.config, f"{key} differs")
        share(new.backbone, pool)
        new.backbone.to(next(p for p in current.backbone.parameters() if p.is_floating_point()))  # not one of int8
        self._waiting[name] = new

    def switch(self, name: str, current: LoadedAdapter) -> LoadedAdapter:
        """Make ``name`` the active adapter, in the mode of ``current``, train or eval, and keep that for later.

        Raises:
            TinyTLError: No such adapter.
        """
        if name == self.active:
            return current
        self._check_known(name)
        self._waiting[self.active], self.active = current, name
        new = self._waiting.pop(name)
        if new.backbone.training != current.backbone.training:  # else parts of it may have a mode of their own
            new.backbone.train(current.backbone.training)
        return new

    def remove(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            TinyTLError: No such adapter, or it is the active one.
        """
        self._check_known(name)
        if name == self.active:
            raise TinyTLError(f"name={name}: is the active adapter; set_adapter another one before unloading it")
        del self._waiting[name]

    def apply(self, change: Callable[[Tensor], Tensor], current: LoadedAdapter) -> None:
        """Move or cast the waiting adapters as the active one was, and let them share its tensors again."""
        for waiting in self._waiting.values():
            waiting.backbone._apply(change)
        for waiting in self._waiting.values():
            share(waiting.backbone, self._frozen(current, waiting.config))

    def _frozen(self, current: LoadedAdapter, config: AdapterConfig) -> dict[str, Tensor]:
        """The frozen tensors in memory, stored as ``config`` has them: what one adapter trains can be frozen in
        another.
        """
        pool: dict[str, Tensor] = {}
        for adapter in (*reversed(self._waiting.values()), current):
            if adapter.config.backbone.frozen_weights == config.backbone.frozen_weights:
                pool.update(frozen_tensors(adapter.backbone))
        return pool

    def _check_known(self, name: str) -> None:
        if name not in self.names:
            raise TinyTLError(f"name={name}: no such adapter; loaded are {', '.join(sorted(self.names))}")


def share(backbone: nn.Module, pool: dict[str, Tensor]) -> None:
    """Put the tensors of ``pool`` in the place of the frozen ones of ``backbone`` that have their names."""
    for name in frozen_tensors(backbone).keys() & pool.keys():
        path, _, attribute = name.rpartition(".")
        setattr(backbone.get_submodule(path), attribute, pool[name])


def _other_backbone(folder: Path, config: AdapterConfig, why: str) -> TinyTLError:
    return TinyTLError(
        f"{folder} was not trained on the {config.backbone.name} in memory (from {config.backbone.weights}): {why}; "
        "load it into a model of its own with from_pretrained"
    )
