"""Measure a model on a set of images: while training, and as the verb ``eval``."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from tinytl_hf.adapter.record import AdapterConfig, DataRecord
from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.verbs import EvalConfig
from tinytl_hf.data import sets
from tinytl_hf.data.batches import make_loader, read_images
from tinytl_hf.data.copies import count_shared
from tinytl_hf.data.find import find, is_same_place, is_there
from tinytl_hf.data.split import Split
from tinytl_hf.device import alone_in_process, check_divides, forward_in_parts, make_accelerator, seconds_since
from tinytl_hf.disk import check_ours
from tinytl_hf.errors import TinyTLError
from tinytl_hf.lean.evaluation import evaluated_by_chains
from tinytl_hf.measure.eval_view import with_view
from tinytl_hf.measure.metrics import compute_metrics, load_metrics
from tinytl_hf.measure.results import Evaluated, check_output_file, save_results
from tinytl_hf.model import TinyTLModel

logger = logging.getLogger(__name__)


def evaluate_adapter(config: EvalConfig, data_config: DataConfig, given: Collection[str] = ()) -> dict[str, Any]:
    """Evaluate the adapter at ``config.adapter`` and write the figures to ``config.output``.

    Args:
        config: The adapter, and how to evaluate it.
        data_config: The images. Of those that it was trained on, options that are left at their defaults are those of
            the training.
        given: Options of ``data_config`` that are meant as they are, be they at their defaults.

    Raises:
        TinyTLError: The adapter or the data cannot be loaded, or their classes differ.
    """
    with alone_in_process():
        return _evaluate(config, data_config, given)


def _evaluate(config: EvalConfig, data_config: DataConfig, given: Collection[str]) -> dict[str, Any]:
    accelerator = make_accelerator(config.mixed_precision)
    check_divides(config.batch_size, "batch_size", accelerator.num_processes)
    if config.output is not None:
        check_no_run(Path(config.output))
        check_ours("output", Path(config.output), '"_evaluate_version"')
        check_output_file("output", Path(config.output))
    extra = load_metrics(config.metrics)
    model = TinyTLModel.from_pretrained(config.adapter, weights=config.weights, revision=config.revision)
    model.config = with_view(model, data_config)
    split, train = _open(data_config, given, model.config.data)
    split = sets.with_label_names(split, model.label_names)
    images = read_images(split, data_config, model.config.preprocessing.eval_size)
    digest = sets.sha256(split)
    if train is not None:
        trained_on: int | None = count_shared(images.split, train)
    else:
        trained_on = _trained_on(split, digest, model.config.data, len(images))
    if trained_on == 0 and _went_on_from_other_images(model.config):
        trained_on = None  # they may have been among those
    evaluated = Evaluated(find(data_config.dataset).name, split.title, digest, len(images), trained_on)
    logger.log(logging.WARNING if evaluated.trained_on else logging.INFO, "evaluating on %s", evaluated)
    prepared, loader = accelerator.prepare(model, make_loader(images, data_config, batch_size=config.batch_size))
    start = time.perf_counter()
    logits, labels = compute_logits(accelerator, prepared, loader, model)
    figures = compute_metrics(logits, labels, extra=extra, tables=True)
    figures["seconds"] = seconds_since(start, accelerator.device)
    if config.mirror:
        mirrored, _ = compute_logits(accelerator, prepared, loader, model, mirror=True)
        figures["mirror"] = compute_metrics((logits + mirrored) / 2, labels, extra=extra)
    if config.output is not None and accelerator.is_main_process:
        save_results(Path(config.output), figures, model, evaluated, accelerator)
    return {**figures, "n": len(images), "method": model.config.method}


def check_no_run(output: Path) -> None:
    """Raise if a file has the results of a run, which go with its other files and, of an adapter, to the Hub.

    Raises:
        TinyTLError: It has.
    """
    if output.is_file() and b'"best_epoch_chosen_on"' in output.read_bytes():
        raise TinyTLError(f"output={output}: holds the results of a run; name another file")


def _open(config: DataConfig, given: Collection[str], record: DataRecord | None) -> tuple[Split, Split | None]:
    """The split to evaluate on and, if they are of the same data set and known, the images that were trained on.

    If this is the training data set (known by its name or its hash) and it has no test or validation split, only the
    held-out part is used. Any other data set without such a split, or another subset of this one, is used whole.
    """
    if record is None:
        return sets.open_eval_split(config, whole=True), None
    named = is_same_place(config.dataset, record.dataset)
    if named and record.source == "local" and not is_there(config.dataset):
        raise TinyTLError(
            f"data.dataset={config.dataset}: the adapter was trained on these local data, and they are not here; name "
            "others with --data.dataset"
        )
    train = None
    if named or record.train_sha256 is not None:
        train, record = _training_split(config, record, named)
    if train is not None and not named:
        config = record.fill_in(config, given)
    if config.subset != record.subset:  # of other rows, which some files of that may be among
        split = sets.open_eval_split(config, whole=True)
        return split, None if train is None else replace(train, numbers=np.full_like(train.numbers, -1))
    split = sets.open_eval_split(config, whole=train is None and not named)
    if named and train is None:
        logger.warning(
            "%s is not as it was when the adapter was trained on it: what is held out now may have been trained on",
            config.dataset,
        )
    return split, train


def _training_split(config: DataConfig, record: DataRecord, named: bool) -> tuple[Split | None, DataRecord]:
    """The images that were trained on, if the data set holds them, and the record with the subset that they are there.

    In another place, what was a subset can be the whole, such as its file, and the other way round.
    """
    for subset in (record.subset,) if named else dict.fromkeys((record.subset, config.subset)):
        there = replace(record, subset=subset)
        train = sets.find_training_split(there.as_trained(config), record.train_sha256)
        if train is not None:
            return train, there
    return None, record


def _trained_on(split: Split, digest: str, record: DataRecord | None, count: int) -> int | None:
    """How many images of a split with that hash were trained on: all, none, or None if it is a split of other data."""
    hashes = {digest, sets.earlier_sha256(split)}
    if record is None or not hashes & {record.train_sha256, record.eval_sha256, record.test_sha256}:
        return None
    return count if record.train_sha256 in hashes else 0


def _went_on_from_other_images(config: AdapterConfig) -> bool:
    """Whether the training went on from an adapter that is known to have been trained on other images."""
    init, own = config.init, None if config.data is None else config.data.train_sha256
    return init is not None and init.train_sha256 not in (None, own)


@torch.no_grad()
def compute_logits(
    accelerator: Accelerator,
    prepared: nn.Module,
    loader: DataLoader,
    model: TinyTLModel,
    after_batch: Callable[[], None] | None = None,
    mirror: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of a whole set, in its order, for any number of processes and any size of the set.

    Args:
        accelerator: What ``prepared`` and ``loader`` were prepared with.
        prepared: The prepared model.
        loader: Batches of the set.
        model: The model itself, for its preprocessing.
        after_batch: Called after each batch; may raise.
        mirror: Whether to mirror each image.

    Returns:
        Logits ``[N, classes]`` and class numbers ``[N]``, the same on every process.

    Raises:
        TinyTLError: The model gives values that are not finite.
    """
    prepared.eval()
    all_logits, all_labels = [], []
    progress = tqdm(loader, desc="eval", disable=not accelerator.is_main_process, leave=False, mininterval=1)
    with evaluated_by_chains(model.backbone) as pixels:
        for batch in progress:
            inputs = batch["features"] if "features" in batch else model.normalise(batch["pixels"], batch["sizes"])
            logits = forward_in_parts(prepared, inputs.flip(3) if mirror else inputs, pixels).float()
            logits, labels = accelerator.gather_for_metrics((logits, batch["labels"]))
            all_logits.append(logits.cpu())
            all_labels.append(labels.cpu())
            if after_batch is not None:
                after_batch()
    logits = torch.cat(all_logits)
    if not logits.isfinite().all():
        raise TinyTLError("the model gives values that are not finite; train with a lower --train.lr")
    return logits.numpy(), torch.cat(all_labels).numpy()
