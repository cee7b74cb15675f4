"""The verb ``fit`` as a frozen dataclass: which budget, and what may be tried."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from tinytl_hf.config.check import check, check_once, check_text, check_types, expand_paths
from tinytl_hf.config.network import MethodName


@dataclass(frozen=True)
class FitConfig:
    """Find what trains best within a budget of memory and time, by real training steps."""

    memory_mb: float | None = None
    """Most that a training step may take, in MB of 1e6 bytes: weights, gradients, optimizer, photos, activations."""
    process_mb: float | None = None
    """Most that the whole process may have resident, in MB: with Python, its libraries and the decoded images; null:
    the limit of the container, where it has one."""
    minutes: float | None = None
    """Most that the training may take, with its evaluations, but without opening and decoding the data set; null: any
    time."""
    methods: list[MethodName] = field(default_factory=lambda: ["TinyTL-L+B", "TinyTL-B", "FT-Last", "FT-Full"])
    """Methods to try."""
    train_sizes: list[int] | None = None
    """Sides of the training images to try, in px; null: 160, 128, 96 and 64, as far as data.train_size."""
    json: bool = False
    """Print JSON, in bytes and with the conditions, instead of a table."""
    output: str | None = None
    """New YAML file that gets the recommended run, ready for train --config."""

    def __post_init__(self) -> None:
        expand_paths(self, "output")
        check_types(self)
        for name in ("memory_mb", "process_mb", "minutes"):
            value = getattr(self, name)
            check(value is None or 0 < value < float("inf"), name, value, "use a number above 0, or null")
        check(bool(self.methods), "methods", self.methods, "name one or more")
        check_once("methods", self.methods)
        sizes = self.train_sizes
        check(sizes is None or (bool(sizes) and min(sizes) >= 1), "train_sizes", sizes, "use sizes in px, such as 224")
        if self.output is not None:
            check_text("output", self.output)
            check(re.search(r"\.ya?ml$", self.output) is not None, "output", self.output, "name a .yaml file")
            check(not Path(self.output).exists(), "output", self.output, "it is there; name a new file")
