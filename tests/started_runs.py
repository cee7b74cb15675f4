"""Training runs in processes of their own, forked from one that has imported everything, and what they leave."""

import faulthandler
import importlib
import itertools
import json
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from multiprocessing import forkserver, util
from unittest.mock import patch

import torch
from accelerate.utils.other import load
from safetensors.torch import load_file

CONTEXT = multiprocessing.get_context("forkserver")
IMPORTED = [
    *("tinytl_hf.cli", "tinytl_hf.train.loop", "tinytl_hf.lean.native_backend"),
    *("matplotlib.backends.backend_agg", "jinja2"),
]
CONTEXT.set_forkserver_preload(IMPORTED)


def _fork(path, arguments, descriptors, spawn=util.spawnv_passfds):
    """Start the server of forks as a fork of this process, in place of an interpreter that imports all again."""
    code = arguments[-1]
    if "forkserver" not in code:
        return spawn(path, arguments, descriptors)
    process = os.fork()
    if process:
        return process
    try:
        faulthandler.disable()
        logging.getLogger().handlers.clear()
        # Files and pipes of the test runner lead nowhere from here on. Their numbers stay taken: an object that still
        # has one may close it.
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in {int(name) for name in os.listdir("/dev/fd")} - {0, 1, 2, nowhere, *descriptors}:
            with suppress(OSError):  # that of the list itself
                os.fstat(descriptor)
                os.dup2(nowhere, descriptor)
        # What runs here may start a server of its own: a fresh interpreter, as in a command. The lock that the process
        # above holds while it starts this one would be held for ever in the copy.
        util.spawnv_passfds = spawn
        importlib.reload(forkserver)
        exec(code)
    finally:
        os._exit(1)


def start_server():
    """Start it while no network has been trained here: after a backward pass a fork cannot train any more."""
    for name in IMPORTED:
        importlib.import_module(name)
    with patch.object(util, "spawnv_passfds", _fork):
        forkserver.ensure_running()


HANG = 600  # seconds after which something that should end is taken to hang
TIMINGS = ("seconds", "images_per_second")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def in_two_processes(target, *arguments):
    """Call ``target(rank, port, *arguments)`` in two processes at a time; the exit codes of both."""
    port = free_port()
    processes = [CONTEXT.Process(target=target, args=(rank, port, *arguments)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(HANG)
    return [process.exitcode for process in processes]


def as_launched(rank, processes, port):
    """What a launcher puts into the environment of one of its processes."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    return {name: str(value) for name, value in {**values, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items()}


class Run:
    """A command of the command line in one process or several.

    Args:
        arguments: What would follow ``tinytl-hf``.
        log: File that gets what the first process prints; ``log.1`` is that of the second, and so on.
        processes: How many of them.
        kill: ``(module, function, n)``: the last process kills itself at the n-th call of that function; a fourth
            value is the signal.
        environment: Further environment variables.
        limit: Bytes that a file can grow to.
        pictures: Whether it draws them, which takes as long as all the rest of a small run.
    """

    def __init__(self, arguments, log, processes=1, kill=None, environment=None, limit=None, pictures=False):
        arguments = [str(argument) for argument in arguments]
        shared = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", **(environment or {})}
        port = free_port()
        self.log = log
        self.workers = []
        for rank in range(processes):
            own = {**shared, **as_launched(rank, processes, port)} if processes > 1 else shared
            own = {key: str(value) for key, value in own.items()}
            last = rank == processes - 1
            options = (arguments, own, f"{log}.{rank}" if rank else str(log), kill if last else None, limit, pictures)
            self.workers.append(CONTEXT.Process(target=_run, args=options))
            self.workers[-1].start()

    def wait(self, seconds=HANG):
        """Wait for the end; return the exit code of the first process that failed, or 0, and what was printed."""
        end = time.monotonic() + seconds
        while any(worker.is_alive() for worker in self.workers):
            failed = [worker for worker in self.workers if worker.exitcode]
            if failed:  # as a launcher would
                self.kill()
            assert time.monotonic() < end, f"no end after {seconds} s: {self.log.read_text()}"
            time.sleep(0.02)
        codes = [worker.exitcode for worker in self.workers if worker.exitcode]
        logs = [self.log, *(self.log.with_name(f"{self.log.name}.{rank}") for rank in range(1, len(self.workers)))]
        printed = "".join(log.read_text() for log in (logs if codes else logs[:1]))
        return subprocess.CompletedProcess(self.log, codes[-1] if codes else 0, stderr=printed)

    def kill(self):
        for worker in self.workers:
            worker.kill()

    def signal(self, signum):
        os.kill(self.workers[0].pid, signum)


def run(*arguments, **options):
    """Start a run and wait for its end."""
    return Run(*arguments, **options).wait()


def _run(arguments, environment, log, kill, limit, pictures):
    os.environ.update(environment)
    tempfile.tempdir = None  # it is looked for again in this environment
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for what runs in the background
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup this one
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
    if kill is not None:
        _kill_at(*kill)
    if limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    from tinytl_hf.cli import main

    with nullcontext() if pictures else patch("tinytl_hf.train.loop.draw_pictures"):
        main(arguments)


def _kill_at(module, name, number, signum=signal.SIGKILL):
    module = importlib.import_module(module)
    original, calls = getattr(module, name), itertools.count(1)

    def counted(*arguments, **options):
        if next(calls) == number:
            os.kill(os.getpid(), signum)
        return original(*arguments, **options)

    setattr(module, name, counted)


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def delta(run, name="adapter_last"):
    return load_file(run / name / "adapter_model.safetensors")


def checkpoints(run):
    return sorted((run / "checkpoints").glob("step_*"))


def state(run):
    """Everything of a run that does not depend on the time it took: figures, adapters, the newest checkpoint."""
    newest = checkpoints(run)[-1]
    files = {path.name: load(path) for path in newest.iterdir() if path.suffix in (".bin", ".pkl")}
    progress = json.loads((newest / "progress.json").read_text())["progress"]
    return {
        "files": files,
        "delta": load_file(newest / "delta.safetensors"),
        "progress": _without_timings(progress),
        "metrics": _without_timings(metrics(run)),
        "adapters": {name: (run / name / "adapter_model.safetensors").read_bytes() for name in ADAPTERS},
        "results": _without_timings(json.loads((run / "eval_results.json").read_text())),
    }


ADAPTERS = ("adapter", "adapter_last")


def _without_timings(value):
    if isinstance(value, list):
        return [_without_timings(item) for item in value]
    if isinstance(value, dict):
        return {k: _without_timings(v) for k, v in value.items() if k not in TIMINGS and not k.startswith("_")}
    return value


def differences(first, second, where=""):
    """Where two nested values are not the same to the last bit."""
    if type(first) is not type(second):
        return [f"{where}: {type(first)} and {type(second)}"]
    if isinstance(first, dict):
        keys = first.keys() | second.keys()
        return [d for key in keys for d in differences(first.get(key), second.get(key), f"{where}/{key}")]
    if isinstance(first, (list, tuple)):
        if len(first) != len(second):
            return [f"{where}: {len(first)} and {len(second)} items"]
        return [
            d for i, pair in enumerate(zip(first, second, strict=True)) for d in differences(*pair, f"{where}/{i}")
        ]
    same = torch.equal(first, second) if isinstance(first, torch.Tensor) else (first == second)
    return [] if (same if isinstance(same, bool) else same.all()) else [f"{where} differs"]
