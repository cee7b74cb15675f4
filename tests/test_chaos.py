"""Runs that are killed at any moment, that find the disk full, or that cannot write: nothing is lost."""

import random
import shutil
import signal
import subprocess
import time

import pytest
from shared import small_run
from started_runs import ADAPTERS, Run, checkpoints, run

from tinytl_hf.train.checkpoint import find_damage

OPTIONS = ["--train.global_batch_size", "4", "--head.dropout", "0.2", "--train.checkpoint_every", "1"]
OPTIONS += ["--train.threads", "1", "--train.resume", "auto"]
# A schedule that is the same whatever the number of epochs.
OPTIONS += ["--train.schedule", "exponential", "--train.warmup_epochs", "0"]
KILLS = 20
# Where a save can be cut: while files are written, synced, renamed or removed.
IN_A_SAVE = [
    *(("torch", "save"), ("tinytl_hf.train.checkpoint", "save_file"), ("tinytl_hf.train.checkpoint", "_seal")),
    *(("os", "fsync"), ("os", "replace"), ("shutil", "rmtree")),
]


def adapters(folder):
    return {name: (folder / name / "adapter_model.safetensors").read_bytes() for name in ADAPTERS}


@pytest.fixture(scope="module")
def straight(colour_folder, tmp_path_factory):
    """A run of twelve epochs in one go."""
    root = tmp_path_factory.mktemp("straight")
    done = run(small_run(colour_folder, root / "run", *OPTIONS, "--train.epochs", "12"), root / "log")
    assert done.returncode == 0, done.stderr
    return root / "run"


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_adapters(straight, colour_folder, tmp_path, figure):
    arguments = small_run(colour_folder, tmp_path / "run", *OPTIONS, "--train.epochs", "12")
    chance = random.Random(0)
    places = []
    while len(places) < KILLS:
        if len(places) % 2:
            place = chance.choice(IN_A_SAVE)
            done = run(arguments, tmp_path / "log", pictures=True, kill=(*place, chance.randint(1, 12)))
        else:
            place = "a moment"
            started = Run(arguments, tmp_path / "log", pictures=True)
            time.sleep(chance.uniform(0.5, 4))
            started.kill()
            done = started.wait()
        if done.returncode == 0:  # it was faster than the kill: once more from the start
            assert adapters(tmp_path / "run") == adapters(straight)
            shutil.rmtree(tmp_path / "run")
            continue
        assert done.returncode == -signal.SIGKILL, done.stderr
        places.append(place)
    done = run(arguments, tmp_path / "log", pictures=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert adapters(tmp_path / "run") == adapters(straight)
    in_saves = sum(place != "a moment" for place in places)
    figure(f"kills survived: {len(places)}, of which inside a save: {in_saves}")


# Two checkpoints an epoch.
COARSE = [*OPTIONS, "--train.global_batch_size", "12"]


@pytest.fixture(scope="module")
def two_epochs(colour_folder, tmp_path_factory):
    """The adapters of a run that nothing disturbs."""
    root = tmp_path_factory.mktemp("two_epochs")
    done = run(small_run(colour_folder, root / "run", *COARSE), root / "log")
    assert done.returncode == 0, done.stderr
    return adapters(root / "run")


def check_refused_write(data, folder, tmp_path, straight, spoil=lambda: None, mend=lambda: None, growth=None):
    """Spoil writing after the first epoch: one line, the last checkpoint stays, and the run can go on to its end."""
    arguments = small_run(data, folder, *COARSE, "--train.epochs")
    done = run([*arguments, 1], tmp_path / "log", pictures=True)
    assert done.returncode == 0, done.stderr
    before = {path: path.stat().st_mtime for path in checkpoints(folder)}
    limit = growth and int(growth * (checkpoints(folder)[-1] / "delta.safetensors").stat().st_size)
    spoil()
    done = run([*arguments, 2], tmp_path / "spoilt.log", pictures=True, limit=limit)
    mend()
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("tinytl-hf: error: ")]
    assert f"output_dir={folder}" in error and "cannot be written" in error and "unexpected" not in error
    assert {path: path.stat().st_mtime for path in checkpoints(folder)} == before
    assert [find_damage(path) for path in before] == [None, None]
    done = run([*arguments, 2], tmp_path / "mended.log", pictures=True)
    assert done.returncode == 0, done.stderr
    assert adapters(folder) == straight


# Times the delta: AdamW's moments are twice as large.
@pytest.mark.slow
@pytest.mark.parametrize("growth", [0.5, 1.5])
def test_files_that_cannot_grow_end_a_run_with_one_line(growth, two_epochs, colour_folder, tmp_path):
    check_refused_write(colour_folder, tmp_path / "run", tmp_path, two_epochs, growth=growth)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 40 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("free", [500_000, 2_000_000, 3_000_000])
def test_a_full_disk_ends_a_run_with_one_line(free, small_disk, two_epochs, colour_folder, tmp_path):
    ballast = small_disk / "ballast"

    def fill():
        with ballast.open("wb") as file:
            room = shutil.disk_usage(small_disk).free - free
            file.write(b"\1" * room)

    check_refused_write(colour_folder, small_disk / "run", tmp_path, two_epochs, fill, ballast.unlink)


@pytest.mark.slow
def test_a_disk_that_turned_read_only_ends_a_run_with_one_line(small_disk, two_epochs, colour_folder, tmp_path):
    def remount(mode):
        return lambda: subprocess.run(["mount", "-o", f"remount,{mode}", small_disk], check=True)

    check_refused_write(colour_folder, small_disk / "run", tmp_path, two_epochs, remount("ro"), remount("rw"))


def test_a_folder_that_cannot_be_made_ends_a_run_before_it_starts(colour_folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    done = run(small_run(colour_folder, tmp_path / "file" / "run", *OPTIONS), tmp_path / "log")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    message = f"output_dir={tmp_path / 'file' / 'run'}: {tmp_path / 'file'} is a file; choose a folder"
    assert message in done.stderr.splitlines()[-1]
    assert (tmp_path / "file").read_text() == "mine"
