"""To measure in a process of its own: what this one has taken before does not count."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, parent_process
from multiprocessing.context import BaseContext
from typing import ParamSpec, TypeVar

from accelerate.utils.memory import should_reduce_batch_size

P = ParamSpec("P")
T = TypeVar("T")


def in_own_process(context: BaseContext, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a process of its own, which ends after it, and with this one.

    Raises:
        MemoryError: It asked for more memory than there is, or the system ended it, as it does where none is left.
    """
    others = set(active_children())
    with ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            return pool.submit(function, *args, **kwargs).result()
        except KeyboardInterrupt:  # of this process alone, perhaps: it would wait for what is being measured
            for process in set(active_children()) - others:
                process.terminate()
            raise
        except BrokenProcessPool as error:
            raise MemoryError("the system ended the process") from error
        except RuntimeError as error:
            if should_reduce_batch_size(error):
                raise MemoryError(str(error)) from error
            raise


def _end_with_parent() -> None:
    """Let this process end when the one that it measures for is killed: it would wait for more work for ever."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
