"""Checkpoints that hold what a run changes: deltas, optimizer, schedule, scaler, random states and position.

The frozen backbone is not in them, only its hash. A checkpoint appears whole or not at all, and what happens
to its files later shows: ``SHA256SUMS`` lists their hashes, as ``sha256sum -c`` reads them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils.other import load as load_states
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from tinytl_hf.adapter.record import InitRecord
from tinytl_hf.config.run import Config, flat, with_new_names
from tinytl_hf.data.sets import has_hash
from tinytl_hf.data.split import Split
from tinytl_hf.disk import check_is_file, expanded, sync
from tinytl_hf.errors import TinyTLError, first_line
from tinytl_hf.model import TinyTLModel
from tinytl_hf.reports.run_folder import CHECKPOINTS
from tinytl_hf.train import epoch_sums
from tinytl_hf.train.progress import PROGRESS_FILE, Progress, read_progress, read_record

logger = logging.getLogger(__name__)

DELTA_FILE = "delta.safetensors"
RANDOM_STATES = "random_states_{}.pkl"  # of each process
SUMS_FILE = "SHA256SUMS"
HASHED_AT_ONCE = 2**20  # bytes
NAME = re.compile(r"step_\d{8,}_epoch_\d{4,}")
MAY_DIFFER = {  # options that a resumed run may set differently
    "data.dataset",  # where it lies; that it is the same is known by its hash
    "backbone.weights",  # likewise
    "adapter.init",  # what was taken from it is in the checkpoint
    "adapter.dtype",
    "data.memory_limit_mb",
    "data.workers",
    "hub.private",
    "hub.push",
    "hub.repo",
    "memory.backend",
    "memory.budget_mb",
    "memory.cuda_graph",
    "memory.lean",
    "memory.report",
    "memory.slice_mb",
    "metrics",
    "output_dir",
    "overwrite",
    "tracker",
    "train.checkpoint_every",
    "train.epochs",
    "train.gradient_checkpointing",
    "train.keep_checkpoints",
    "train.mixed_precision",
    "train.patience",
    "train.resume",
    "train.threads",
}


def register(accelerator: Accelerator, model: TinyTLModel) -> None:
    """Make ``save_state`` and ``load_state`` handle the delta in place of the whole model."""

    def save_delta(_: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        if accelerator.is_main_process:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in model.adapter_tensors().items()}
            save_file(tensors, Path(folder) / DELTA_FILE)
        weights.clear()  # what is left in the list, Accelerate would save besides

    def load_delta(models: list[nn.Module], folder: str) -> None:
        path = Path(folder) / DELTA_FILE
        model.load_adapter_tensors(load_file(path), str(path))
        models.clear()  # as there: it would look for their whole weights

    accelerator.register_save_state_pre_hook(save_delta)
    accelerator.register_load_state_pre_hook(load_delta)


def save(accelerator: Accelerator, config: Config, progress: Progress, hashes: dict[str, str | None]) -> Path:
    """Write a checkpoint of this moment and remove those beyond ``keep_checkpoints``.

    Args:
        accelerator: What holds the states.
        config: The run's config.
        progress: How far it is.
        hashes: Of the frozen backbone and of the data: what a resumed run must have too.

    Raises:
        TinyTLError: The disk is full or the folder cannot be written; the checkpoints before stay.
    """
    folder = Path(config.output_dir) / CHECKPOINTS
    final = folder / f"step_{progress.step:08d}_epoch_{progress.epoch:04d}"
    temporary = folder / f".{final.name}.tmp"
    if final.exists() and find_damage(final) is None and read_record(final)["progress"]["batch"] == progress.batch:
        return final  # the run goes on from it and has not moved since: there is no moment without it
    try:
        if accelerator.is_main_process:
            folder.mkdir(exist_ok=True)  # not the run's folder: one that was taken away would be half of a run
            _remove_unfinished(folder)
            temporary.mkdir()
        accelerator.wait_for_everyone()
        _save_state(accelerator, temporary)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            run = {**flat(config.to_dict()), "processes": accelerator.num_processes, **hashes}
            record = json.dumps({"progress": asdict(progress), "run": run}, indent=2)
            (temporary / PROGRESS_FILE).write_text(record, encoding="utf-8")
            _seal(temporary)
            if final.exists():  # damaged, or of the time before a resume from an earlier one
                final.replace(folder / f".{final.name}.old")
            temporary.replace(final)
            sync(folder)
            for old in list_checkpoints(folder)[: -config.train.keep_checkpoints]:
                shutil.rmtree(old)
    except BaseException as error:  # a second Ctrl-C, too
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        again = "go on from the one before with --train.resume auto" if list_checkpoints(folder) else "start it again"
        fix = f"make room and {again}" if Path(config.output_dir).is_dir() else "the folder is gone"
        what = f"the checkpoint of step {progress.step} cannot be written"
        raise TinyTLError(f"output_dir={config.output_dir}: {what} ({error}); {fix}") from error
    accelerator.wait_for_everyone()
    return final


def find(config: Config) -> Path | None:
    """The checkpoint that ``train.resume`` asks for, if any; says which of its settings the run goes on without.

    Raises:
        TinyTLError: It names a folder that is no checkpoint, a damaged one, or one of another kind of run.
    """
    if config.train.resume == "never":
        return None
    if config.train.resume == "auto":
        path = _newest_whole(Path(config.output_dir) / CHECKPOINTS)
        if path is None:
            logger.info("train.resume=auto: there is no checkpoint in %s, so the run starts", config.output_dir)
    else:
        path = expanded(config.train.resume)
        if not (path / PROGRESS_FILE).is_file():
            raise TinyTLError(f"train.resume={path}: not a checkpoint; use auto, never or a checkpoint's folder")
        if damage := find_damage(path):
            raise TinyTLError(f"train.resume={path}: damaged ({damage}); use another checkpoint, or auto")
    if path is not None:
        _check_same(path, flat(config.to_dict()))
        done = read_record(path)["progress"]["epoch"]
        if config.train.epochs is not None and config.train.epochs < done:
            raise TinyTLError(f"train.epochs={config.train.epochs}: {path} has {done} already; use {done} or more")
        _say_what_changes(path, config)
    return path


def check_newest(config: Config, resume_from: Path | None) -> None:
    """Raise if the checkpoint to go on from is gone or no longer the newest: another run was at work in the meantime.

    Args:
        config: The run, whose folder nobody else works in any more.
        resume_from: What :func:`find` gave before that.

    Raises:
        TinyTLError: Going on would clear what the other run has done since.
    """
    output = Path(config.output_dir)
    there = [path for path in list_checkpoints(output / CHECKPOINTS) if config.train.resume == "auto"]
    since = [path for path in there if resume_from is None or path.name > resume_from.name]
    is_gone = resume_from is not None and find_damage(resume_from) is not None
    if is_gone or any(find_damage(path) is None for path in since):
        raise TinyTLError(f"output_dir={output}: another run went on in it while this one was set up; start it again")


def load(accelerator: Accelerator, path: Path, hashes: dict[str, str | None]) -> Progress:
    """Bring model, optimizer, schedule, scaler and random states back to the checkpoint at ``path``.

    Nothing in it is unpickled but tensors and numbers (``torch.load(weights_only=True)``).

    Raises:
        TinyTLError: It was made with another backbone or other data, or holds something else.
    """
    _check_same(path, hashes)
    try:
        progress = read_progress(path)
        accelerator.load_state(str(path))
        if progress.init is not None:
            InitRecord(**progress.init)
        if progress.sums and len(progress.sums) != accelerator.num_processes:
            progress.sums = epoch_sums.shared_out(progress.sums, accelerator.num_processes)
        if not (path / RANDOM_STATES.format(accelerator.process_index)).exists():
            _take_random_state(path / RANDOM_STATES.format(0))  # all processes draw the same numbers
        return progress
    except TinyTLError:
        raise
    except Exception as error:  # a damaged pickle can make torch raise almost anything
        raise TinyTLError(f"checkpoint {path} cannot be read ({first_line(error)}); resume from another") from error


def hash_of(split: Split, now: str | None, key: str, path: Path | None) -> str | None:
    """A split's hash ``now``, or the one that the checkpoint at ``path`` has under ``key``, if it is of that split."""
    recorded = None if path is None else read_record(path).get("run", {}).get(key)
    return now if recorded in (None, now) or not has_hash(split, recorded) else recorded


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, oldest first; folders that others made are none."""
    return sorted(path for path in folder.glob("step_*") if NAME.fullmatch(path.name) and path.is_dir())


def is_of(path: Path, output: Path) -> bool:
    """Whether a checkpoint lies in the folder of a run where the run put it."""
    return path.resolve().parent == (output / CHECKPOINTS).resolve()


def find_damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    try:
        lines = (path / SUMS_FILE).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        names = _file_names(path)
        if unlisted := [name for name in names if name not in sums]:
            return f"{SUMS_FILE} does not list {unlisted[0]}"
        if missing := [name for name in sums if name not in names]:
            return f"{missing[0]} is missing"
        return next((f"{name} was changed" for name in names if _sha256(path / name) != sums[name]), None)
    except (OSError, ValueError) as error:
        return f"{SUMS_FILE}: {error}"


def _newest_whole(folder: Path) -> Path | None:
    paths = list_checkpoints(folder)
    for path in reversed(paths):
        damage = find_damage(path)
        if damage is None:
            return path
        logger.warning("checkpoint %s is damaged (%s): left out, for the one before it", path, damage)
    if paths:
        raise TinyTLError(
            f"train.resume=auto: no checkpoint in {folder} is whole; start again with --overwrite true "
            "--train.resume never"
        )
    return None


def _remove_unfinished(folder: Path) -> None:
    """Remove what a kill left of checkpoints that have not got their names yet, or have lost them."""
    for left_over in folder.glob(".step_*"):
        if NAME.fullmatch(left_over.stem[1:]):
            shutil.rmtree(left_over)


def _save_state(accelerator: Accelerator, folder: Path) -> None:
    try:
        accelerator.save_state(str(folder))
    except SafetensorError as error:
        raise OSError(str(error)) from error
    except RuntimeError as error:  # torch's for a file that stayed shorter than it should be
        free = shutil.disk_usage(folder).free
        raise OSError(f"a file of it stayed incomplete; {free / 1e6:.1f} MB are free") from error


def _seal(folder: Path) -> None:
    """List the files' hashes, and wait until everything is on the disk."""
    names = _file_names(folder)
    (folder / SUMS_FILE).write_text("".join(f"{_sha256(folder / n)}  {n}\n" for n in names), encoding="utf-8")
    for name in (*names, SUMS_FILE):
        sync(folder / name)
    sync(folder)


def _file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != SUMS_FILE)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    check_is_file(path)
    with path.open("rb") as file:
        while piece := file.read(HASHED_AT_ONCE):
            digest.update(piece)
    return digest.hexdigest()


def _check_same(path: Path, now: dict[str, Any]) -> None:
    # An option that the checkpoint does not have was added later; its default is what runs did before.
    # Earlier ones do not say the precision either, and are taken to have this one.
    said = with_new_names(read_record(path).get("run", {}))
    before = {**flat(Config().to_dict()), "precision": now.get("precision"), **said}
    for key, value in now.items():
        was = before.get(key)
        if key in MAY_DIFFER or was == value:
            continue
        name, fix = f"{key}={value}", "use that"
        if key == "train.gradient_accumulation_steps" and (budget := now["memory.budget_mb"]) is not None:
            name = f"memory.budget_mb={budget:g} takes {name}"  # which nobody named
            fix = f"use --memory.budget_mb null --{key} {was}"
        raise TinyTLError(f"{name}: the checkpoint {path} was made with {was}; {fix}, or another --output_dir")


def _say_what_changes(path: Path, config: Config) -> None:
    """Log what goes on otherwise than it began, though the run may go on."""
    before, now = with_new_names(read_record(path).get("run", {})), flat(config.to_dict())
    epochs = before.get("train.epochs", config.train.epochs)
    if epochs != config.train.epochs and (spread := config.spans_epochs):
        logger.info(
            "train.epochs=%s in place of %s: %s now %s that many, so the run goes on elsewhere on its curve",
            *(config.train.epochs, epochs, " and ".join(spread), "spans" if len(spread) == 1 else "span"),
        )
    hashes = {"processes", "backbone.sha256", "data.train_sha256", "data.eval_sha256", "precision"}
    if unknown := sorted(before.keys() - now.keys() - hashes):
        logger.warning("checkpoint %s: options that are not known here: %s", path, ", ".join(unknown))


def _take_random_state(file: Path) -> None:
    """Draw from here on what the process of this file would have drawn."""
    states = load_states(file)
    random.setstate(states["random_state"])
    np.random.set_state(states["numpy_random_seed"])
    torch.set_rng_state(states["torch_manual_seed"])
    if torch.cuda.is_available() and "torch_cuda_manual_seed" in states:  # else it was made where there is no GPU
        torch.cuda.set_rng_state(states["torch_cuda_manual_seed"][0])  # of the device that the process used
