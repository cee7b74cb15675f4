"""Training memory as three figures that are never mixed up: computed, kept and measured.

:func:`~tinytl_hf.measure.paper_rule.paper_rule` computes what the TinyTL paper would report,
:func:`kept_for_backward` counts what one real forward pass keeps, :func:`measure_peak` measures one real training
step. Figures are bytes; MB are 1e6 bytes.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, UntypedStorage
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import AdamW
from torch.profiler import ProfilerActivity, profile

from tinytl_hf.config.run import Config
from tinytl_hf.config.verbs import MemoryTableConfig
from tinytl_hf.measure.accuracy import make_accelerator, no_stderr
from tinytl_hf.measure.paper_rule import paper_rule
from tinytl_hf.model import TinyTLModel
from tinytl_hf.network.methods import METHODS

MB = 1e6
NAMED_LAYERS = 4  # how many of a row's stock layers the table names


def kept_for_backward(model: TinyTLModel, images: Tensor, labels: Tensor) -> int:
    """Bytes that one training forward pass and its loss keep for the backward pass: an exact ledger.

    Every distinct storage counts once and whole, unless it is the batch itself, a parameter or a buffer. The model
    stays as it was, running statistics included.

    Args:
        model: The model, lean or stock.
        images: Normalised images ``[N, 3, H, W]`` on the model's device.
        labels: Their labels ``[N]``.
    """
    return sum(kept_by_layer(model, images, labels).values())


def kept_by_layer(model: TinyTLModel, images: Tensor, labels: Tensor) -> Counter[str]:
    """The ledger of :func:`kept_for_backward` by the backbone's layer that keeps a storage first, or ``""``."""
    storages: dict[int, tuple[UntypedStorage, str]] = {}  # by address; held, so that no address comes a second time
    running = [""]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages.setdefault(storage.data_ptr(), (storage, running[-1]))
        return tensor.detach()  # the tensor itself would make a cycle that is never freed

    def leave(*_: Any) -> None:
        running.pop()

    # A checkpointed part keeps its inputs with the hooks around it, which are these, and hides only what it computes
    # again: so the pooled input of each lite residual is here too.
    with ExitStack() as stack:
        for name, layer in model.backbone.named_modules():
            if not list(layer.children()):
                before = layer.register_forward_pre_hook(lambda _, __, name=name: running.append(name))
                after = layer.register_forward_hook(leave)
                stack.callback(before.remove)
                stack.callback(after.remove)
        stack.enter_context(_left_as_found(model))
        stack.enter_context(saved_tensors_hooks(pack, lambda tensor: tensor))
        F.cross_entropy(model(images), labels)
    for tensor in (images, labels, *model.parameters(), *model.buffers()):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    kept: Counter[str] = Counter()
    for storage, name in storages.values():
        kept[name] += storage.nbytes()
    return kept


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
    with _left_as_found(model):
        optimizer, step = warmed_up_step(model, images, labels)
        measured = (_cuda_peak if images.is_cuda else _cpu_peak)(step)
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
    with _left_as_found(model):
        _, step = warmed_up_step(model, images, labels)
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    return len(images) / statistics.median(seconds)


def process_high_water() -> int:
    """The most memory that this process has had resident so far, in bytes: ask a fresh process."""
    status = Path("/proc/self/status")
    _, found, value = (status.read_text() if status.is_file() else "").partition("VmHWM:")
    if found:
        return int(value.split()[0]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def warmed_up_step(model: TinyTLModel, images: Tensor, labels: Tensor) -> tuple[AdamW, Callable[[], None]]:
    """A training step with AdamW that was done once; at rate 0 it does all of its work on the same weights."""
    optimizer = AdamW(model.trainable_parameters(), lr=0.0)

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if images.is_cuda:
            torch.cuda.synchronize()

    step()
    return optimizer, step


def _cpu_peak(step: Callable[[], None]) -> int:
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
def _left_as_found(model: TinyTLModel) -> Iterator[None]:
    """Start in training mode without gradients; leave the model and the random generator as they were."""
    delta = {name: tensor.clone() for name, tensor in model.adapter_tensors().items()}
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    model.train().zero_grad()
    try:
        with torch.random.fork_rng({p.device for p in gradients if p.is_cuda}):
            yield
    finally:
        for name, tensor in model.adapter_tensors().items():
            tensor.copy_(delta[name])
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for module, mode in modes.items():
            module.training = mode


@dataclass(frozen=True)
class MemoryRow:
    """One method's figures on one engine, ``lean`` or ``stock``.

    ``high_water`` is of the whole process. ``stock_layers`` says what each layer that stays stock keeps for backward.
    """

    method: str
    engine: str
    paper: float
    kept: int
    peak: Peak
    images_per_second: float
    high_water: int
    stock_layers: dict[str, int]


def measure_rows(config: Config, options: MemoryTableConfig) -> Iterator[MemoryRow]:
    """Measure methods on both engines, each in a process of its own, so that none inherits another's memory.

    Args:
        config: The run: backbone, image size, precision, lite residual and head; its method and data do not matter.
        options: Methods, batch, classes and repeats.
    """
    for method in options.methods or METHODS:
        for lean in (False, True):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                yield pool.submit(_measure_alone, config, options, method, lean).result()


def _measure_alone(config: Config, options: MemoryTableConfig, method: str, lean: bool) -> MemoryRow:
    model = build(config, method, options.num_classes, lean)
    images, labels = random_batch(model, options.batch_size)
    speed = measure_speed(model, images, labels, options.repeats)
    high_water = process_high_water()  # before the profiler takes memory of its own
    return measure(model, images, labels, lean, speed, high_water)


def measure(
    model: TinyTLModel, images: Tensor, labels: Tensor, lean: bool, images_per_second: float, high_water: int
) -> MemoryRow:
    """All figures of a model; speed and the process's high-water mark are measured by the caller."""
    kept = kept_by_layer(model, images, labels)
    return MemoryRow(
        method=model.config.method,
        engine="lean" if lean else "stock",
        paper=paper_rule(model, len(images)),
        kept=sum(kept.values()),
        peak=measure_peak(model, images, labels),
        images_per_second=images_per_second,
        high_water=high_water,
        stock_layers={label: kept[label.partition(" ")[0]] for label in model.stock_layers},
    )


def build(config: Config, method: str, num_classes: int, lean: bool) -> TinyTLModel:
    """The model of a run, with another method and engine, on CUDA or else the CPU, in the run's precision."""
    model = TinyTLModel.from_backbone(
        config.backbone.name,
        method=method,
        num_classes=num_classes,
        weights=config.backbone.weights,
        frozen_weights=config.backbone.frozen_weights,
        image_size=config.data.image_size,
        lite=config.lite,
        head=config.head,
        gradient_checkpointing=config.train.gradient_checkpointing,
        lean=lean,
        slice_mb=config.memory.slice_mb,
    )
    no_cuda = not torch.cuda.is_available()  # peaks can be measured on CUDA and on a CPU
    return make_accelerator(config.train.mixed_precision, torch.get_num_threads(), cpu=no_cuda).prepare(model)


def random_batch(model: TinyTLModel, batch_size: int) -> tuple[Tensor, Tensor]:
    """Images and labels that a model can be trained on, on its device."""
    size, device = model.config.preprocessing.trained_at, next(model.parameters()).device
    images = torch.randn(batch_size, 3, size, size, device=device)
    labels = torch.randint(len(model.label_names), (batch_size,), device=device)
    return images.contiguous(memory_format=torch.channels_last), labels


def conditions(config: Config, **sizes: int) -> dict[str, Any]:
    """What figures hold under; ``sizes`` are those that they have in common."""
    return {
        "backbone": config.backbone.name,
        **sizes,
        "frozen_weights": config.backbone.frozen_weights,
        "precision": config.train.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "torch_version": torch.__version__,
    }


LABELS = {"paper": "paper rule (analytic)", "kept": "kept for backward (ledger)", "peak": "peak (measured)"}
LEGEND = f"""\
A  {LABELS["paper"]}: computed as in the TinyTL paper, with 8-bit frozen weights
B  {LABELS["kept"]}: what one forward pass really keeps
C  {LABELS["peak"]}: of one training step, the sum of the six columns after it; dynamic = kept + transient
process: the most that a process running this alone had resident. All in MB of 1e6 bytes.
"""
COLUMNS = ["A", "B", "C", "frozen", "trained", "gradients", "optimizer", "kept", "transient", "dynamic", "process"]


def memory_table(rows: Sequence[MemoryRow]) -> str:
    """The rows as plain text, with a legend that says which figure is computed and which is measured."""
    table = [["method", "engine", *COLUMNS, "images/s"]]
    notes = []
    for row in rows:
        figures = [row.paper, row.kept, row.peak.total, *asdict(row.peak).values(), row.peak.dynamic, row.high_water]
        in_mb = [f"{figure / MB:.1f}" for figure in figures]
        table.append([row.method, row.engine, *in_mb, f"{row.images_per_second:.1f}"])
        if row.stock_layers:
            largest = Counter(row.stock_layers).most_common(NAMED_LAYERS)
            names = ", ".join(f"{label} {kept / MB:.1f}" for label, kept in largest)
            names += ", ..." * (len(row.stock_layers) > NAMED_LAYERS)
            total = sum(row.stock_layers.values()) / MB
            count = f"{len(row.stock_layers)} layers stay stock"
            notes.append(f"{row.method}, {row.engine}: {count}: {names}; in all they keep {total:.1f} MB for backward")
    lines = [f"{method:13}{engine:5}" + "".join(f"{c:>10}" for c in cells) for method, engine, *cells in table]
    return "\n".join([LEGEND, *lines, *notes]) + "\n"


def to_json(rows: Sequence[MemoryRow], conditions: Mapping[str, Any]) -> str:
    """The rows in bytes, with the conditions they hold under: device, threads, batch size and the like."""
    plain = [asdict(row) for row in rows]
    for row, values in zip(rows, plain, strict=True):
        values["peak"] |= {"dynamic": row.peak.dynamic, "total": row.peak.total}
    report = {"unit": "bytes", "labels": LABELS, "conditions": dict(conditions), "rows": plain}
    return json.dumps(report, indent=2) + "\n"
