"""How layers are computed again for the backward pass: by the settings of the forward pass, and so that they know."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _State(threading.local):
    active = False


_state = _State()


def autocast_on(device: torch.device) -> tuple[bool, torch.dtype]:
    """Whether a device computes under autocast, and in what type."""
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


@contextmanager
def computed_again(device: torch.device, autocast: tuple[bool, torch.dtype]) -> Iterator[None]:
    """Within it, layers run as they did forward, with gradients, and :func:`is_computed_again` is true."""
    enabled, dtype = autocast
    before, _state.active = _state.active, True
    try:
        with torch.enable_grad(), torch.autocast(device.type, dtype, enabled):
            yield
    finally:
        _state.active = before


def is_computed_again() -> bool:
    """Whether this thread computes something a second time, for its gradients alone."""
    return _state.active
