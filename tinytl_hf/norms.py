"""Batch norm layers that say by their type what happens to their statistics.

A frozen norm is a type, not a mode: ``model.train()`` cannot make it use or update batch statistics.
Both keep the parameter and buffer names of ``nn.BatchNorm2d``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from tinytl_hf.errors import TinyTLError

_recomputing = threading.local()


@contextmanager
def keep_running_statistics() -> Iterator[None]:
    """Within it, batch norms use batch statistics but leave their running ones alone.

    Gradient checkpointing runs a forward pass a second time, which must not count twice.
    """
    _recomputing.active = True
    try:
        yield
    finally:
        _recomputing.active = False


def recompute_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of the first and of the repeated forward pass, as ``torch.utils.checkpoint`` wants them."""
    return nullcontext(), keep_running_statistics()


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with fixed statistics, in training too. Its bias may train."""

    def forward(self, input: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape."""
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the batch of all processes together, on any device.

    ``nn.SyncBatchNorm`` does this on GPUs only. With it, one process and several processes with the same
    global batch compute the same thing.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape."""
        if not self.training:
            return super().forward(input)
        if input.numel() == input.shape[1] and _world_size() == 1:
            raise TinyTLError(
                "batch norm needs more than one value a channel: use a larger batch or image, or --lite.norm group"
            )
        count_batches = not getattr(_recomputing, "active", False)
        if count_batches and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if _world_size() == 1:
            rate = self._rate if count_batches else 0.0
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, True, rate, self.eps
            )
        return self._forward_over_processes(input, count_batches)

    @property
    def _rate(self) -> float:
        """Share of the new statistics in the running ones; null (a plain mean) does not occur in torchvision."""
        assert self.momentum is not None
        return self.momentum

    def _forward_over_processes(self, input: Tensor, count_batches: bool) -> Tensor:
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        values = x.numel() // x.shape[1] * _world_size()  # every process has the same number of images
        mean = _SumOverProcesses.apply(x.sum((0, 2, 3))) / values
        centred = x - mean[:, None, None]
        var = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / values
        if count_batches and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                self.running_mean.lerp_(mean, self._rate)
                self.running_var.lerp_(var * values / (values - 1), self._rate)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)


def replace_batch_norms(module: nn.Module, norm: type[nn.BatchNorm2d]) -> None:
    """Replace every ``nn.BatchNorm2d`` under ``module`` by ``norm``, in place, with the same tensors."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, _with_tensors_of(child, norm))
        else:
            replace_batch_norms(child, norm)


def _with_tensors_of(old: nn.BatchNorm2d, norm: type[nn.BatchNorm2d]) -> nn.BatchNorm2d:
    new = norm(old.num_features, eps=old.eps, momentum=old.momentum)
    new.weight, new.bias = old.weight, old.bias
    new.running_mean, new.running_var = old.running_mean, old.running_var
    new.num_batches_tracked = old.num_batches_tracked
    return new


class _SumOverProcesses(Function):
    """The sum of a tensor over all processes; so is its gradient, as each process's loss depends on it."""

    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor) -> Tensor:
        return _summed(tensor)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        return _summed(grad)


def _summed(tensor: Tensor) -> Tensor:
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
