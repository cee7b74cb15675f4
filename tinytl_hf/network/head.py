"""The classifier head: the one layer that every method trains from scratch."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tinytl_hf.errors import TinyTLError
from tinytl_hf.network.kinds import has_own_forward


class Head(nn.Linear):
    """A linear layer with dropout on its input, in the place (and under the name) of the backbone's own.

    Args:
        in_features: Features that the backbone gives.
        num_classes: Logits to compute.
        dropout: Probability that a feature is dropped while training.
    """

    def __init__(self, in_features: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__(in_features, num_classes)
        self.dropout = dropout
        nn.init.normal_(self.weight, 0.0, 0.01)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """``[N, in_features]`` to ``[N, num_classes]``."""
        if self.training and self.dropout > 0:
            input = input * self._mask(input)
        return F.linear(input, self.weight, self.bias)

    def _mask(self, input: Tensor) -> Tensor:
        """Draw the mask of the whole global batch and keep this process's rows.

        All processes share one seed, so that the run is the same however many there are.
        """
        processes, rank = 1, 0
        if dist.is_available() and dist.is_initialized():
            processes, rank = dist.get_world_size(), dist.get_rank()
        rows = input.shape[0]
        drawn = torch.rand(rows * processes, input.shape[1], device=input.device)[rank * rows :][:rows]
        return (drawn >= self.dropout).to(input.dtype) / (1 - self.dropout)


def head_of(backbone: nn.Module) -> tuple[str, Head]:
    """The name and the module of a network's head.

    Raises:
        TinyTLError: It has none any more.
    """
    found = next(((name, module) for name, module in backbone.named_modules() if isinstance(module, Head)), None)
    if found is None:
        raise TinyTLError(
            "the network's head was replaced by a layer of another kind, which no adapter could hold; build the model "
            "with num_classes= or label_names= in place of that"
        )
    return found


def without_head(backbone: nn.Module) -> nn.Module:
    """The same network with the head's input as its result; nothing is copied but the modules that hold the head.

    Being a network of its own, it can run in several threads, beside the whole one too.
    """
    name, _ = head_of(backbone)
    *path, last = name.split(".")
    top = holder = with_own_children(backbone)
    for part in path:
        holder._modules[part] = with_own_children(holder.get_submodule(part))
        holder = holder.get_submodule(part)
    holder._modules[last] = nn.Identity()
    return top


def with_own_children(module: nn.Module) -> nn.Module:
    """A module with the same parameters and children, of which children can be exchanged.

    Raises:
        TinyTLError: Its forward pass was replaced, by one that would run the module and its own children.
    """
    if has_own_forward(module):
        raise TinyTLError(
            f"{type(module).__name__}: its forward pass was replaced, by hand or by Accelerate's hooks, and "
            "features() and trained_blocks run parts of it alone; put it back first, for example by "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        )
    alone = copy.copy(module)
    vars(alone).pop("forward", None)  # one that was put back is bound to the module itself
    alone._modules = dict(module._modules)
    return alone


class PointwiseHead(Head):
    """A head in the place of a classifier that is a 1x1 convolution, whose shapes it keeps; its maps have one px."""

    def __init__(self, in_features: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__(in_features, num_classes, dropout)
        self.weight = nn.Parameter(self.weight.detach()[..., None, None])

    def forward(self, input: Tensor) -> Tensor:
        """``[N, in_features, 1, 1]`` to ``[N, num_classes, 1, 1]``, or both without the last two dimensions."""
        features = input.flatten(1)
        if self.training and self.dropout > 0:
            features = features * self._mask(features)
        logits = F.linear(features, self.weight.flatten(1), self.bias)
        return logits if input.ndim == 2 else logits[..., None, None]
