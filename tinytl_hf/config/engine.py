"""How a training pass runs. These choices change memory and speed; names of parameters and results stay the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tinytl_hf.config.check import check, check_types

BackendName = Literal["auto", "eager", "native", "triton"]
LARGEST_SLICE_MB = 1e9  # more than any batch takes, and its bytes are still a number of 64 bits


@dataclass(frozen=True)
class Engine:
    """What a training pass keeps in memory, and what it computes a second time.

    Attributes:
        lean: Keep only what the gradients need (true), or what stock PyTorch keeps (false).
        backend: Who computes frozen blocks and lite residuals: eager (PyTorch's own kernels), native (compiled for
            CPUs), triton (CUDA), or auto, the fastest that the device and the installation have.
        slice_mb: About how much of a frozen block's widest map exists at a time, in MB of 1e6 bytes; None: what suits
            the back-end, on a CPU about what stays in the cache between one layer and the next.
        gradient_checkpointing: Compute each block a second time in the backward pass.
    """

    lean: bool = True
    backend: BackendName = "auto"
    slice_mb: float | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        fits = self.slice_mb is None or self.slice_mb > 0
        check(fits, "slice_mb", self.slice_mb, "use a number of MB above 0, such as 5, or null")
        fits = self.slice_mb is None or self.slice_mb <= LARGEST_SLICE_MB
        check(fits, "slice_mb", self.slice_mb, "use a finite number of MB, up to 1e9")
