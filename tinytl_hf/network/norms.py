"""Batch norm layers whose class decides whether their statistics can change.

A frozen norm is a type, not a mode: ``model.train()`` cannot make it use or update batch statistics.
All of them keep the parameter and buffer names of ``nn.BatchNorm2d``.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.nn.modules.batchnorm import _BatchNorm

from tinytl_hf.errors import TinyTLError
from tinytl_hf.network.kinds import class_name
from tinytl_hf.network.mixed import mixed
from tinytl_hf.words import counted

torch.fx.wrap("_values_of_a_channel")  # one step of the graphs that torch.fx draws, whose maps have no size

NORM_WITH_ACTIVATION = "timm.layers.norm_act.BatchNormAct2d"


class _Recomputing(threading.local):
    active = False


_recomputing = _Recomputing()


@contextmanager
def keep_running_statistics() -> Iterator[None]:
    """Within it, batch norms use batch statistics but leave their running ones alone.

    Gradient checkpointing runs a forward pass a second time, which must not count twice.
    """
    before, _recomputing.active = _recomputing.active, True
    try:
        yield
    finally:
        _recomputing.active = before


def recompute_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of the first and of the repeated forward pass, as ``torch.utils.checkpoint`` wants them."""
    return nullcontext(), keep_running_statistics()


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with fixed statistics, in training too. Its bias may train."""

    def reset_running_stats(self) -> None:
        """Do nothing: frozen statistics stay, even where ``torch.optim.swa_utils.update_bn`` would take new ones."""

    def forward(self, input: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape."""
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the batch of all processes together, on any device.

    ``nn.SyncBatchNorm`` does this on GPUs only. With it, one process and several processes with the same
    global batch compute the same thing.

    Attributes:
        instead: What helps, besides more values, where a channel has a single one: that of a backbone's norms.
    """

    instead = "a method that freezes norms, such as TinyTL-B"

    def forward(self, input: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape."""
        if not self.training:  # not by nn.BatchNorm2d's own pass, which no graph of torch.fx can hold
            of_batch = self.running_mean is None
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, of_batch, eps=self.eps
            )
        values = self.values_of_a_channel(input.shape)
        if self.spans_processes:
            return self._forward_over_processes(input, values)
        rate = self.count_batch()
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, True, rate, self.eps)

    @property
    def spans_processes(self) -> bool:
        """Whether the batch is spread over several processes."""
        return world_size() > 1

    def count_batch(self) -> float:
        """Count a batch, unless it is computed for a second time; the share of its statistics in the running ones."""
        if not _recomputing.active and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return self.share_of_a_batch

    @property
    def share_of_a_batch(self) -> float:
        """The share of a batch's statistics in the running ones: none where it is computed for a second time."""
        if _recomputing.active:
            return 0.0
        if self.momentum is None:  # a plain mean over the batches so far
            return 1 / max(1, int(self.num_batches_tracked or 0))
        return self.momentum

    def values_of_a_channel(self, shape: Sequence[int]) -> int:
        """How many values a channel of maps of ``shape`` has, on all processes together.

        Raises:
            TinyTLError: It is one value, which has no variance.
        """
        return _values_of_a_channel(shape, world_size(), self.instead)

    @torch.no_grad()
    def take_in(self, mean: Tensor, var: Tensor, values: int) -> None:
        """Let the running statistics follow those of a batch, unless it is computed for a second time."""
        rate = self.count_batch()
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.lerp_(mean, rate)
            self.running_var.lerp_(var * values / (values - 1), rate)

    def _forward_over_processes(self, input: Tensor, values: int) -> Tensor:
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        mean = _SumOverProcesses.apply(x.sum((0, 2, 3))) / values
        centred = x - mean[:, None, None]
        var = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / values
        self.take_in(mean, var, values)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """A frozen batch norm that holds the activation after it, as timm's ``BatchNormAct2d`` does."""

    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape."""
        return self.act(super().forward(input))


class GlobalBatchNormAct2d(GlobalBatchNorm2d):
    """A batch norm on the statistics of the global batch that holds the activation after it."""

    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape."""
        return self.act(super().forward(input))


WITH_ACTIVATION: dict[type[nn.BatchNorm2d], type[nn.BatchNorm2d]] = {
    FrozenBatchNorm2d: FrozenBatchNormAct2d,
    GlobalBatchNorm2d: GlobalBatchNormAct2d,
}


class AlwaysEvaluates(nn.Module):
    """Mixed in before a norm of an unknown class, which then never leaves evaluation mode."""

    def reset_running_stats(self) -> None:
        """Do nothing: frozen statistics stay."""

    def train(self, mode: bool = True) -> AlwaysEvaluates:
        """Stay in evaluation mode."""
        return super().train(False)


def has_batch_statistics(module: nn.Module) -> bool:
    """Whether it is a norm that uses the statistics of the batch in training, and updates its running ones."""
    return isinstance(module, _BatchNorm) and not isinstance(module, (FrozenBatchNorm2d, AlwaysEvaluates))


def replace_batch_norms(module: nn.Module, norm: type[nn.BatchNorm2d], frozen: Collection[nn.Module] = ()) -> None:
    """Replace every ``nn.BatchNorm2d`` under ``module`` by ``norm``, in place, with the same tensors.

    Those that are in ``frozen``, or in a part that is, become frozen ones in any case.

    One that holds its activation, as timm has them, goes on to hold it. Any other subclass may do more than normalise,
    so it keeps its own forward pass: where ``norm`` is a frozen one, it becomes a type that stays in evaluation mode,
    else it stays as it is.
    """
    for name, child in module.named_children():
        kind: type[nn.BatchNorm2d] = FrozenBatchNorm2d if child in frozen else norm
        if type(child) is nn.BatchNorm2d:
            setattr(module, name, _with_tensors_of(child, kind))
        elif isinstance(child, nn.BatchNorm2d) and _holds_activation(child):
            replaced = _with_tensors_of(child, WITH_ACTIVATION[kind])
            replaced.act = child.act
            setattr(module, name, replaced)
        elif not isinstance(child, nn.BatchNorm2d):
            replace_batch_norms(child, kind, frozen)
        elif kind is FrozenBatchNorm2d:
            child.__class__ = mixed(f"Frozen{type(child).__name__}", AlwaysEvaluates, type(child))
            child.eval()


def _holds_activation(norm: nn.Module) -> bool:
    """Whether it is a norm with an activation and nothing else."""
    return class_name(type(norm)) == NORM_WITH_ACTIVATION and type(norm.drop) is nn.Identity


def _with_tensors_of(old: nn.BatchNorm2d, norm: type[nn.BatchNorm2d]) -> nn.BatchNorm2d:
    new = norm(old.num_features, eps=old.eps, momentum=old.momentum)
    new.weight, new.bias = old.weight, old.bias
    new.running_mean, new.running_var = old.running_mean, old.running_var
    new.num_batches_tracked = old.num_batches_tracked
    return new


def check_even(network: nn.Module, images: Tensor) -> None:
    """Raise, on all processes, unless they have as many images each, by which norms of the global batch count.

    Raises:
        TinyTLError: One has more than another, as at the end of a data set that was not shared out evenly.
    """
    if world_size() == 1 or not any(isinstance(m, GlobalBatchNorm2d) and m.training for m in network.modules()):
        return
    counts = torch.tensor([len(images), -len(images)], device=images.device)
    dist.all_reduce(counts, dist.ReduceOp.MAX)
    most, least = counts.abs().tolist()
    if most != least:
        raise TinyTLError(
            f"a batch of {counted(len(images), 'image')}: of the processes, one has {least} and another {most}, "
            "and batch norms take their statistics over all of them; give each as many (Accelerate's even_batches, or "
            "drop_last=True)"
        )


def _values_of_a_channel(shape: Sequence[int], processes: int, instead: str) -> int:
    values = math.prod(shape) // shape[1] * processes  # every process has the same number of images
    if values == 1:
        raise TinyTLError(f"batch norm needs more than one value a channel: use a larger batch or image, or {instead}")
    return values


class _SumOverProcesses(Function):
    """The sum of a tensor over all processes; so is its gradient, as each process's loss depends on it."""

    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor) -> Tensor:
        return sum_over_processes(tensor)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        return sum_over_processes(grad)


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, without a gradient."""
    if world_size() == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
