"""The allocator's peak and the time of one real training step. Figures are bytes; MB are 1e6 bytes."""

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
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW
from torch.profiler import ProfilerActivity, profile

from tinytl_hf.measure.ledger import kept_for_backward, left_as_found
from tinytl_hf.model import TinyTLModel


@dataclass(frozen=True)
class Peak:
    """What a training step takes when it takes most, in bytes. The parts add up to what was measured.

    Attributes:
        frozen_weights: Parameters and buffers that do not change.
        trained_weights: Parameters that train and running statistics that change.
        gradients: Of the parameters that train; less where the peak comes before they can all be there.
        optimizer_state: AdamW's moments.
        kept_activations: What the forward pass keeps for the backward pass, by the ledger.
        transient: The rest: temporaries of whatever runs at the peak.
    """

    frozen_weights: int
    trained_weights: int
    gradients: int
    optimizer_state: int
    kept_activations: int
    transient: int

    @property
    def dynamic(self) -> int:
        """Kept activations and temporaries: what grows with the batch."""
        return self.kept_activations + self.transient

    @property
    def total(self) -> int:
        """Everything."""
        return self.frozen_weights + self.trained_weights + self.gradients + self.optimizer_state + self.dynamic


def measure_peak(model: TinyTLModel, images: Tensor, labels: Tensor) -> Peak:
    """Measure the allocator's peak in one training step: forward, loss, backward, AdamW.

    Weights and optimizer state are there before; the batch does not count. Scratch memory of oneDNN's, BLAS's and
    NumPy's kernels on a CPU is out of sight. Arguments are those of :func:`kept_for_backward`, and again the model
    stays as it was.
    """
    kept = kept_for_backward(model, images, labels)
    trained = _bytes(model.adapter_tensors().values())
    with left_as_found(model):
        optimizer, step = warmed_up_step(model, images, labels)
        measured = (_cuda_peak if images.is_cuda else cpu_peak)(step)
        state = _bytes(value for values in optimizer.state.values() for value in values.values())
    # All that is kept is there when the forward pass ends, so the peak is no less.
    gradients = min(_bytes(model.trainable_parameters()), max(0, measured - kept))
    return Peak(
        frozen_weights=_bytes(model.parameters()) + _bytes(model.buffers()) - trained,
        trained_weights=trained,
        gradients=gradients,
        optimizer_state=state,
        kept_activations=kept,
        transient=max(0, measured - kept - gradients),
    )


def measure_speed(model: TinyTLModel, images: Tensor, labels: Tensor, repeats: int = 5) -> float:
    """Images a second in the step of :func:`measure_peak`: the median of ``repeats`` steps, after a warm-up."""
    seconds = []
    with left_as_found(model):
        _, step = warmed_up_step(model, images, labels)
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    return len(images) / statistics.median(seconds)


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


def warmed_up_step(model: TinyTLModel, images: Tensor, labels: Tensor) -> tuple[AdamW, Callable[[], None]]:
    """An optimizer, and a function that runs a training step; it ran once. At rate 0 the weights do not change."""
    optimizer = AdamW(model.trainable_parameters(), lr=0.0)

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if images.is_cuda:
            torch.cuda.synchronize()

    step()
    return optimizer, step


def cpu_peak(step: Callable[[], object]) -> int:
    """Bytes that the CPU's allocator gives out at most at a time in one call of ``step``."""
    gc.collect()  # what is freed late would count as memory that the step gave back
    with no_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def _cuda_peak(step: Callable[[], None]) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


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
