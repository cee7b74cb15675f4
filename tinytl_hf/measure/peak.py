"""The allocator's peak and the time of one real training step, from decoded photos on.

Figures are bytes; MB are 1e6 bytes.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tinytl_hf.config.run import Config
from tinytl_hf.cuda_graph import is_replayed
from tinytl_hf.measure.ledger import kept_for_backward
from tinytl_hf.measure.measured_step import MeasuredStep
from tinytl_hf.model import TinyTLModel
from tinytl_hf.network.norms import world_size
from tinytl_hf.step import left_as_found


@dataclass(frozen=True)
class Peak:
    """What a training step takes when it takes most, in bytes. The parts add up to what was measured.

    Attributes:
        frozen_weights: Parameters and buffers that do not change.
        trained_weights: Parameters that train and running statistics that change.
        gradients: Of the parameters that train; less where the peak comes before they can all be there.
        optimizer_state: Such as AdamW's moments.
        kept_activations: What the forward pass keeps for the backward pass, by the ledger.
        transient: The rest: temporaries of whatever runs at the peak, resampling included.
        photos: The batch of decoded pixels that the step starts from; the loader has the next one ready besides.
        gradient_buckets: Of several processes that accumulate: the gradients once more, where DDP adds them up.
            Without accumulation the gradients themselves lie there.
    """

    frozen_weights: int
    trained_weights: int
    gradients: int
    optimizer_state: int
    kept_activations: int
    transient: int
    photos: int = 0
    gradient_buckets: int = 0

    @property
    def dynamic(self) -> int:
        """Kept activations and temporaries: what grows with the batch, but for the photos themselves."""
        return self.kept_activations + self.transient

    @property
    def total(self) -> int:
        """Everything."""
        of_weights = self.frozen_weights + self.trained_weights + self.gradients + self.optimizer_state
        return of_weights + self.gradient_buckets + self.photos + self.dynamic


def measure_peak(model: TinyTLModel, pixels: Tensor, labels: Tensor, config: Config | None = None) -> Peak:
    """Measure the allocator's peak in one training step: crop and resize, forward, loss, backward, optimizer.

    Weights, optimizer state and the batch of photos are there before. Scratch memory of oneDNN's, BLAS's and NumPy's
    kernels on a CPU is out of sight. A CUDA graph holds the memory of its passes while images are resized, so where
    they are replayed the two add up. The model stays as it was.

    Args:
        model: The model, lean or stock.
        pixels: Decoded photos ``[N, 3, H, W]`` on the model's device.
        labels: Their labels ``[N]``.
        config: The run: its optimizer, accumulation, clipping, label smoothing and crops; None: the default one.
    """
    trained, trainable = _bytes(model.adapter_tensors().values()), _bytes(model.trainable_parameters())
    config = config or Config()
    with left_as_found(model):
        step = MeasuredStep(model, pixels, labels, config, launched=True)
        kept = kept_for_backward(model, step.view(), labels, step.options.smoothing)
        step()
        measured = _cuda_peak(step, pixels.device) if pixels.is_cuda else cpu_peak(step)
        if is_replayed(model, config):
            measured += _cuda_peak(step.view, pixels.device)
        state = _bytes(value for values in step.optimizer.state.values() for value in values.values())
    # All that is kept is there when the forward pass ends, so the peak is no less.
    gradients = min(trainable, max(0, measured - kept))
    return Peak(
        frozen_weights=_bytes(model.parameters()) + _bytes(model.buffers()) - trained,
        trained_weights=trained,
        gradients=gradients,
        optimizer_state=state,
        kept_activations=kept,
        transient=max(0, measured - kept - gradients),
        photos=_bytes([pixels]),
        gradient_buckets=trainable if step.options.gradient_accumulation_steps > 1 and world_size() > 1 else 0,
    )


def measure_speed(
    model: TinyTLModel, pixels: Tensor, labels: Tensor, config: Config | None = None, repeats: int = 5
) -> float:
    """Images a second in the step of :func:`measure_peak`, whose arguments these are, after a warm-up.

    ``repeats`` is the number of steps, whose median time counts.
    """
    seconds = []
    with left_as_found(model):
        step = MeasuredStep(model, pixels, labels, config or Config())
        step()
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    return step.images / statistics.median(seconds)


def process_high_water() -> int:
    """Peak resident memory of this process, in bytes. It never falls, so call it in a fresh process."""
    status = Path("/proc/self/status")
    _, found, value = (status.read_text() if status.is_file() else "").partition("VmHWM:")
    if found:
        return int(value.split()[0]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def cpu_peak(step: Callable[[], object]) -> int:
    """Bytes that the CPU's allocator gives out at most at a time in one call of ``step``."""
    gc.collect()  # what is freed late would count as memory that the step gave back
    with no_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def _cuda_peak(step: Callable[[], object], device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


@contextmanager
def no_stderr() -> Iterator[None]:
    """Silence this process's error stream and that of the programs it starts."""
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
