"""What a run computes on: its accelerator and CPU threads, and what suits that device."""

from __future__ import annotations

import atexit
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import joblib
import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn

from tinytl_hf.errors import TinyTLError, first_line
from tinytl_hf.words import counted

logger = logging.getLogger(__name__)

LAUNCHED = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}  # set by `accelerate launch` and `torchrun`
# What tells a process that others work with it.
LAUNCHED_AS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# What `accelerate launch` sets for ways of training that runs do not have, and the values that stand for none of them.
NOT_SUPPORTED = {
    "ACCELERATE_DYNAMO_BACKEND": "torch.compile (--dynamo_backend)",
    "ACCELERATE_USE_FSDP": "FSDP (--use_fsdp)",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed (--use_deepspeed)",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM (--use_megatron_lm)",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config (--use_parallelism_config)",
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "SageMaker's distributed training",
}
NONE_OF_IT = {"", "no", "none", "false", "0", "off", "f", "n"}
PRECISIONS = ("no", "bf16", "fp16")
IN_USE = threading.Lock()  # held while a run trains, or an adapter is evaluated, in this process
NO_LIMIT = 2**60  # bytes; version 1 of control groups says no limit by a huge number
CPU_PIXELS = 2 * 224 * 224  # maps of so many pixels stay below 32 MB in the usual networks


@contextmanager
def alone_in_process() -> Iterator[None]:
    """Keep Accelerate's state and the random numbers, which are those of the process, to one run or evaluation.

    Raises:
        TinyTLError: Another one is at work.
    """
    if not IN_USE.acquire(blocking=False):
        raise TinyTLError(
            "another run trains, or evaluates, in this process, and the two would disturb each other; start a process"
        )
    try:
        yield
    finally:
        IN_USE.release()


def make_accelerator(
    mixed_precision: str | None, threads: int | None = None, accumulation_steps: int = 1, **options: Any
) -> Accelerator:
    """An accelerator for loaders whose batch size counts over all processes.

    Args:
        mixed_precision: ``no``, ``bf16``, ``fp16`` or what the launcher was told.
        threads: CPU threads of this process, as for :func:`set_threads`.
        accumulation_steps: Forward and backward passes an optimizer step, whatever the launcher was told.
        **options: More arguments of the accelerator.

    Raises:
        TinyTLError: A device that is not there, a precision that it does not have, a way of launching that runs do
            not have, or other processes that Accelerate does not count.
    """
    check_launch()
    if launched_processes() > 1 and not torch.accelerator.is_available():
        options["cpu"] = True  # untold, Accelerate would let each process train alone
    if is_told_cpu() and "LOCAL_RANK" in os.environ:
        # Accelerate's barriers name a GPU by the number of a process, be it on a CPU, and there may be fewer of them.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # What an earlier run in this process left, whose precision would hold for this one too.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    loader = DataLoaderConfiguration(split_batches=True)
    accumulation = GradientAccumulationPlugin(num_steps=accumulation_steps)
    try:
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            dataloader_config=loader,
            gradient_accumulation_plugin=accumulation,
            **options,
        )
    except (ValueError, RuntimeError, ImportError) as error:
        raise TinyTLError(f"Accelerate cannot start ({error}); see what its ACCELERATE_ variables say") from error
    _check_counts_all(accelerator)
    _check_device(accelerator.device)
    if accelerator.device.type == "cuda" and accelerator.device.index is not None:
        torch.cuda.set_device(accelerator.device)  # Accelerate does not, where a variable names the GPU
    set_threads(threads)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise TinyTLError("train.mixed_precision=fp16: a CPU would compute in fp32; use bf16 or no")
    return accelerator


def launched_processes() -> int:
    """How many processes a launcher says that there are; 1 where none says anything."""
    told = os.environ.get("WORLD_SIZE", "") if "LOCAL_RANK" in os.environ else ""
    return int(told) if told.isdecimal() else 1


def _check_counts_all(accelerator: Accelerator) -> None:
    """Raise unless Accelerate works with all processes that there are: norms and images would be shared with them."""
    in_group = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    processes = max(launched_processes(), in_group)
    if processes != accelerator.num_processes:
        raise TinyTLError(
            f"there are {processes} processes, and Accelerate counts {accelerator.num_processes}, so each would train "
            "alone: start them with `accelerate launch` or `torchrun`, on CPUs with ACCELERATE_USE_CPU=1, and make no "
            "Accelerator before torch.distributed is there"
        )


def _check_device(device: torch.device) -> None:
    """Raise unless this machine can compute there: Accelerate takes the device that a variable names as it is."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without that kind
        told = os.environ.get("ACCELERATE_TORCH_DEVICE")
        what = f"device {device}" if told is None else f"ACCELERATE_TORCH_DEVICE={told}"
        raise TinyTLError(
            f"{what}: cannot be used here ({first_line(error)}); ACCELERATE_TORCH_DEVICE=cpu takes the CPU"
        ) from error


def end_training(accelerator: Accelerator) -> None:
    """Close the trackers; the group of processes stays for another run of this one, and ends with it."""
    for tracker in accelerator.trackers:
        tracker.finish()
    atexit.register(_end_group)  # of several runs, the first call ends it and the others find none


def _end_group() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def precision_of(mixed_precision: str | None) -> str:
    """A run's precision, ``no``, ``bf16`` or ``fp16``: its option or, without one, what the launcher was told."""
    return mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()


def view_dtype(mixed_precision: str | None) -> torch.dtype:
    """What mixed precision turns the images of a network into, so that they need not lie there in fp32 until then."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision_of(mixed_precision), torch.float32)


def check_launch() -> None:
    """Raise if the launcher was told to train in a way that runs do not have.

    Raises:
        TinyTLError: It names the variable that `accelerate launch` set.
    """
    for name, what in NOT_SUPPORTED.items():
        value = os.environ.get(name, "")
        if value.lower() not in NONE_OF_IT:
            raise TinyTLError(
                f"{name}={value}: {what} is not supported; run `accelerate config` again without it, or unset {name}"
            )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision.lower() not in PRECISIONS:
        raise TinyTLError(f"ACCELERATE_MIXED_PRECISION={precision}: use {', '.join(PRECISIONS)}")


def forget_launch() -> None:
    """Let this process, and those that it starts, work alone: Accelerate would wait for the others of a launch."""
    for name in LAUNCHED_AS:
        os.environ.pop(name, None)


def say_what_launch_settings_do(mixed_precision: str | None, accumulation_steps: int) -> None:
    """Log which of the launcher's settings give way to options of the run."""
    told = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(accumulation_steps))
    if told != str(accumulation_steps):
        _say_not_used(
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", f"train.gradient_accumulation_steps={accumulation_steps}"
        )
    if "ACCELERATE_GRADIENT_CLIPPING" in os.environ:
        _say_not_used("ACCELERATE_GRADIENT_CLIPPING", "train.max_grad_norm")
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if mixed_precision is not None and told not in ("no", mixed_precision):
        _say_not_used("ACCELERATE_MIXED_PRECISION", f"train.mixed_precision={mixed_precision}")


def _say_not_used(variable: str, option: str) -> None:
    logger.info("%s=%s is not used: %s decides", variable, os.environ[variable], option)


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


def is_told_cpu() -> bool:
    """Whether Accelerate is told to use the CPU, even where there is a GPU."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() not in NONE_OF_IT


def device_of_figures() -> torch.device:
    """Where steps are measured, as a run is: where Accelerate is told to compute, or on CUDA if there is one.

    Raises:
        TinyTLError: It is told a device whose memory cannot be measured, or that is not here.
    """
    told = os.environ.get("ACCELERATE_TORCH_DEVICE")
    if told is None:
        return torch.device("cuda" if torch.cuda.is_available() and not is_told_cpu() else "cpu")
    kind, colon, index = told.partition(":")
    here, index = {"cpu": 1, "cuda": torch.cuda.device_count()}, index if colon else "0"
    if not index.isdecimal() or int(index) >= here.get(kind, 0):
        raise TinyTLError(
            f"ACCELERATE_TORCH_DEVICE={told}: steps are measured on the CPU and on CUDA, which has "
            f"{counted(here['cuda'], 'device')} here; ACCELERATE_TORCH_DEVICE=cpu takes the CPU"
        )
    return torch.device(told)


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
            f"{key}={batch_size}: must be a multiple of {parts} ({counted(processes, 'process', 'processes')} times "
            f"{counted(accumulation_steps, 'accumulation step')})"
        )


def memory_limit(root: Path = Path("/")) -> int | None:
    """The most memory that the container or control group of this process may use, in bytes; None: no limit.

    Args:
        root: Of the file system.
    """
    return min(_group_limits(root), default=None)


def _group_limits(root: Path) -> Iterator[int]:
    """Limits of this process's control groups, of versions 1 and 2, from its own up to the root."""
    own = root / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, limit = ("memory", "memory.limit_in_bytes") if controllers else ("", "memory.max")
        top = root / "sys/fs/cgroup" / mount
        lowest = top / name.lstrip("/")
        for group in (lowest, *lowest.parents):
            file = group / limit
            text = file.read_text().strip() if file.is_file() else "max"
            if text.isdecimal() and int(text) < NO_LIMIT:
                yield int(text)
            if group == top:
                break


def forward_in_parts(model: nn.Module, inputs: Tensor, pixels: int = CPU_PIXELS) -> Tensor:
    """Logits of a batch; on a CPU, of a few images at a time.

    Without gradients larger batches gain nothing there, and maps of more than 32 MB cost time: glibc hands such blocks
    back to the system after each layer, and gets the next one page by page.

    Args:
        model: Gives logits, without gradients.
        inputs: Images ``[N, 3, H, W]`` or features ``[N, C]``.
        pixels: How many of them, of all images of a part together, on a CPU.
    """
    if inputs.device.type != "cpu" or inputs.dim() == 2:
        return model(inputs)
    height, width = inputs.shape[-2:]
    return torch.cat([model(part) for part in inputs.split(max(1, pixels // (height * width)))])
