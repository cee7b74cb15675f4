"""Build networks without drawing the random values that are written over right after."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

DRAWS = {Tensor.normal_, Tensor.uniform_}


class NoRandomValues(TorchFunctionMode):
    """Leaves tensors that a layer would fill with random values as they are.

    Drawing takes longer than reading a file of weights, and on the meta device each draw runs a decomposition.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The tensor itself in place of a draw."""
        return args[0] if func in DRAWS else func(*args, **(kwargs or {}))
