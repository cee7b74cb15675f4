"""The training loop, in Accelerate's own idiom: read ``train`` first, then what it calls."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tinytl_hf.adapter.format import TENSORS_FILE, read_tensors
from tinytl_hf.config.run import Config, flat
from tinytl_hf.device import alone_in_process, end_training, seconds_since, view_dtype
from tinytl_hf.disk import writing
from tinytl_hf.errors import Interrupted, TinyTLError
from tinytl_hf.measure.accuracy import compute_logits
from tinytl_hf.measure.metrics import compute_metrics
from tinytl_hf.measure.mistakes import save_mistakes
from tinytl_hf.measure.results import save_results
from tinytl_hf.reports import run_folder
from tinytl_hf.step import right_answers, training_view
from tinytl_hf.train import checkpoint, epoch_sums
from tinytl_hf.train.cached_features import drawn_view
from tinytl_hf.train.epoch_sums import EpochSums
from tinytl_hf.train.finish import draw_pictures, report_memory, save_adapters, write_card
from tinytl_hf.train.run import EvalSet, Run
from tinytl_hf.train.schedule import learning_rate
from tinytl_hf.train.start import set_up
from tinytl_hf.train.stop_signal import StopSignal
from tinytl_hf.words import counted

logger = logging.getLogger(__name__)

LOOK_EVERY = 10  # optimizer steps between two looks at the loss, each of which waits for the device


def train(config: Config) -> dict[str, Any]:
    """Train an adapter and leave everything about the run in ``config.output_dir``.

    In a thread other than the main one, no signal stops it. One run at a time: Accelerate's state and the random
    numbers are those of the process.

    Returns:
        The figures of the run's adapter on the evaluation set.

    Raises:
        TinyTLError: Bad config, data or weights, before training starts, or a loss that is not finite.
        Interrupted: SIGINT, SIGTERM or SIGHUP; a checkpoint was saved.
    """
    with alone_in_process(), ExitStack() as held:
        return train_to_the_end(set_up(config, held))


def train_to_the_end(run: Run) -> dict[str, Any]:
    """The epochs that are left, and what a run leaves behind; returns its figures."""
    config, accelerator, progress = run.config, run.accelerator, run.progress
    with StopSignal() as stop:
        while progress.epoch < config.train.plan.epochs and not has_stalled(run):
            train_epoch(run, stop)
            path = save_checkpoint(run)
            logits, labels = evaluate(run, run.evaluation, partial(stop_if_asked, run, stop, path))
            figures = compute_metrics(logits, labels, extra=run.metrics)
            finish_epoch(run, figures)
            stop_if_asked(run, stop, save_checkpoint(run))
    # The figures of a run are those of the file that it leaves behind.
    kept = Path(config.output_dir) / run_folder.ADAPTER
    run.model.load_adapter_tensors(read_tensors(kept), str(kept))
    results, logits, labels = final_figures(run)
    results["adapter_bytes"] = (kept / TENSORS_FILE).stat().st_size
    if accelerator.is_main_process:
        output, last = Path(config.output_dir), run.test or run.evaluation
        results_file = output / run_folder.RESULTS_FILE
        save_results(results_file, results, run.model, last.evaluated, accelerator, {"data": run.found})
        save_mistakes(output / run_folder.MISTAKES_FILE, logits, labels, last.images)
        draw_pictures(output, config)
        write_card(output, config)  # it reads what the run wrote
    if config.memory.report:
        report_memory(run)
    end_training(accelerator)
    return results


def train_epoch(run: Run, stop: StopSignal) -> None:
    """Train for what is left of the current epoch."""
    accelerator, options, progress = run.accelerator, run.config.train, run.progress
    run.batches.epoch = progress.epoch
    run.augment.set_epoch(progress.epoch)
    run.changes.set_epoch(progress.epoch)
    size = run.config.train_size_in(progress.epoch)
    run.prepared.train()
    loader = run.train_loader
    if progress.batch:
        loader = accelerator.skip_first_batches(loader, progress.batch)
    sums = EpochSums(run.batches.batches, accelerator.device, progress.sums, accelerator.process_index)
    start, seconds_before = time.perf_counter(), progress.seconds

    def note_progress() -> None:
        progress.sums = accelerator.gather(sums.parts[None]).tolist()
        progress.seconds = seconds_before + seconds_since(start, accelerator.device)

    with progress_bar(run) as bar:
        for batch in loader:
            with accelerator.accumulate(run.prepared):
                logits = run.passes(augmented(run, batch, size))
                loss = run.loss(logits, batch, size, run.changes)
                accelerator.backward(loss)
                if accelerator.sync_gradients and options.max_grad_norm is not None:
                    accelerator.clip_grad_norm_(run.model.trainable_parameters(), options.max_grad_norm)
                progress.learning_rate = learning_rate(run.scheduler.scheduler, options)
                run.optimizer.step()
                run.scheduler.step()
                run.optimizer.zero_grad()
            sums.add(progress.batch, loss, right_answers(logits, batch, size, run.changes))
            progress.batch += 1
            bar.update(run.batches.batch_size)
            if accelerator.sync_gradients:
                progress.step += 1
                progress.overflows += run.optimizer.step_was_skipped
                run.time_left.after_step(progress.epoch, progress.batch / run.batches.batches)
                if progress.step % LOOK_EVERY == 0:
                    show_progress(run, bar, loss.item(), sums)
                due = options.checkpoint_every > 0 and progress.step % options.checkpoint_every == 0
                if due or (looks_for_signals(run) and stop.received(accelerator)):
                    note_progress()
                    stop_if_asked(run, stop, save_checkpoint(run))
    note_progress()


def has_stalled(run: Run) -> bool:
    """Whether the last ``train.patience`` epochs brought no better accuracy; says so."""
    patience, since = run.config.train.patience, run.progress.epochs_since_best
    if patience is None or since < patience:
        return False
    spread, epochs = run.config.spans_epochs, run.config.train.plan.epochs
    planned = f"; of {counted(epochs, 'epoch')}, which {' and '.join(spread)} would span" if spread else ""
    stopped = "stopped after epoch %d: no better accuracy in %s%s"
    logger.info(stopped, run.progress.epoch, counted(since, "epoch"), planned)
    return True


def save_checkpoint(run: Run) -> Path:
    """Write a checkpoint, unless this run has gone wrong: then the last good one stays."""
    if not np.isfinite(run.progress.sums).all() or not all_finite(run.model.adapter_tensors().values()):
        raise_not_finite(run)
    return checkpoint.save(run.accelerator, run.config, run.progress, run.hashes)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all values are numbers and not infinite; waits for the device once."""
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


def looks_for_signals(run: Run) -> bool:
    """Whether this step asks for signals: several processes on GPUs have to wait for the device to agree."""
    accelerator = run.accelerator
    cheap = accelerator.num_processes == 1 or accelerator.device.type == "cpu"
    return cheap or run.progress.step % LOOK_EVERY == 0


def augmented(run: Run, batch: dict[str, Tensor], size: int) -> Tensor:
    """What the network gets of a batch of pixels at this image size, or the features of one of its views."""
    if "features" in batch:
        return drawn_view(batch, run.augment)
    dtype = view_dtype(run.accelerator.mixed_precision)
    return training_view(run.model, batch, run.augment, size, run.changes, dtype)


def evaluate(run: Run, split: EvalSet, after_batch: Callable[[], None] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of a split."""
    return compute_logits(run.accelerator, run.prepared, split.loader, run.model, after_batch)


def final_figures(run: Run) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Figures of the run's adapter with logits and labels: of the test split if another one chose the epoch.

    Those of the split that the epoch was chosen by are then beside them, in ``selection``.
    """
    chosen_on = run.evaluation.evaluated
    logits, labels = evaluate(run, run.evaluation)
    figures = compute_metrics(logits, labels, tables=True, extra=run.metrics)
    epochs = run.config.train.plan.epochs
    ended_early = run.progress.epoch < epochs  # by train.patience
    is_chosen = ended_early or (run.config.adapter.keep == "best" and epochs > 1)
    more: dict[str, Any] = {"best_epoch_chosen_on": chosen_on.split if is_chosen else None}
    if run.test is not None:
        selection = {"split": chosen_on.split, "n": chosen_on.n, "sha256": chosen_on.sha256}
        more["selection"] = selection | {name: value for name, value in figures.items() if isinstance(value, float)}
        logits, labels = evaluate(run, run.test)
        figures = compute_metrics(logits, labels, tables=True, extra=run.metrics)
    return {**figures, **more}, logits, labels


def finish_epoch(run: Run, figures: dict[str, float]) -> None:
    """Write the epoch's figures and adapters, and turn to the next."""
    config, progress = run.config, run.progress
    images = run.batches.batches * run.batches.batch_size
    train_figures = {**epoch_sums.figures(progress.sums), "images_per_second": images / progress.seconds}
    if run.accelerator.scaler is not None:
        train_figures["overflow_steps"] = progress.overflows
    line = {
        "epoch": progress.epoch + 1,
        "step": progress.step,
        "lr": progress.learning_rate,
        "seconds": progress.seconds,
        "train": train_figures,
        "eval": figures,
    }
    with writing(f"tracker={config.tracker}", "make room and go on with --train.resume auto"):
        run.accelerator.log(flat(line), step=progress.epoch + 1)
    is_best = figures["accuracy"] > progress.best_accuracy
    kept = [run_folder.ADAPTER] if is_best or config.adapter.keep == "last" else []
    save_adapters(run.model, config, run.record, [run_folder.LAST_ADAPTER, *kept], run.accelerator, figures)
    if run.accelerator.is_main_process:
        line["train_curve"] = epoch_sums.curve(progress.sums)
        if config.spans_epochs:
            line["of_epochs"] = config.train.plan.epochs  # which a resumed run can have changed
        run_folder.append_metrics(Path(config.output_dir), line)
    logger.info(
        "epoch %d: train loss %.3f, accuracy %.4f, %.0f images/s; eval loss %.3f, accuracy %.4f%s%s",
        progress.epoch + 1,
        train_figures["loss"],
        train_figures["accuracy"],
        train_figures["images_per_second"],
        figures["loss"],
        figures["accuracy"],
        " (best)" if is_best else "",
        run.time_left.after_epoch(progress.epoch),
    )
    progress.next_epoch(figures["accuracy"])


def progress_bar(run: Run) -> tqdm:
    """A bar of the current epoch, on the main process."""
    return tqdm(
        total=run.batches.batches * run.batches.batch_size,
        initial=run.progress.batch * run.batches.batch_size,
        desc=f"epoch {run.progress.epoch + 1}/{run.config.train.plan.epochs}",
        unit="img",
        disable=not run.accelerator.is_main_process,
        mininterval=1,
    )


def show_progress(run: Run, bar: tqdm, loss: float, sums: EpochSums) -> None:
    """Show the loss of the last batch and the accuracy of the epoch so far (of this process)."""
    if not math.isfinite(loss):
        raise_not_finite(run)
    bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{sums.accuracy():.4f}", refresh=False)


def raise_not_finite(run: Run) -> None:
    """End a run whose loss is infinite or not a number; what it saved before stays.

    Raises:
        TinyTLError: Always.
    """
    output = run.config.output_dir
    kept = checkpoint.list_checkpoints(Path(output) / run_folder.CHECKPOINTS)
    rate = learning_rate(run.scheduler.scheduler, run.config.train)
    raise TinyTLError(
        f"the loss is not finite at step {run.progress.step} (lr {rate:.2g}); use a "
        f"lower --train.lr or --train.max_grad_norm 1{f', the last good state is in {output}' if kept else ''}"
    )


def stop_if_asked(run: Run, stop: StopSignal, path: Path) -> None:
    """End the run if a signal came; the checkpoint at ``path`` is of this moment."""
    if signum := stop.received(run.accelerator):
        end_training(run.accelerator)
        raise Interrupted(signum, f"stopped at step {run.progress.step}: --train.resume auto goes on from {path}")
