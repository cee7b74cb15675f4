"""What reading hostile input must not do: start programs, connect, unpickle, write elsewhere, hang, fill memory."""

import os
import resource
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings

STARTS = {"os.system", "os.exec", "os.posix_spawn", "os.startfile", "subprocess.Popen", "pty.spawn"}
FORBIDDEN = STARTS | {"socket.connect", "pickle.find_class", "os.rmdir"}
SECONDS, MEGABYTES = 30, 1500  # of CPU time, for one case; for the process above what it had

_watched = None  # (the folder that may be written to, what was done elsewhere)


def _note(event, arguments):
    if _watched is None:
        return
    folder, done = _watched
    if event in FORBIDDEN:
        done.append(f"{event} {arguments}")
    elif event == "open" and isinstance(arguments[0], (str, bytes)):
        path, mode, flags = arguments
        writes = any(c in (mode or "") for c in "wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        allowed = Path(os.fsdecode(path)).is_relative_to(folder) or os.fsdecode(path) == os.devnull
        if writes and not allowed and "__pycache__" not in os.fsdecode(path):
            done.append(f"open {path!r} {mode}")


sys.addaudithook(_note)


@contextmanager
def watched(folder):
    """Raise if what happens inside does more than read, and write into ``folder``."""
    global _watched
    done = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    previous = signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # a busy machine does not stretch it
    _watched = (Path(folder), done)
    try:
        yield
    finally:
        _watched = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
    assert not done, done
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3  # KB on Linux
    assert grown < MEGABYTES, f"took {grown:.0f} MB"


def _too_long(signum, frame):
    raise AssertionError(f"took more than {SECONDS} s of CPU time")


def fuzz(strategy, check, folder, cases):
    """Give ``check`` that many cases of ``strategy``, always the same; return how many it got."""
    count = 0

    @settings(
        max_examples=cases,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def search(case):
        nonlocal count
        count += 1
        with watched(folder):
            check(case)

    search()
    return count
