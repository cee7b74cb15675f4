"""What is measured in a process of its own: it ends with the one that asked, and has only the memory that there is."""

import multiprocessing
import os
import signal
import sys
import time

import pytest
import torch
from shared import run_cli
from started_runs import CONTEXT

from tinytl_hf.measure import memory
from tinytl_hf.measure.own_process import in_own_process

FORKS = multiprocessing.get_context("fork")  # they wait only, so what torch has open does not matter


def say_and_wait(file):
    with open(file, "w") as opened:
        opened.write(f"{os.getpid()} ")
    time.sleep(60)


def ask(file):
    in_own_process(FORKS, say_and_wait, file)


def wait_until(holds):
    for _ in range(200):
        if holds():
            return True
        time.sleep(0.1)
    return False


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_it_ends_when_the_one_that_asked_is_killed(tmp_path):
    file = tmp_path / "pid"
    asking = FORKS.Process(target=ask, args=(str(file),))
    asking.start()
    assert wait_until(lambda: file.is_file() and file.read_text().endswith(" "))
    measuring = int(file.read_text())
    asking.kill()
    asking.join()
    try:
        assert wait_until(lambda: not is_alive(measuring))
    finally:
        if is_alive(measuring):
            os.kill(measuring, signal.SIGKILL)


def ask_for_too_much():
    torch.empty(2**60, dtype=torch.uint8)


def end_at_once():
    os._exit(9)


@pytest.mark.parametrize("function", [ask_for_too_much, end_at_once])
def test_memory_that_is_not_there_is_one_kind_of_error(function):
    with pytest.raises(MemoryError):
        in_own_process(CONTEXT, function)


def start_a_further_one():
    process = CONTEXT.Process(target=exec, args=("import sys; sys.exit('torch' in sys.modules)",))
    process.start()
    process.join()
    sys.exit(process.exitcode)


def test_a_process_of_the_tests_starts_further_ones_as_a_command_does():
    process = CONTEXT.Process(target=start_a_further_one)
    process.start()
    process.join(60)
    try:
        assert process.exitcode == 0
    finally:
        process.kill()


def test_memory_and_bench_say_that_a_batch_does_not_fit(monkeypatch):
    monkeypatch.setattr(memory, "get_context", lambda _: CONTEXT)
    small = ["--backbone.weights", "none", "--data.train_size", "32"]
    done = run_cli("memory", *small, "--methods", "[FT-Last]", "--batch_size", 10**12)
    assert done.returncode == 1 and f"batch_size={10**12}: this machine has not enough memory" in done.stderr
    monkeypatch.setattr("tinytl_hf.measure.speed.get_context", lambda _: CONTEXT)
    done = run_cli("bench", *small, "--train_sizes", "[32]", "--batch_sizes", f"[{10**12}]")
    assert done.returncode == 1 and f"32 px, batch {10**12}: this machine has not enough memory for it" in done.stderr


def test_memory_of_no_method_is_refused():
    done = run_cli("memory", "--methods", "[]")
    assert done.returncode == 1 and done.stderr == "tinytl-hf: error: methods=[]: name one or more, or null for all\n"
