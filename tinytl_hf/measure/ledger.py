"""The ledger of what one training forward pass keeps for the backward pass, in bytes."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import Any

import torch.nn.functional as F
from torch import Tensor, UntypedStorage
from torch.autograd.graph import saved_tensors_hooks

from tinytl_hf.model import TinyTLModel
from tinytl_hf.step import left_as_found


def kept_for_backward(model: TinyTLModel, images: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> int:
    """Bytes that one training forward pass and its loss keep for the backward pass: an exact ledger.

    Every distinct storage counts once and whole, unless it is the labels, a parameter or a buffer: the images, too,
    where a layer keeps them, since a step makes them of its photos. The model stays as it was, running statistics
    included.

    Args:
        model: The model, lean or stock.
        images: Normalised images ``[N, 3, H, W]`` on the model's device.
        labels: Their labels ``[N]``.
        label_smoothing: Of the loss.
    """
    return sum(kept_by_layer(model, images, labels, label_smoothing).values())


def kept_by_layer(model: TinyTLModel, images: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Counter[str]:
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
        stack.enter_context(left_as_found(model))
        stack.enter_context(saved_tensors_hooks(pack, lambda tensor: tensor))
        F.cross_entropy(model(images), labels, label_smoothing=label_smoothing)
    for tensor in (labels, *model.parameters(), *model.buffers()):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    kept: Counter[str] = Counter()
    for storage, name in storages.values():
        kept[name] += storage.nbytes()
    return kept
