"""The state dict in a file of weights, however training code has wrapped it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tinytl_hf.errors import TinyTLError

logger = logging.getLogger(__name__)

HOLDERS = ("state_dict", "model_state_dict", "model")  # what checkpoints call it
# Averages of weights beside them, as timm's and torchvision's training code call them.
AVERAGES = ("state_dict_ema", "model_ema")
COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel, which is no part of the network
# What DataParallel, torch.compile, and modules that hold the network put before each name.
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.")


def state_dict_of(content: Any, source: str) -> Mapping[str, Tensor]:
    """The tensors by name of what a file holds; what was unwrapped is logged.

    Raises:
        TinyTLError: It holds none.
    """
    holder = None
    if isinstance(content, Mapping):
        holder = next((key for key in HOLDERS if isinstance(content.get(key), Mapping)), None)
    tensors = content if holder is None else content[holder]
    if not isinstance(tensors, Mapping) or not tensors or not all(_is_entry(*entry) for entry in tensors.items()):
        raise TinyTLError(f"backbone.weights={source}: holds no state dict; save model.state_dict() there")
    tensors = {name: tensor for name, tensor in tensors.items() if name != COUNTER}
    taken = []
    while prefix := next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        taken.append(prefix)
    if holder is not None or taken:
        part = "" if holder is None else f" its {holder!r}"
        without = f" without the prefix {''.join(taken)!r}" if taken else ""
        logger.info("backbone.weights=%s: taken is%s%s", source, part, without)
    for average in () if holder is None else AVERAGES:
        if isinstance(content.get(average), Mapping):
            logger.warning(
                "backbone.weights=%s: left out is its %r, the average of the weights over their training; to use it, "
                "save it in a file of its own",
                source,
                average,
            )
    return tensors


def _is_entry(name: Any, tensor: Any) -> bool:
    return isinstance(name, str) and isinstance(tensor, Tensor)
