"""From options to a run that can start: checks, data, model, and a folder made ready."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed

from tinytl_hf.adapter.record import DataRecord, InitRecord
from tinytl_hf.config import recipe
from tinytl_hf.config.run import Config, flat
from tinytl_hf.cuda_graph import describe_passes, training_passes
from tinytl_hf.data import batches, sets
from tinytl_hf.data.augment import RandomCropFlip
from tinytl_hf.data.changes import Changes
from tinytl_hf.device import (
    check_divides,
    device_name,
    make_accelerator,
    say_what_launch_settings_do,
    seconds_since,
)
from tinytl_hf.errors import TinyTLError
from tinytl_hf.lean.backend import describe
from tinytl_hf.measure.memory import DataMemory
from tinytl_hf.measure.metrics import load_metrics
from tinytl_hf.measure.results import Evaluated
from tinytl_hf.model import TinyTLModel
from tinytl_hf.reports.run_folder import ADAPTER
from tinytl_hf.step import Loss, make_optimizer
from tinytl_hf.train import checkpoint
from tinytl_hf.train.budget import within_budget
from tinytl_hf.train.cached_features import compute_features
from tinytl_hf.train.checkpoint import Progress
from tinytl_hf.train.finish import save_adapters
from tinytl_hf.train.output_dir import check_free, check_keeps_init, has_adapter_of_later_epoch, make_ready
from tinytl_hf.train.run import FinalTest, Run
from tinytl_hf.train.schedule import make_scheduler
from tinytl_hf.train.time_left import TimeLeft
from tinytl_hf.train.warm_start import seen_before, warm_start

logger = logging.getLogger(__name__)


def set_up(config: Config) -> Run:
    """Check and load everything, and bring it to where a checkpoint left it if there is one."""
    options = config.train
    accelerator = make_accelerator(
        options.mixed_precision,
        options.threads,
        options.gradient_accumulation_steps,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=config.output_dir,
        # Norms see the batch of all processes, so the buffers are the same everywhere.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    log_conditions(accelerator, config)
    say_what_launch_settings_do(options.mixed_precision, options.gradient_accumulation_steps)
    check_tracker(config.tracker)
    metrics = load_metrics(config.metrics)
    opened = sets.open_data(config.data)
    train_split, eval_split, test_split = opened.train, opened.evaluation, opened.test
    if config.adapter.keep == "best":
        reported = "the same images" if test_split is None else test_split.title
        logger.info(
            "the adapter of the epoch that is best on %s is kept; its figures are of %s", eval_split.title, reported
        )
    asked, config = config, recipe.resolve(config, len(train_split.labels))
    check_free(config)
    config = within_budget(config, accelerator, opened)
    options = config.train
    resume_from = checkpoint.find(config)
    set_seed(config.seed)

    model = TinyTLModel.from_config(config, train_split.label_names)
    if config.adapter.init is not None and resume_from is None:
        check_keeps_init(config)
        warm_start(model, config.adapter.init, config.backbone.weights)
    log_recipe(asked, config, len(train_split.labels))
    train_images = batches.read_images(train_split, config.data, config.data.train_size)
    eval_size = model.config.preprocessing.eval_size
    eval_images = batches.read_images(eval_split, config.data, eval_size)
    test_images = None if test_split is None else batches.read_images(test_split, config.data, eval_size)
    train_set: Any = train_images
    eval_set: Any = eval_images
    in_memory = {"train": train_images.in_memory, "eval": eval_images.in_memory}
    start = time.perf_counter()
    if options.cache_features:
        train_set = compute_features(accelerator, model, train_images, config, trains=True)
        eval_set = compute_features(accelerator, model, eval_images, config, trains=False)
        # The training images go when the features are there.
        in_memory = {
            "train features": train_set.in_memory,
            "eval features": eval_set.in_memory,
            "eval": eval_images.in_memory,
        }
    if test_images is not None:
        in_memory["test"] = test_images.in_memory
    feature_seconds = seconds_since(start, accelerator.device)
    shuffled = batches.ShuffledBatches(
        len(train_images), options.global_batch_size, options.gradient_accumulation_steps, config.seed
    )
    optimizer = make_optimizer(model, config.train)
    prepared, prepared_optimizer, train_loader, eval_loader, scheduler = accelerator.prepare(
        model,
        optimizer,
        batches.make_loader(train_set, config.data, batch_sampler=shuffled),
        batches.make_loader(eval_set, config.data, batch_size=options.global_batch_size),
        make_scheduler(optimizer, config.train, shuffled.optimizer_steps),
    )
    checkpoint.register(accelerator)
    digests = [None if split is None else sets.sha256(split) for split in (train_split, eval_split, test_split)]
    hashes = {
        "backbone.sha256": model.config.backbone.sha256,
        "data.train_sha256": digests[0],
        "data.eval_sha256": digests[1],
    }
    record = DataRecord.of(config.data, opened.source, digests[0])
    record = replace(record, eval_sha256=digests[1], test_sha256=digests[2])
    place = opened.source.name
    seen = seen_before(config.adapter.init, config.data, [eval_split, *([] if test_split is None else [test_split])])
    evaluated = Evaluated(place, eval_split.title, str(digests[1]), len(eval_images), seen[0])
    final = None
    if test_split is not None and test_images is not None:
        tested = Evaluated(place, test_split.title, str(digests[2]), len(test_images), seen[1])
        loader = batches.make_loader(test_images, config.data, batch_size=options.global_batch_size)
        final = FinalTest(tested, test_images, accelerator.prepare(loader))
    unreadable = sum(
        len(split.labels) - len(images)
        for split, images in ((train_split, train_images), (eval_split, eval_images), (test_split, test_images))
        if split is not None and images is not None
    )
    found = opened.found.to_json()
    if unreadable:
        found["left_out"]["unreadable"] = unreadable
    init = None if model.config.init is None else asdict(model.config.init)
    progress = checkpoint.load(accelerator, resume_from, hashes) if resume_from else Progress(init=init)
    if progress.init is not None:
        model.config = replace(model.config, init=InitRecord(**progress.init))
    progress.seconds += feature_seconds
    is_of_later_epoch = resume_from is not None and has_adapter_of_later_epoch(config, progress.epoch)
    accelerator.wait_for_everyone()  # all have seen what is there
    if accelerator.is_main_process:
        make_ready(config, resume_from, progress.epoch)
    accelerator.wait_for_everyone()
    is_missing = resume_from is not None and not (Path(config.output_dir) / ADAPTER).exists()
    accelerator.wait_for_everyone()
    if is_missing or is_of_later_epoch:
        # Resumed into another folder, where the best so far stayed in the first, or from before a better epoch.
        if config.adapter.keep == "best":
            progress.best_accuracy, progress.epochs_since_best = -1.0, 0
        save_adapters(model, config, record, [ADAPTER], accelerator)
    accelerator.wait_for_everyone()  # the main process writes it, and all will read it
    start_tracker(accelerator, config)
    augment = RandomCropFlip(len(train_images), config.seed, config.data.crop_scale, config.data.flip)
    return Run(
        config=config,
        accelerator=accelerator,
        model=model,
        prepared=prepared,
        passes=training_passes(prepared, config),
        optimizer=prepared_optimizer,
        scheduler=scheduler,
        train_loader=train_loader,
        eval_loader=eval_loader,
        eval_images=eval_images,
        evaluated=evaluated,
        final=final,
        found=found,
        data_memory=DataMemory(in_memory, train_images.photo_size),
        record=record,
        batches=shuffled,
        augment=augment,
        changes=Changes(len(train_images), config),
        loss=Loss(config.train, train_images.labels, len(train_split.label_names)),
        time_left=TimeLeft(config),
        progress=progress,
        metrics=metrics,
        hashes=hashes,
    )


def log_recipe(asked: Config, config: Config, images: int) -> None:
    """Say what is trained with: what was asked for, and what was settled of the rest."""
    steps = -(-images // config.train.global_batch_size)
    logger.info(recipe.describe(asked, config, images, steps))
    changes = Changes(0, config)
    if changes.epochs:
        logger.info("images are changed or blended in the first %d epochs", changes.epochs)


def log_conditions(accelerator: Accelerator, config: Config) -> None:
    """Say on what this run runs, and check that its batch can be split."""
    batch, steps = config.train.global_batch_size, config.train.gradient_accumulation_steps
    processes = accelerator.num_processes
    check_divides(batch, "train.global_batch_size", processes, steps)
    if (config.train.mixup or config.train.cutmix) and batch // processes // steps % 2:
        raise TinyTLError(
            f"train.global_batch_size={batch}: mixup and cutmix blend pairs, so a process needs an even number of "
            f"images a step; use a multiple of {2 * processes * steps}"
        )
    logger.info(
        "%s on %d process(es), %s, %d threads, precision %s, engine %s, "
        "global batch %d (%d images x %d processes x %d steps)",
        config.method,
        processes,
        device_name(accelerator),
        torch.get_num_threads(),
        "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision,
        describe(config.engine, accelerator.device) + describe_passes(config, accelerator.device, processes),
        batch,
        batch // processes // steps,
        processes,
        steps,
    )


def start_tracker(accelerator: Accelerator, config: Config) -> None:
    """Open the tracker, with its files in the run's folder."""
    if config.tracker == "none":
        return
    os.environ.setdefault("TRACKIO_DIR", str(Path(config.output_dir) / "trackio"))
    options = {key: str(value) for key, value in flat(config.to_dict()).items()}  # no lists or nulls for tensorboard
    accelerator.init_trackers("tinytl_hf", options, init_kwargs={"wandb": {"dir": config.output_dir}})


def check_tracker(tracker: str) -> None:
    """Raise unless the tracker's package is there.

    Raises:
        TinyTLError: With the command that installs it.
    """
    if tracker != "none" and find_spec(tracker) is None:
        raise TinyTLError(f"tracker={tracker}: not installed; run pip install tinytl-hf[{tracker}]")
