"""Places where nothing can be written, or not all of what belongs together, be it that a person stops it between."""

from contextlib import nullcontext

import pytest
import torch
from shared import run_cli, small_run

from tinytl_hf import TinyTLError
from tinytl_hf.deploy.exported import described_by, write_with_description
from tinytl_hf.disk import check_writable

FULL = OSError(28, "No space left on device")


@pytest.fixture
def full_after(monkeypatch):
    """Let the disk take one file more, and fail at the next."""

    def fail(error=FULL, files=1):
        written = iter(range(files))

        def sync(descriptor):
            if next(written, None) is None:
                raise error

        monkeypatch.setattr("os.fsync", sync)

    return fail


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()])
@pytest.mark.parametrize("files", [0, 1, 2])
def test_an_adapter_that_is_saved_over_another_leaves_that_one_as_it_was(
    error, files, make_model, tmp_path, full_after
):
    model = make_model("FT-Last", label_names=list("abcd"))
    model.save_pretrained(tmp_path / "adapter")
    before = files_of(tmp_path / "adapter")
    other = make_model("FT-Last", label_names=list("dcba"))
    with torch.no_grad():
        next(other.trainable_parameters()).add_(1)
    full_after(error, files)
    with pytest.raises((TinyTLError, KeyboardInterrupt), match="No space left" if error is FULL else None):
        other.save_pretrained(tmp_path / "adapter")
    assert files_of(tmp_path / "adapter") == before


def test_an_adapter_that_is_pulled_over_another_leaves_that_one_as_it_was(server, make_model, tmp_path, full_after):
    make_model("FT-Last", label_names=list("abcd")).push_to_hub("me/flowers")
    make_model("FT-Last", label_names=list("dcba")).save_pretrained(tmp_path / "mine")
    before = files_of(tmp_path / "mine")
    full_after()
    done = run_cli("pull", "--repo", "me/flowers", "--output", tmp_path / "mine", "--overwrite")
    assert done.returncode == 1 and "cannot be written ([Errno 28] No space left" in done.stderr
    assert files_of(tmp_path / "mine") == before


def test_a_pte_file_and_its_description_are_replaced_together(tmp_path, full_after):
    path = tmp_path / "model.pte"
    write_with_description(path, b"one", {"labels": ["one"]})
    before = files_of(tmp_path)
    full_after()
    with pytest.raises(TinyTLError, match=f"{path}: cannot be written"):
        write_with_description(path, b"two", {"labels": ["two"]})
    assert files_of(tmp_path) == before and described_by(path).name in before


@pytest.mark.parametrize(
    ("place", "can"),
    [
        *[("new/in/it/x.onnx", True), ("x.onnx", True), ("file/x.onnx", False), ("file/in/x.onnx", False)],
        *[(f"{'n' * 300}/x.onnx", False), (f"new/{'n' * 300}.onnx", False)],
    ],
)
def test_trying_that_a_file_can_be_written_leaves_nothing_behind(place, can, tmp_path):
    (tmp_path / "file").write_text("mine")
    with nullcontext() if can else pytest.raises(OSError):
        check_writable(tmp_path / place)
    assert files_of(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["eval", "--adapter", "adapter"], "output=/proc/figures.json"),
        (["memory", "--methods", "[FT-Last]", "--backbone.weights", "none"], "plot=/proc/bars.png"),
        (["fit", "--memory_mb", "64", "--backbone.weights", "none"], "output=/proc/fitted.yaml"),
    ],
)
def test_a_file_that_cannot_be_written_ends_the_command_before_it_measures(
    words, option, make_model, tmp_path, monkeypatch
):
    make_model("FT-Last").save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tinytl_hf.measure.accuracy.load_metrics", lambda names: pytest.fail("too late"))
    monkeypatch.setattr("tinytl_hf.measure.memory.photo_size_of", lambda *_: pytest.fail("too late"))
    monkeypatch.setattr("tinytl_hf.train.fit.open_data", lambda *_: pytest.fail("too late"))
    name, _, path = option.partition("=")
    done = run_cli(*words, f"--{name}", path)
    assert done.returncode == 1 and f"{option}: cannot be written" in done.stderr


@pytest.mark.parametrize(
    ("before", "fix"), [(1, "go on from the one before with --train.resume auto"), (0, "start it again")]
)
def test_a_checkpoint_that_has_no_room_says_how_to_go_on(before, fix, colour_folder, tmp_path, monkeypatch):
    def sync(_):
        if len(list((tmp_path / "run/checkpoints").glob("step_*"))) == before:
            raise FULL

    monkeypatch.setattr("tinytl_hf.train.checkpoint.sync", sync)
    done = run_cli(*small_run(colour_folder, tmp_path / "run", "--method", "FT-Last", "--train.epochs", "3"))
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.endswith(f"No space left on device); make room and {fix}"), last
