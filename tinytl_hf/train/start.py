"""From options to a run that can start: checks, data, model, and a folder made ready."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list, set_seed
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from tinytl_hf.adapter.record import DataRecord, InitRecord
from tinytl_hf.config import recipe
from tinytl_hf.config.run import Config, flat
from tinytl_hf.cuda_graph import describe_passes, training_passes
from tinytl_hf.data import batches, sets
from tinytl_hf.data.augment import RandomCropFlip
from tinytl_hf.data.changes import Changes
from tinytl_hf.data.sets import Opened
from tinytl_hf.device import (
    check_divides,
    device_name,
    make_accelerator,
    precision_of,
    say_what_launch_settings_do,
)
from tinytl_hf.disk import writing
from tinytl_hf.errors import TinyTLError
from tinytl_hf.lean.backend import chosen, describe, has_bf16
from tinytl_hf.measure.metrics import load_metrics
from tinytl_hf.measure.results import Evaluated
from tinytl_hf.model import TinyTLModel
from tinytl_hf.network.backbones import check_takes
from tinytl_hf.reports.run_folder import ADAPTER, CONFIG_FILE
from tinytl_hf.step import Loss, make_optimizer
from tinytl_hf.train import checkpoint
from tinytl_hf.train.budget import within_budget
from tinytl_hf.train.finish import save_adapters
from tinytl_hf.train.idle import Facts, can_stop_early, check_trains, rules_of_reading, rules_of_run, say_idle
from tinytl_hf.train.inputs import Inputs, read_inputs
from tinytl_hf.train.output_dir import (
    TRACKED_AS,
    check_free,
    check_is_shared,
    check_keeps_init,
    claimed,
    copy_best,
    has_adapter_of_later_epoch,
    has_whole_adapter,
    make_ready,
)
from tinytl_hf.train.progress import PROGRESS_FILE, Progress
from tinytl_hf.train.run import EvalSet, Run
from tinytl_hf.train.schedule import lr_factor, set_learning_rates
from tinytl_hf.train.time_left import TimeLeft
from tinytl_hf.train.warm_start import seen_before, warm_start
from tinytl_hf.words import counted

logger = logging.getLogger(__name__)


def set_up(config: Config, held: ExitStack) -> Run:
    """Check and load everything, and bring it to where a checkpoint left it if there is one.

    Args:
        config: The run.
        held: Gets what is held until the run ends: the run's folder.
    """
    accelerator = accelerator_for(config)
    metrics = load_metrics(config.metrics)
    opened = sets.open_data(config.data)
    asked, config = config, settle(config, accelerator, opened)
    options = config.train
    resume_from = find_checkpoint(config, accelerator)
    set_seed(config.seed)
    model = make_model(config, opened.train.label_names, resume_from)
    log_recipe(asked, config, opened, resume_from, accelerator.device)
    inputs = read_inputs(accelerator, model, opened, config)
    say_idle(asked, rules_of_reading(inputs.streams))
    images = len(inputs.train_images)
    shuffled = batches.ShuffledBatches(
        images, options.global_batch_size, options.gradient_accumulation_steps, config.seed
    )
    optimizer = make_optimizer(model, options)
    prepared, prepared_optimizer, train_loader, scheduler = accelerator.prepare(
        model,
        optimizer,
        batches.make_loader(inputs.train_set, config.data, batch_sampler=shuffled),
        LambdaLR(optimizer, lr_factor(options, shuffled.optimizer_steps)),
    )
    checkpoint.register(accelerator, model)
    record = record_of(config, opened)
    evaluation, test = eval_sets(config, accelerator, opened, inputs, record)
    hashes = hashes_of(accelerator, model, opened, record, resume_from)
    if accelerator.is_main_process:
        held.enter_context(claimed(config, resume_from))
    progress = start_or_go_on(config, accelerator, model, record, resume_from, hashes)
    set_learning_rates(scheduler.scheduler)
    progress.seconds += inputs.seconds
    start_tracker(accelerator, config)
    return Run(
        config=config,
        accelerator=accelerator,
        model=model,
        prepared=prepared,
        passes=training_passes(prepared, config),
        optimizer=prepared_optimizer,
        scheduler=scheduler,
        train_loader=train_loader,
        evaluation=evaluation,
        test=test,
        found=inputs.found(opened),
        data_memory=inputs.memory,
        record=record,
        batches=shuffled,
        augment=RandomCropFlip(images, config.seed, config.data.crop_scale, config.data.flip),
        changes=Changes(images, config),
        loss=Loss(options, inputs.train_images.labels, len(opened.train.label_names)),
        time_left=TimeLeft(config),
        progress=progress,
        metrics=metrics,
        hashes=hashes,
    )


def accelerator_for(config: Config) -> Accelerator:
    """What runs the training; says on what, and checks that the run's options fit it."""
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
    check_trains(config)
    return accelerator


def settle(config: Config, accelerator: Accelerator, opened: Opened) -> Config:
    """The config with what it leaves open chosen by the data and the budget, and its folder checked."""
    config = recipe.resolve(config, len(opened.train.labels))
    if config.adapter.keep == "best" and config.train.plan.epochs > 1:
        logger.info(
            "the adapter of the epoch that is best on %s is kept; its figures are of %s",
            opened.evaluation.title,
            "the same images" if opened.test is None else opened.test.title,
        )
    if config.adapter.keep == "last" and can_stop_early(config.train):
        logger.info(
            "adapter.keep=last: train.patience chooses by the accuracy on %s which epoch that is",
            opened.evaluation.title,
        )
    with writing(f"output_dir={config.output_dir}", "choose another"):  # nor can one of too long a path be looked at
        check_free(config)
    return within_budget(config, accelerator, opened)


def find_checkpoint(config: Config, accelerator: Accelerator) -> Path | None:
    """The checkpoint to go on from, if any: that which the first process finds."""
    found = [checkpoint.find(config) if accelerator.is_main_process else None]
    (path,) = broadcast_object_list(found)
    if path is not None:
        check_is_shared(path / PROGRESS_FILE)
    return path


def make_model(config: Config, label_names: list[str], resume_from: Path | None) -> TinyTLModel:
    """The model to train; with ``adapter.init``, and no checkpoint to go on from, with what that adapter has."""
    model = TinyTLModel.from_config(config, label_names)
    if config.data.start_size is not None:
        check_takes(model.config.backbone.name, model.backbone, "data.start_size", config.data.start_size)
    if config.adapter.init is not None and resume_from is None:
        check_keeps_init(config)
        warm_start(model, config.adapter.init, config.backbone.weights)
    return model


def record_of(config: Config, opened: Opened) -> DataRecord:
    """What the adapter says of its data."""
    return DataRecord.of(
        config.data,
        opened.source,
        train_sha256=sets.sha256(opened.train),
        eval_sha256=sets.sha256(opened.evaluation),
        test_sha256=None if opened.test is None else sets.sha256(opened.test),
    )


def eval_sets(
    config: Config, accelerator: Accelerator, opened: Opened, inputs: Inputs, record: DataRecord
) -> tuple[EvalSet, EvalSet | None]:
    """What is evaluated on after each epoch, and what at the end if that is another split."""

    def loader_of(images: Dataset) -> DataLoader:
        loader = batches.make_loader(images, config.data, batch_size=config.train.global_batch_size)
        return accelerator.prepare(loader)

    place, evaluation, test = opened.source.name, opened.evaluation, opened.test
    seen = seen_before(config.adapter.init, config.data, [evaluation] if test is None else [evaluation, test])
    evaluated = Evaluated(place, evaluation.title, str(record.eval_sha256), len(inputs.eval_images), seen[0])
    after_epochs = EvalSet(evaluated, inputs.eval_images, loader_of(inputs.eval_set))
    if test is None or inputs.test_images is None:
        return after_epochs, None
    tested = Evaluated(place, test.title, str(record.test_sha256), len(inputs.test_images), seen[1])
    return after_epochs, EvalSet(tested, inputs.test_images, loader_of(inputs.test_images))


def hashes_of(
    accelerator: Accelerator, model: TinyTLModel, opened: Opened, record: DataRecord, resume_from: Path | None
) -> dict[str, str | None]:
    """What a checkpoint records besides the options, and a resumed run must have too."""
    train, evaluation = "data.train_sha256", "data.eval_sha256"
    return {
        "backbone.sha256": model.config.backbone.sha256,
        train: checkpoint.hash_of(opened.train, record.train_sha256, train, resume_from),
        evaluation: checkpoint.hash_of(opened.evaluation, record.eval_sha256, evaluation, resume_from),
        "precision": accelerator.mixed_precision,  # a launcher can have said it
    }


def start_or_go_on(
    config: Config,
    accelerator: Accelerator,
    model: TinyTLModel,
    record: DataRecord,
    resume_from: Path | None,
    hashes: dict[str, str | None],
) -> Progress:
    """Make the run's folder ready, and bring the model to where the checkpoint left it if there is one."""
    if resume_from is not None:
        return go_on(config, accelerator, model, record, resume_from, hashes)
    accelerator.wait_for_everyone()  # all have seen what is there
    if accelerator.is_main_process:
        make_ready(config, None, epochs_done=0)
    accelerator.wait_for_everyone()
    check_is_shared(Path(config.output_dir) / CONFIG_FILE)
    return Progress(init=None if model.config.init is None else asdict(model.config.init))


def go_on(
    config: Config,
    accelerator: Accelerator,
    model: TinyTLModel,
    record: DataRecord,
    resume_from: Path,
    hashes: dict[str, str | None],
) -> Progress:
    """Bring the model to where the checkpoint left it, and the run's folder to hold the adapter of that time."""
    output = Path(config.output_dir)
    progress = checkpoint.load(accelerator, resume_from, hashes)
    left = config.train.plan.epochs - progress.epoch
    logger.info(
        "resumes from %s: %s and %s are done%s",
        resume_from,
        counted(progress.epoch, "epoch"),
        counted(progress.step, "step"),
        "" if left else ", and there is nothing left to train; --train.epochs says how many there are to be",
    )
    if progress.init is not None:
        model.config = replace(model.config, init=InitRecord(**progress.init))
    is_of_later_epoch = has_adapter_of_later_epoch(output, config, progress.epoch)
    accelerator.wait_for_everyone()  # all have seen what is there
    if accelerator.is_main_process:
        make_ready(config, resume_from, progress.epoch)
        copy_best(config, resume_from, progress.epoch)
    accelerator.wait_for_everyone()
    check_is_shared(output / CONFIG_FILE)
    # All do what the first process sees: another machine may see it later, and would stop at another epoch.
    (is_to_be_written,) = broadcast_object_list([is_of_later_epoch or not has_whole_adapter(output)])
    if is_to_be_written:
        # Resumed into another folder, and the best so far is not in the first, or from before a better epoch.
        is_best = progress.batch == 0 and progress.epochs_since_best == 0  # which the checkpoint has itself
        if config.adapter.keep == "best" and not is_best:
            if progress.best_accuracy >= 0:
                logger.warning(
                    "the adapter of the best epoch so far (accuracy %.4f) is gone: the best is chosen from here on",
                    progress.best_accuracy,
                )
            progress.best_accuracy, progress.epochs_since_best = -1.0, 0
        save_adapters(model, config, record, [ADAPTER], accelerator)
    accelerator.wait_for_everyone()  # the main process writes it, and all will read it
    return progress


def log_recipe(asked: Config, config: Config, opened: Opened, resume_from: Path | None, device: torch.device) -> None:
    """Say what is trained with: what was asked for, what was settled of the rest, and what of it does nothing."""
    options, data, images = config.train, config.data, len(opened.train.labels)
    steps = -(-images // options.global_batch_size)
    logger.info(recipe.describe(asked, config, images, steps))
    if images < options.global_batch_size:
        logger.info(
            "train.global_batch_size=%d: the data have %s to train on, so a step shows some of them again",
            *(options.global_batch_size, counted(images, "image")),
        )
    if resume_from is None and _is_quicker_in_bf16(config, device):
        logger.info("--train.mixed_precision bf16 would take less memory and less time here")
    changes, epochs = Changes(0, config), options.plan.epochs
    if changes.epochs:
        which = "all epochs" if changes.epochs == epochs else f"the first {changes.epochs} of {epochs} epochs"
        logger.info("images are changed or blended in %s", which)
    takes_all = _options_that_take_all(config, opened)
    asked_for = {"data.max_train_samples": data.max_train_samples, "data.max_eval_samples": data.max_eval_samples}
    of_class = np.bincount(opened.train.labels)
    facts = Facts(
        steps,
        holds_out=opened.evaluation.held_out,
        draws=any(most is not None and name not in takes_all for name, most in asked_for.items()),
        takes_all=takes_all,
        alike=len(set(of_class[of_class > 0])) == 1,
        has_gpu=device.type == "cuda",
        goes_on=resume_from is not None,
        in_place=resume_from is not None and checkpoint.is_of(resume_from, Path(config.output_dir)),
    )
    say_idle(asked, rules_of_run(config, facts))


def _is_quicker_in_bf16(config: Config, device: torch.device) -> bool:
    """Whether a run computes in fp32, though nothing says that it is to, where bf16 has products and kernels."""
    in_fp32 = config.train.mixed_precision is None and precision_of(None) == "no"
    has_kernels = config.engine.lean and chosen(config.engine.backend, device) != "eager"
    return in_fp32 and has_kernels and has_bf16(device)


def _options_that_take_all(config: Config, opened: Opened) -> tuple[str, ...]:
    """Which of the most images to train and to evaluate on are more than there are."""
    evaluated = [len(split.labels) for split in (opened.evaluation, opened.test) if split is not None]
    pairs = {
        "data.max_train_samples": (config.data.max_train_samples, len(opened.train.labels)),
        "data.max_eval_samples": (config.data.max_eval_samples, max(evaluated)),
    }
    return tuple(name for name, (most, found) in pairs.items() if most is not None and found < most)


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
        "%s on %s, %s, %s, precision %s, engine %s, global batch %d (%s x %s x %s)",
        config.method,
        counted(processes, "process", "processes"),
        device_name(accelerator),
        counted(torch.get_num_threads(), "thread"),
        "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision,
        describe(config.engine, accelerator.device) + describe_passes(config, accelerator.device, processes),
        batch,
        counted(batch // processes // steps, "image"),
        counted(processes, "process", "processes"),
        counted(steps, "step"),
    )
    if config.engine.lean and chosen(config.engine.backend, accelerator.device) == "triton":
        logger.info("the first steps wait for kernels to be compiled: up to a minute, once for a backbone and machine")


def start_tracker(accelerator: Accelerator, config: Config) -> None:
    """Open the tracker, with its files in the run's folder."""
    if config.tracker == "none":
        return
    os.environ.setdefault("TRACKIO_DIR", str(Path(config.output_dir) / "trackio"))
    options = {key: str(value) for key, value in flat(config.to_dict()).items()}  # no lists or nulls for tensorboard
    accelerator.init_trackers(TRACKED_AS, options, init_kwargs={"wandb": {"dir": config.output_dir}})


def check_tracker(tracker: str) -> None:
    """Raise unless the tracker's package is there.

    Raises:
        TinyTLError: With the command that installs it.
    """
    if tracker != "none" and find_spec(tracker) is None:
        raise TinyTLError(f"tracker={tracker}: not installed; run pip install 'tinytl-hf[{tracker}]'")
