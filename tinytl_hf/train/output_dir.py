"""``output_dir``: checked before a run starts, and made ready when it does.

Only what a run wrote is ever removed or replaced. A folder counts as a run's if a run wrote its ``config.yaml``.
Every other file in it whose name a run also uses is checked before anything is changed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from tinytl_hf.adapter.format import CARD_FILE, TENSORS_FILE, read_config, read_tensors
from tinytl_hf.adapter.format import CONFIG_FILE as ADAPTER_CONFIG_FILE
from tinytl_hf.config.run import Config, flat, with_new_names
from tinytl_hf.config.yaml12 import load_yaml
from tinytl_hf.disk import local_path, write_text, write_together, writing
from tinytl_hf.errors import TinyTLError
from tinytl_hf.hub.card import ADAPTER_FILES, is_untouched, read_card
from tinytl_hf.reports.run_folder import (
    ADAPTER,
    CHECKPOINTS,
    CONFIG_FILE,
    LAST_ADAPTER,
    MEMORY_FILE,
    METRICS_FILE,
    MISTAKES_FILE,
    PAGE_FILE,
    PAGE_MARK,
    RESULTS_FILE,
    read_metrics,
)
from tinytl_hf.train.checkpoint import MAY_DIFFER, check_newest, is_of, list_checkpoints
from tinytl_hf.words import counted

logger = logging.getLogger(__name__)

# Every config.yaml that a run wrote has all of these; one that was written by hand rarely does.
GROUPS = {"backbone", "lite", "head", "data", "train", "memory", "adapter", "hub"}
OPTIONS = {*GROUPS, "output_dir", "overwrite", "seed", "method", "tracker", "metrics"}
# The same of its JSON files: a key that each of them has.
KEYS = {RESULTS_FILE: "tinytl_hf_version", MISTAKES_FILE: "shown", MEMORY_FILE: "rows"}
LOCK_FILE = ".lock"  # while a run is at work
SEEN_WITHIN = 60.0  # seconds: a network's file system may remember for a while that a file was not there
TRACKED_AS = "tinytl_hf"  # what trackers call the project, and TensorBoard its folder
NAMES = (CONFIG_FILE, METRICS_FILE, *KEYS, ADAPTER, LAST_ADAPTER, CHECKPOINTS)


def check_free(config: Config) -> None:
    """Raise if ``output_dir`` holds a run that this one would destroy, or files that are no run's.

    Raises:
        TinyTLError: With what is in the way, and the ways out.
    """
    output, resume = Path(config.output_dir), config.train.resume
    _check_can_be_a_folder(output)
    if others := _others(output):
        raise TinyTLError(
            f"output_dir={output}: holds {', '.join(others)}, which no run of tinytl-hf wrote, or not as it is now; "
            "choose another folder, or move that away"
        )
    if config.overwrite or not (output / CONFIG_FILE).exists():
        return
    if resume == "auto" and (list_checkpoints(output / CHECKPOINTS) or _has_just_started(output, config)):
        return  # its checkpoints are compared with this run when they are read
    if resume not in ("auto", "never") and output.resolve() in local_path(resume).parents:
        return
    raise TinyTLError(
        f"output_dir={output}: holds a run already; choose another, go on with --train.resume auto, or replace "
        "it with --overwrite true"
    )


def _check_can_be_a_folder(output: Path) -> None:
    """Raise if it, or what it lies in, is a file or a link that leads nowhere: no folder can be made there."""
    for place in (output, *output.parents):
        if place.is_dir():
            return
        if place.is_symlink() or place.exists():
            what = "is a file" if place.exists() else "is a link that leads nowhere"
            raise TinyTLError(f"output_dir={output}: {'' if place == output else f'{place} '}{what}; choose a folder")


def check_keeps_init(config: Config) -> None:
    """Raise if the adapter that a run goes on from lies in the folder that the run replaces.

    Raises:
        TinyTLError: With another way.
    """
    init, output = config.adapter.init, local_path(config.output_dir)
    replaced = (output, output / ADAPTER, output / LAST_ADAPTER)
    if init is not None and local_path(init) in replaced and local_path(init).exists():
        raise TinyTLError(
            f"adapter.init={init}: lies in output_dir={config.output_dir}, which this run replaces; choose another "
            "--output_dir"
        )


@contextmanager
def claimed(config: Config, resume_from: Path | None = None) -> Iterator[None]:
    """Keep a run's folder to one run, whichever process and machine the other is of.

    Args:
        config: The run.
        resume_from: The checkpoint that it is to go on from.

    Raises:
        TinyTLError: Another run is at work there, or was while this one was set up; or the folder cannot be written.
    """
    output = Path(config.output_dir)
    lock = FileLock(output / LOCK_FILE)
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise TinyTLError(f"output_dir={output}: another run is at work in it; choose another, or wait") from error
    except OSError as error:
        raise TinyTLError(f"output_dir={output}: cannot be written ({error}); choose another") from error
    try:
        check_free(config)
        check_newest(config, resume_from)
        yield
    finally:
        with suppress(OSError):  # where an open file cannot be removed, it stays and hurts nobody
            (output / LOCK_FILE).unlink()
        lock.release()


def has_adapter_of_later_epoch(folder: Path, config: Config, epochs_done: int) -> bool:
    """Whether the adapter in a run's folder is of an epoch after the checkpoint that a run goes on from."""
    lines = read_metrics(folder)
    done = [line["eval"]["accuracy"] for line in lines if line["epoch"] <= epochs_done]
    later = [line["eval"]["accuracy"] for line in lines if line["epoch"] > epochs_done]
    return bool(later) and (config.adapter.keep == "last" or max(later) > max(done, default=-1.0))


def make_ready(config: Config, resume_from: Path | None, epochs_done: int) -> None:
    """Write the config, and clear what a former run left.

    Args:
        config: The run.
        resume_from: The checkpoint that it goes on from. Of a run that goes on in its own folder, what came after that
            checkpoint is cleared; of any other run in the folder, everything.
        epochs_done: Epochs that are complete at that checkpoint.

    Raises:
        TinyTLError: The folder cannot be written.
    """
    output = Path(config.output_dir)
    goes_on = resume_from is not None and is_of(resume_from, output)
    with writing(f"output_dir={output}", "choose another"):
        output.mkdir(parents=True, exist_ok=True)
        # Those of the run that goes on, in this folder or out of another.
        former = output if goes_on else run_of(resume_from)
        before = [] if former is None else read_metrics(former)
        lines = [line for line in before if line["epoch"] <= epochs_done]
        if missing := epochs_done - len(lines):
            logger.warning(
                "output_dir=%s: %s lacks %d of the %s done; curves and training time are of the rest",
                *(output, METRICS_FILE, missing, counted(epochs_done, "epoch")),
            )
        for path in list_checkpoints(output / CHECKPOINTS):
            if not goes_on or (resume_from is not None and path.name > resume_from.name):
                shutil.rmtree(path)
        if not goes_on:
            _remove_adapter(output / ADAPTER)
            _remove_adapter(output / LAST_ADAPTER)
            _remove_curves(output / TRACKED_AS)
        for name in KEYS:
            (output / name).unlink(missing_ok=True)
        _remove_page(output / PAGE_FILE)
        # Written first: the other files count as a run's only beside it. To replace a run was allowed this once.
        replace(config, overwrite=False).save(output / CONFIG_FILE)
        write_text(output / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in lines))


def check_is_shared(file: Path) -> None:
    """Wait for what the first process wrote or found, which another machine that has the folder, too, sees in time.

    Raises:
        TinyTLError: It is not there.
    """
    end = time.monotonic() + SEEN_WITHIN
    while not file.exists():
        if time.monotonic() > end:
            raise TinyTLError(
                f"{file}: is there for the first process, and not for this one; let all machines share output_dir"
            )
        time.sleep(0.1)


def run_of(checkpoint: Path | None) -> Path | None:
    """The folder of the run that wrote a checkpoint; None: the checkpoint lies in none, as a copy may."""
    if checkpoint is None or checkpoint.resolve().parent.name != CHECKPOINTS:
        return None
    folder = checkpoint.resolve().parents[1]
    return folder if (folder / CONFIG_FILE).is_file() and not _others(folder) else None


def has_whole_adapter(output: Path) -> bool:
    """Whether a run's folder has its adapter; says so where there is one that cannot be read."""
    folder = output / ADAPTER
    try:
        read_config(folder)
        read_tensors(folder)
    except TinyTLError as error:
        if folder.exists():
            logger.warning("%s: that of the checkpoint takes its place", error)
        return False
    return True


def copy_best(config: Config, resume_from: Path, epochs_done: int) -> None:
    """Bring the best adapter so far into the folder of a run that goes on from a checkpoint of another folder."""
    former, output = run_of(resume_from), Path(config.output_dir)
    if former is None or (output / ADAPTER).exists() or has_adapter_of_later_epoch(former, config, epochs_done):
        return
    if read_metrics(former) and _is_adapter(former / ADAPTER):
        names = (ADAPTER_CONFIG_FILE, TENSORS_FILE)
        write_together({output / ADAPTER / name: (former / ADAPTER / name).read_bytes() for name in names})


def _others(output: Path) -> list[str]:
    """Names that a run would write, that exist in ``output`` already, and that no run wrote."""
    present = [name for name in NAMES if os.path.lexists(output / name)]
    values = _read(output / CONFIG_FILE)
    if values.keys() >= OPTIONS and all(isinstance(values[group], dict) for group in GROUPS):
        return [name for name in present if not _is_of_a_run(output / name)]
    return present


def _is_of_a_run(path: Path) -> bool:
    if path.name == METRICS_FILE:
        return _has_metrics(path.parent)
    if path.name in (ADAPTER, LAST_ADAPTER):
        return _is_adapter(path)
    if path.name in KEYS:
        return KEYS[path.name] in _read(path)
    return path.name == CONFIG_FILE or path.is_dir()


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; an empty one if there is none."""
    try:
        text = path.read_text(encoding="utf-8")
        values = load_yaml(text) if path.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _has_metrics(output: Path) -> bool:
    try:
        lines = read_metrics(output)
        return all(isinstance(line["epoch"], int) and line["eval"]["accuracy"] >= 0 for line in lines)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter of ours, or the part of one that a kill left."""
    if folder.is_symlink() or not folder.is_dir():  # what a link leads to was put there by a person
        return False
    config = folder / ADAPTER_CONFIG_FILE
    if config.exists():
        return "format_version" in _read(config)
    return all(file.name.removeprefix(".").removesuffix(".tmp") in ADAPTER_FILES for file in folder.iterdir())


def _remove_adapter(folder: Path) -> None:
    """Remove an adapter's own files, and the folder if nothing else is in it; a card that a person edited stays."""
    if not folder.is_dir():
        return
    for name in ADAPTER_FILES:
        if name != CARD_FILE or is_untouched(read_card(folder) or ""):
            (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _remove_page(page: Path) -> None:
    """Remove the page of the run as it was, which says what no longer holds; a file of somebody else's stays."""
    if page.is_file() and PAGE_MARK.encode() in page.read_bytes():
        page.unlink()


def _remove_curves(folder: Path) -> None:
    """Remove TensorBoard's files, out of which it would draw the former run's curves into those of this one."""
    if not folder.is_symlink():
        for path in folder.rglob("events.out.tfevents.*"):
            path.unlink()


def _has_just_started(output: Path, config: Config) -> bool:
    """Whether a run that has finished no epoch yet was started with this config."""
    if read_metrics(output):
        return False
    now = flat(config.to_dict())
    before = {**flat(Config().to_dict()), **with_new_names(flat(_read(output / CONFIG_FILE)))}
    return all(before.get(key) == now[key] for key in now.keys() - MAY_DIFFER)
