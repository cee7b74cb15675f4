"""Decoded images that are in memory once for all processes of a machine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from tinytl_hf.errors import TinyTLError

Shape = tuple[int, ...]


def can_share() -> bool:
    """Whether there are other processes, and a system where an open file can lose its name."""
    return dist.is_available() and dist.is_initialized() and os.name == "posix"


def decode_in_shares(count: int, decode: Callable[[np.ndarray], Iterable[Tensor | None]]) -> list[Tensor | None]:
    """All images of a set, of which each process of a machine decodes a share into a file that all of them map.

    A file loses its name before anything is in it, so it is gone with the last process, however that ends.

    Args:
        count: Images of the set.
        decode: Gives the images ``uint8`` of some numbers from 0 in turn, or None for one that is left out.

    Raises:
        TinyTLError: What ``decode`` raised on any process of the machine, or the disk is full.
    """
    state = PartialState()
    machine = state.process_index - state.local_process_index  # number of its first process
    with ExitStack() as opened:
        try:
            descriptor, name = tempfile.mkstemp(prefix="tinytl-images-")
            try:
                own = opened.enter_context(os.fdopen(descriptor, "wb", buffering=0))
                names = [name for other, name in gather_object([(machine, name)]) if other == machine]
                files = [opened.enter_context(Path(name).open("rb")) for name in names]
                state.wait_for_everyone()
            finally:
                Path(name).unlink()
        except OSError as error:  # no folder to write in, or one that another process does not have
            raise _no_room(error) from error
        share = np.array_split(np.arange(count), len(names))[state.local_process_index]
        written = [
            rest for other, *rest in gather_object([(machine, *_write(own, decode(share)))]) if other == machine
        ]
        if errors := [failed for _, failed in written if failed is not None]:
            raise errors[0]
        return [image for file, (shapes, _) in zip(files, written, strict=True) for image in _mapped(file, shapes)]


def _write(file: FileIO, images: Iterable[Tensor | None]) -> tuple[list[Shape | None], TinyTLError | None]:
    shapes: list[Shape | None] = []
    try:
        for image in images:
            shapes.append(None if image is None else tuple(image.shape))
            rest = memoryview(b"") if image is None else image.numpy().reshape(-1).data
            while rest:
                rest = rest[file.write(rest) :]
    except TinyTLError as error:
        return shapes, error
    except OSError as error:
        return shapes, _no_room(error)
    return shapes, None


def _no_room(error: OSError) -> TinyTLError:
    place = tempfile.tempdir or "a temporary folder"  # where Python found none, to ask for it raises again
    return TinyTLError(
        f"decoded images or features cannot be written to {place} ({error}), for all processes of a machine; name "
        "a folder with more room in TMPDIR, or let images stream with a lower --data.memory_limit_mb"
    )


def _mapped(file: BinaryIO, shapes: list[Shape | None]) -> list[Tensor | None]:
    sizes = [0 if shape is None else int(np.prod(shape)) for shape in shapes]
    if not any(sizes):
        return [None] * len(shapes)  # an empty file cannot be mapped
    parts = torch.from_numpy(np.memmap(file, np.uint8, mode="c")).split(sizes)
    return [None if shape is None else part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
