"""Ctrl-C, SIGTERM and SIGHUP as a wish that the training loop grants after one of the next steps."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator

NAMES = ("SIGINT", "SIGTERM", "SIGHUP") if os.name == "posix" else ("SIGINT", "SIGTERM")


class StopSignal:
    """Within it, the first SIGINT, SIGTERM or SIGHUP (a closed terminal's) is noted; a second SIGINT stops at once.

    In a thread other than the main one, signals go where they went before: only the main thread can take them. One
    that is ignored, as SIGHUP is with nohup, stays so.
    """

    def __init__(self) -> None:
        self.signum = 0

    def __enter__(self) -> StopSignal:
        in_main = threading.current_thread() is threading.main_thread()
        # None is a handler that is not Python's, which could not be put back.
        wanted = [
            signum
            for signum in map(signal.Signals.__getitem__, NAMES)
            if in_main and signal.getsignal(signum) not in (signal.SIG_IGN, None)
        ]
        self._previous = {signum: signal.signal(signum, self._note) for signum in wanted}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def received(self, accelerator: Accelerator) -> int:
        """The signal that any process got, or 0; all processes agree on it."""
        if accelerator.num_processes == 1:
            return self.signum
        signums = accelerator.gather(torch.tensor([self.signum], device=accelerator.device))
        return int(signums.max())

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum == signal.SIGINT == signum:
            raise KeyboardInterrupt
        self.signum = signum
