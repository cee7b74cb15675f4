"""What a run computes on: its accelerator and CPU threads, and what suits that device."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

import joblib
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch import Tensor, nn

from tinytl_hf.errors import TinyTLError

LAUNCHED = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}  # set by `accelerate launch` and `torchrun`
CPU_PIXELS = 2 * 224 * 224  # maps of so many pixels stay below 32 MB in the usual networks


def make_accelerator(mixed_precision: str | None, threads: int | None = None, **options: Any) -> Accelerator:
    """An accelerator for loaders whose batch size counts over all processes.

    Args:
        mixed_precision: ``no``, ``bf16``, ``fp16`` or what the launcher was told.
        threads: CPU threads of this process, as for :func:`set_threads`.
        **options: More arguments of the accelerator.

    Raises:
        TinyTLError: A precision that the device does not have.
    """
    loader = DataLoaderConfiguration(split_batches=True)
    accelerator = Accelerator(mixed_precision=mixed_precision, dataloader_config=loader, **options)
    set_threads(threads)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise TinyTLError("train.mixed_precision=fp16: a CPU would train in fp32; use bf16 or no")
    return accelerator


def set_threads(threads: int | None) -> None:
    """Give this process so many CPU threads.

    Args:
        threads: None for what OMP_NUM_THREADS says or, where that is not set, this process's share of the cores that
            it may use: those of its affinity mask and its container. A 1 that a launcher may have set counts as not
            set.
    """
    told = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if told == "1" and LAUNCHED & os.environ.keys():
        told = ""  # launchers set it to 1 where the user said nothing
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    share = int(told) if told.isdecimal() and int(told) > 0 else max(1, joblib.cpu_count() // processes_here)
    torch.set_num_threads(threads or share)


def device_name(accelerator: Accelerator) -> str:
    """The GPU's name, or the machine's kind of processor."""
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_name(accelerator.device)
    return f"{accelerator.device.type} ({platform.machine()})"


def wait_for_device(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given: a clock that is read before that tells nothing of its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds_since(start: float, device: torch.device) -> float:
    """Seconds from ``start`` (of ``time.perf_counter``) until the device has done all that it was given."""
    wait_for_device(device)
    return time.perf_counter() - start


def check_divides(batch_size: int, key: str, processes: int, accumulation_steps: int = 1) -> None:
    """Raise unless a global batch splits evenly over processes and accumulation steps."""
    parts = processes * accumulation_steps
    if batch_size % parts:
        raise TinyTLError(
            f"{key}={batch_size}: must be a multiple of {parts} ({processes} processes times "
            f"{accumulation_steps} accumulation steps)"
        )


def forward_in_parts(model: nn.Module, inputs: Tensor) -> Tensor:
    """Logits of a batch; on a CPU, of a few images at a time.

    Without gradients larger batches gain nothing there, and maps of more than 32 MB cost time: glibc hands such blocks
    back to the system after each layer, and gets the next one page by page.

    Args:
        model: Gives logits, without gradients.
        inputs: Images ``[N, 3, H, W]`` or features ``[N, C]``.
    """
    if inputs.device.type != "cpu" or inputs.dim() == 2:
        return model(inputs)
    height, width = inputs.shape[-2:]
    return torch.cat([model(part) for part in inputs.split(max(1, CPU_PIXELS // (height * width)))])
