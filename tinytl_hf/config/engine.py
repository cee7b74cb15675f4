"""How a training pass runs. These choices change memory and speed; names of parameters and results stay the same."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Engine:
    """What a training pass keeps in memory, and what it computes a second time.

    Attributes:
        lean: Keep only what the gradients need (true), or what stock PyTorch keeps (false).
        slice_mb: About how much of a frozen block's widest map exists at a time, in MB of 1e6 bytes. The default is
            about what stays in a CPU's cache between one layer and the next.
        gradient_checkpointing: Compute each block a second time in the backward pass.
    """

    lean: bool = True
    slice_mb: float = 5.0
    gradient_checkpointing: bool = False
