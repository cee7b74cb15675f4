"""One real training step of a run, in a process of its own: what it takes, as a run's memory.json has it.

The step is that of :mod:`~tinytl_hf.measure.measured_step`. Of many accumulated passes two are taken: all after the
first take the same.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext

import torch
from torch import Tensor

from tinytl_hf.config.run import Config
from tinytl_hf.device import forget_launch, forward_in_parts, seconds_since
from tinytl_hf.lean.evaluation import evaluated_by_chains
from tinytl_hf.measure.measured_step import random_batch
from tinytl_hf.measure.memory import build
from tinytl_hf.measure.own_process import in_own_process
from tinytl_hf.measure.peak import Peak, measure_peak, measure_speed, process_high_water
from tinytl_hf.model import TinyTLModel

TRAINING = "tinytl_hf.train.loop"  # the module that imports what a training does
PASSES = 2  # of an accumulated step that are taken


@dataclass(frozen=True)
class FreshStep:
    """What a step took.

    Attributes:
        peak: At the allocator.
        grown: What the process got resident beyond what it had before the network was there, in bytes.
        trained_parameters: How many train.
        images_per_second: Of the step.
        eval_images_per_second: Of an evaluation of decoded photos.
    """

    peak: Peak
    grown: int
    trained_parameters: int
    images_per_second: float
    eval_images_per_second: float


def quick_processes() -> BaseContext:
    """Where there can be: processes that start as one which has imported what a training does, and nothing more.

    They start in no time; pages of libraries that they share with it are not counted as theirs.
    """
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([TRAINING])
    return context


def measure_step(
    config: Config, classes: int, photo_size: tuple[int, int], context: BaseContext, repeats: int
) -> FreshStep | None:
    """Take a step of a run in a process of its own.

    Args:
        config: The run.
        classes: Outputs of the head.
        photo_size: Height and width in px of the decoded photos.
        context: How the process starts.
        repeats: Steps whose median time counts, with an evaluation's; 0: only its memory is of interest.

    Returns:
        What it took; None where the machine has not that much memory.
    """
    try:
        return in_own_process(context, _take_step, config, classes, photo_size, repeats)
    except MemoryError:
        return None


def _take_step(config: Config, classes: int, photo_size: tuple[int, int], repeats: int) -> FreshStep:
    forget_launch()
    before, options = process_high_water(), config.train
    batch = options.global_batch_size // options.gradient_accumulation_steps
    passes = min(PASSES, options.gradient_accumulation_steps)
    short = replace(options, global_batch_size=batch * passes, gradient_accumulation_steps=passes)
    config = replace(config, train=short)
    model = build(config, config.method, classes, config.memory.lean)
    pixels, labels = random_batch(model, batch, photo_size)
    speed = measure_speed(model, pixels, labels, config, max(1, repeats))
    eval_speed = float("inf")
    if repeats:
        eval_speed = _eval_speed(model, random_batch(model, options.global_batch_size, photo_size)[0])
    grown = process_high_water() - before  # read here, as the profiler takes memory of its own
    trained = sum(parameter.numel() for parameter in model.trainable_parameters())
    return FreshStep(measure_peak(model, pixels, labels, config), grown, trained, speed, eval_speed)


@torch.no_grad()
def _eval_speed(model: TinyTLModel, pixels: Tensor) -> float:
    """Images a second of an evaluation of decoded photos ``[N, 3, H, W]``, which takes the memory that it takes."""
    sizes = torch.tensor(pixels.shape[-2:], device=pixels.device).expand(len(pixels), 2)
    start = time.perf_counter()
    with evaluated_by_chains(model.eval().backbone) as pixels_at_a_time:
        forward_in_parts(model, model.normalise(pixels, sizes), pixels_at_a_time)
    return len(pixels) / seconds_since(start, pixels.device)
