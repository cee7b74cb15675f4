"""Measure a model on a set of images: while training, and as the verb ``eval``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from tinytl_hf.config.run import DataConfig
from tinytl_hf.config.verbs import EvalConfig
from tinytl_hf.data import sets
from tinytl_hf.data.batches import make_loader, read_images
from tinytl_hf.device import check_divides, device_name, forward_in_parts, make_accelerator
from tinytl_hf.errors import TinyTLError
from tinytl_hf.measure.metrics import compute_metrics, load_metrics
from tinytl_hf.measure.peak import no_stderr
from tinytl_hf.model import TinyTLModel
from tinytl_hf.network.torchvision_nets import check_size
from tinytl_hf.version import __version__


def evaluate_adapter(config: EvalConfig, data_config: DataConfig) -> dict[str, Any]:
    """Evaluate the adapter at ``config.adapter`` and write the figures to ``config.output``.

    Raises:
        TinyTLError: The adapter or the data cannot be loaded, or their classes differ.
    """
    accelerator = make_accelerator(config.mixed_precision)
    check_divides(config.batch_size, "batch_size", accelerator.num_processes)
    if config.output is not None:
        _make_folder_of(Path(config.output))
    extra = load_metrics(config.metrics)
    model = TinyTLModel.from_pretrained(config.adapter, weights=config.weights)
    eval_size = data_config.eval_size or data_config.train_size
    check_size(model.config.backbone.name, "eval_size", eval_size)
    options = replace(model.config.preprocessing, eval_size=eval_size, crop_pct=data_config.crop_pct)
    model.config = replace(model.config, preprocessing=options)
    trained_on = model.config.data.dataset if model.config.data is not None else None
    split = sets.with_label_names(sets.open_eval_split(data_config, trained_on), model.label_names)
    images = read_images(split, data_config, eval_size)
    prepared, loader = accelerator.prepare(model, make_loader(images, data_config, batch_size=config.batch_size))
    start = time.perf_counter()
    figures = compute_metrics(*predict_set(accelerator, prepared, loader, model), extra=extra, tables=True)
    figures["seconds"] = time.perf_counter() - start
    if config.output is not None and accelerator.is_main_process:
        save_results(Path(config.output), figures, model, len(images), accelerator)
    return {**figures, "n": len(images), "method": model.config.method}


@torch.no_grad()
def predict_set(
    accelerator: Accelerator,
    prepared: nn.Module,
    loader: DataLoader,
    model: TinyTLModel,
    after_batch: Callable[[], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of a whole set, in its order, for any number of processes and any size of the set.

    Args:
        accelerator: What ``prepared`` and ``loader`` were prepared with.
        prepared: The prepared model.
        loader: Batches of the set.
        model: The model itself, for its preprocessing.
        after_batch: Called after each batch; may raise.

    Returns:
        Logits ``[N, classes]`` and class numbers ``[N]``, the same on every process.

    Raises:
        TinyTLError: The model gives values that are not finite.
    """
    prepared.eval()
    all_logits, all_labels = [], []
    for batch in tqdm(loader, desc="eval", disable=not accelerator.is_main_process, leave=False, mininterval=1):
        inputs = batch["features"] if "features" in batch else model.normalise(batch["pixels"], batch["sizes"])
        logits = forward_in_parts(prepared, inputs).float()
        logits, labels = accelerator.gather_for_metrics((logits, batch["labels"]))
        all_logits.append(logits.cpu())
        all_labels.append(labels.cpu())
        if after_batch is not None:
            after_batch()
    logits = torch.cat(all_logits)
    if not logits.isfinite().all():
        raise TinyTLError("the model gives values that are not finite; train with a lower --train.lr")
    return logits.numpy(), torch.cat(all_labels).numpy()


def save_results(
    path: Path, figures: dict[str, Any], model: TinyTLModel, images: int, accelerator: Accelerator
) -> None:
    """Write figures and their conditions with ``evaluate.save``.

    That asks git for the commit at hand: what git says outside a repository is kept from the user, and
    without git the same JSON is written without a commit.

    Raises:
        TinyTLError: The file cannot be written.
    """
    conditions = {
        "n": images,
        "method": model.config.method,
        "backbone": model.config.backbone.name,
        "eval_size": model.config.preprocessing.eval_size,
        "label_names": model.label_names,
        "trained_parameters": sum(parameter.numel() for parameter in model.trainable_parameters()),
        "device": device_name(accelerator),
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "torch_version": torch.__version__,
        "tinytl_hf_version": __version__,
    }
    results = {**figures, **conditions}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        try:
            with no_stderr():
                evaluate.save(temporary, **results)
        except FileNotFoundError:  # no git
            temporary.write_text(json.dumps(results), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        for left_over in path.parent.glob(f"{temporary.name}*"):
            left_over.unlink()
        raise TinyTLError(f"{path}: cannot be written ({error}); make room, or name another folder") from error


def _make_folder_of(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TinyTLError(f"output={path}: cannot be written ({error}); name another file") from error
