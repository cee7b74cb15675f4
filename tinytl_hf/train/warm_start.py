"""Going on from an adapter that was trained on other data, or by a method that trains less."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import reduce
from itertools import combinations
from operator import or_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinytl_hf.adapter.build import build_network, new_config
from tinytl_hf.adapter.delta import adapter_tensors
from tinytl_hf.adapter.format import read_config, read_tensors
from tinytl_hf.adapter.record import AdapterConfig, InitRecord
from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.run import Config
from tinytl_hf.data.copies import count_shared
from tinytl_hf.data.sets import find_training_split
from tinytl_hf.data.split import Split
from tinytl_hf.disk import expanded
from tinytl_hf.errors import TinyTLError
from tinytl_hf.hub.transfer import find_adapter
from tinytl_hf.model import TinyTLModel
from tinytl_hf.network.head import head_of
from tinytl_hf.network.no_values import NoRandomValues
from tinytl_hf.words import counted

logger = logging.getLogger(__name__)

NAMED_CLASSES = 3  # how many classes of one kind the log line names


def warm_start(model: TinyTLModel, init: str, weights: str) -> None:
    """Copy what an adapter trained into a model that is about to train, and note that in the model's record.

    The head's rows of classes that both have are copied, those of new classes stay as they are. So do lite residuals
    that the adapter does not have, or has with another kernel, as for another image size.

    Args:
        model: The model, of the run's method and classes.
        init: The adapter: a folder, or a name on the Hub.
        weights: Where the run takes the backbone's weights from.

    Raises:
        TinyTLError: It is of another backbone or other weights, or trained what the run's method freezes.
    """
    old = _load(init, weights, model.config.backbone.name)
    saved, own = old.config, model.config
    tensors, before = model.adapter_tensors(), old.adapter_tensors()
    if lost := sorted(before.keys() - tensors.keys()):
        more = f" and {counted(len(lost) - 1, 'more tensor')}" if len(lost) > 1 else ""
        raise TinyTLError(
            f"adapter.init={init}: it was trained by {saved.method}, and {own.method} has no place for {lost[0]}"
            f"{more}; use {_options_of(saved, own, before.keys())}"
        )
    head, _ = head_of(model.backbone)
    rows = {f"{head}.weight", f"{head}.bias"}
    taken = [name for name in _fitting(tensors, before) if name not in rows]
    shared = [name for name in own.label_names if name in old.label_names]
    rows_to, rows_from = ([names.index(label) for label in shared] for names in (own.label_names, old.label_names))
    with torch.no_grad():
        for name in taken:
            tensors[name].copy_(before[name])
        for name in rows:
            tensors[name][rows_to] = before[name][rows_from]
    fresh = [name for name in tensors if name not in rows and name not in taken]
    lost_branches = {_branch_of(name) for name in before if name not in taken} - {None}
    parts = _describe(init, saved.method, own.label_names, old.label_names, taken, fresh)
    logger.info("; ".join([*parts, *_say_what_differs(saved, own, len(lost_branches))]))
    source = None if expanded(init).exists() else init
    train_sha256 = saved.data.train_sha256 if saved.data is not None else None
    model.config = replace(own, init=InitRecord(saved.method, saved.label_names, source, train_sha256))


def trained_by(init: str, backbone: str) -> frozenset[str]:
    """Names of the tensors that an adapter of a backbone holds.

    Raises:
        TinyTLError: It cannot be read, or is of another backbone.
    """
    return frozenset(read_tensors(_folder(init, backbone)))


def has_place_for(config: Config, tensors: Set[str]) -> bool:
    """Whether the method of a run, with its trained blocks and norms, has a place for all that an adapter holds.

    Raises:
        TinyTLError: No network can be built for that run.
    """
    name, labels, data = config.backbone.name, (["0", "1"], None), config.data
    sizes = (data.train_size, data.eval_size, data.crop_pct)
    what = new_config(
        name, "none", config.method, labels, sizes, "fp32", config.trained_blocks, config.lite, config.head
    )
    return tensors <= _names_in(what)


def _names_in(what: AdapterConfig) -> Set[str]:
    """Names of the tensors that an adapter so made would hold."""
    with torch.device("meta"), NoRandomValues():  # names alone: a model of values takes twenty times as long
        backbone, _ = build_network(what, "none")
    return adapter_tensors(backbone).keys()


def _folder(init: str, backbone: str) -> Path:
    """Where the adapter lies, if it is of that backbone."""
    folder = find_adapter(init)
    name = read_config(folder).backbone.name
    if name != backbone:
        raise TinyTLError(f"adapter.init={init}: it is of {name}, not {backbone}; use --backbone.name {name}")
    return folder


def _load(init: str, weights: str, backbone: str) -> TinyTLModel:
    """The adapter ``init`` over the run's weights, if it is of the run's backbone."""
    folder = _folder(init, backbone)
    try:
        return TinyTLModel.from_pretrained(folder, weights=weights)
    except TinyTLError as error:
        raise TinyTLError(f"adapter.init={init}: {error}") from error


def _options_of(saved: AdapterConfig, own: AdapterConfig, tensors: Set[str]) -> str:
    """The fewest options by which a run has room for all tensors that an adapter holds."""
    blocks = "all" if saved.trained_blocks is None else saved.trained_blocks
    values: dict[str, dict[str, Any]] = {
        f"--method {saved.method}": {"method": saved.method},
        f"--lite.norm {saved.lite.norm}": {"lite": replace(own.lite, norm=saved.lite.norm)},
        f"--trained_blocks {blocks}": {"trained_blocks": saved.trained_blocks},
    }
    differ = {option: value for option, value in values.items() if replace(own, **value) != own}
    for count in range(1, len(differ)):
        for options in combinations(differ, count):
            if tensors <= _names_in(replace(own, **reduce(or_, map(differ.__getitem__, options)))):
                return " ".join(options)
    return " ".join(differ)


def seen_before(init: str | None, data: DataConfig, splits: Sequence[Split]) -> list[int | None]:
    """How many images of each split the adapter that a run goes on from was trained on; None: it is not known.

    Of a data set that holds a part out, that adapter may have held out another.
    """
    if init is None:
        return [0] * len(splits)
    try:
        record = read_config(find_adapter(init)).data
    except TinyTLError:  # a run that is resumed can be without it
        return [None] * len(splits)
    train = None
    if record is not None and record.train_sha256 is not None:
        train = find_training_split(record.as_trained(data), record.train_sha256)
    counts = [0 if train is None else count_shared(split, train) for split in splits]
    for split, count in zip(splits, counts, strict=True):
        if count:
            logger.warning(
                "adapter.init=%s: it was trained on %d of the %s of %s that this run evaluates on; hold out "
                "what it held out, by its --data.split_seed and --data.eval_fraction",
                init,
                count,
                counted(len(split.labels), "image"),
                split.title,
            )
    return list(counts)


def _fitting(tensors: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that are taken over: of a lite residual, all or none."""
    differ = [name for name, tensor in tensors.items() if name not in before or before[name].shape != tensor.shape]
    fresh_branches = {_branch_of(name) for name in differ} - {None}
    return [name for name in tensors if name not in differ and _branch_of(name) not in fresh_branches]


def _branch_of(name: str) -> str | None:
    """The lite residual that a tensor belongs to."""
    block, in_branch, _ = name.partition(".lite_residual.")
    return block if in_branch else None


def _describe(init: str, method: str, new: list[str], old: list[str], taken: list[str], fresh: list[str]) -> list[str]:
    unknown, gone = [name for name in new if name not in old], [name for name in old if name not in new]
    parts = [
        f"goes on from {init} ({method}): {counted(len(taken), 'tensor')} and the head's rows of "
        f"{len(new) - len(unknown)} of {len(new)} classes are taken over"
    ]
    if unknown:
        parts.append(f"the rows of {_names(unknown)} start fresh")
    if fresh:
        parts.append(f"{counted(len(fresh), 'tensor starts', 'tensors start')} fresh, such as {fresh[0]}")
    if gone:
        parts.append(f"its rows of {_names(gone)} are left out")
    return parts


def _say_what_differs(saved: AdapterConfig, own: AdapterConfig, lost_branches: int) -> Iterator[str]:
    """That lite residuals are left out, with the options that differ, and that frozen weights are other ones."""
    if lost_branches:
        values = {f"lite.{name}": (value, getattr(own.lite, name)) for name, value in vars(saved.lite).items()}
        values["data.train_size"] = saved.preprocessing.train_size, own.preprocessing.train_size
        differ = [f"{option} is {now}, not {was}" for option, (was, now) in values.items() if now != was]
        yield f"its lite residuals of {counted(lost_branches, 'block')} are left out, as {' and '.join(differ)}"
    was, now = saved.backbone.frozen_weights, own.backbone.frozen_weights
    if now != was:
        yield f"it was trained with {was} frozen weights, and they are {now} here"


def _names(names: list[str]) -> str:
    more = len(names) - NAMED_CLASSES
    return ", ".join(names[:NAMED_CLASSES]) + (f" and {more} more" if more > 0 else "")
