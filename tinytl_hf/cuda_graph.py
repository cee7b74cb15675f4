"""The training passes of a run: launched kernel by kernel or, on a GPU, replayed from a CUDA graph.

A forward and backward pass through a small network is a thousand kernels, whose launches take a GPU's host longer than
the GPU takes for the kernels. A CUDA graph holds them all, and is launched once each way.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.cuda import make_graphed_callables

from tinytl_hf.config.run import Config
from tinytl_hf.errors import TinyTLError, first_line
from tinytl_hf.lean.again import autocast_on
from tinytl_hf.model import TinyTLModel
from tinytl_hf.network.norms import world_size
from tinytl_hf.step import left_as_found


def training_passes(prepared: nn.Module, config: Config) -> Callable[[Tensor], Tensor]:
    """What a run's step calls in place of its model, which is in training mode then.

    Args:
        prepared: The model as Accelerate prepared it.
        config: The run.
    """
    return ReplayedPasses(prepared) if is_replayed(prepared, config) else prepared


def is_replayed(prepared: nn.Module, config: Config) -> TypeGuard[TinyTLModel]:
    """Whether the passes of a run are replayed, with arguments as of :func:`training_passes`."""
    if not isinstance(prepared, TinyTLModel) or not prepared.engine.lean:  # in DDP, or stock
        return False
    on_gpu = next(prepared.parameters()).device.type == "cuda"
    return on_gpu and why_launched(config, world_size()) is None


def why_launched(config: Config, processes: int) -> str | None:
    """Why the passes of a run on GPUs are launched kernel by kernel; None if they are replayed."""
    if not config.memory.lean or not config.memory.cuda_graph:
        return "memory.lean and memory.cuda_graph are not both on"
    if torch.version.hip is not None:
        return "not tried on AMD"
    if processes > 1:
        return "several processes"
    if config.train.gradient_accumulation_steps > 1:
        return "gradient accumulation"  # a replay writes over the gradients that it left the last time
    return "gradient checkpointing" if config.train.gradient_checkpointing else None


def describe_passes(config: Config, device: torch.device, processes: int) -> str:
    """What to say of them beside the engine; nothing on a CPU."""
    if device.type != "cuda" or not config.memory.lean:
        return ""
    reason = why_launched(config, processes)
    return ", CUDA graph" if reason is None else f", no CUDA graph ({reason})"


class ReplayedPasses:
    """Records the passes of a model for a shape of its input when it comes first, and replays them from then on.

    The graph keeps for itself the memory that a pass takes, and a copy of its input. Of a shape that differs from the
    last one it makes another, which a run does once for each size of its images; so it does of another adapter, and
    under another autocast. Gradients lie where those of the last replay did: set them to None before the next one, as
    ``optimizer.zero_grad()`` does. In evaluation mode, and without gradients, it calls the model itself.

    Args:
        model: The model.
    """

    def __init__(self, model: TinyTLModel) -> None:
        self.model = model
        self._recorded: tuple[Any, ...] | None = None  # what the passes are of
        self._passes: Callable[[Tensor], Tensor] = model

    def __call__(self, inputs: Tensor) -> Tensor:
        """Logits of images or features, as of the model.

        Raises:
            TinyTLError: The model does what a graph cannot hold, such as to wait for the GPU.
        """
        if not (self.model.training and torch.is_grad_enabled()):
            return self.model(inputs)
        asked = (inputs.shape, inputs.dtype, self.model.backbone, autocast_on(inputs.device))
        if asked != self._recorded:
            if self._recorded is not None:  # the graph before this one goes first: it is in a cycle of PyTorch's
                self._passes, self._recorded = self.model, None
                gc.collect()
            self._passes, self._recorded = self._record(inputs), asked
        return self._passes(inputs)

    def _record(self, inputs: Tensor) -> Callable[[Tensor], Tensor]:
        try:
            # A graph is of the current device, and would not hold what runs on another one. A few passes come before
            # it, which are to leave no trace.
            with torch.cuda.device_of(inputs), left_as_found(self.model):
                passes = make_graphed_callables(_Passes(self.model), (inputs.clone(),), allow_unused_input=True)
                return cast("Callable[[Tensor], Tensor]", passes)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # PyTorch's generator of random numbers does not survive it, so nothing goes on
            raise TinyTLError(
                f"memory.cuda_graph=true: {self.model.config.backbone.name} cannot be recorded as a CUDA graph "
                f"({first_line(error)}); use --memory.cuda_graph false"
            ) from error


class _Passes(nn.Module):
    """A model whose own forward pass stays as it is when PyTorch puts a graph in place of this one's."""

    def __init__(self, model: TinyTLModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)
