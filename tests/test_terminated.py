"""Commands that a signal ends: nothing half-written stays, of what was there before nothing is lost."""

import signal
import subprocess
import sys

import pytest
from shared import run_cli, slow, small_run
from started_runs import run

from tinytl_hf.errors import Terminated
from tinytl_hf.hub.transfer import folder_to_push

TIMM = ("export", "--format", "timm", "--check_images", "2")
ONNX = ("export", "--format", "onnx", "--quantize", "int8")


@pytest.fixture(scope="module")
def finished(colour_folder, tmp_path_factory):
    """A finished run."""
    root = tmp_path_factory.mktemp("finished")
    done = run_cli(*small_run(colour_folder, root / "run", "--method", "FT-Last", "--train.epochs", "1"))
    assert done.returncode == 0, done.stderr
    return root / "run"


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("is_there", [False, slow(True)])
@pytest.mark.parametrize(
    ("words", "output", "place"),
    [
        (TIMM, "model", ("tinytl_hf.deploy.timm_repo", "compare", 1)),
        (TIMM, "model", ("os", "fsync", 2)),
        slow(ONNX, "model.onnx", ("onnxruntime.quantization", "quantize_static", 1)),
        (("merge",), "model.safetensors", ("os", "fsync", 1)),
        (("eval",), "figures.json", ("tinytl_hf.measure.accuracy", "compute_logits", 1)),
        (("eval",), "figures.json", ("os", "fsync", 1)),
        (("compare",), "table", ("os", "fsync", 4)),
        (("report",), "page.html", ("os", "fsync", 1)),
    ],
)
def test_a_command_that_is_terminated_leaves_what_was_there(words, output, place, is_there, finished, tmp_path):
    signum = signal.SIGHUP if is_there else signal.SIGTERM
    (temporary := tmp_path / "tmp").mkdir()
    (target := tmp_path / "out").mkdir()
    (target / "mine.txt").write_text("mine")
    options = [finished] if words[0] in ("compare", "report") else ["--adapter", finished / "adapter"]
    words = [*words, *options, "--output", target / output]
    if is_there:
        done = run_cli(*words)
        assert done.returncode == 0, done.stderr
        words += ["--overwrite"] * (words[0] in ("export", "merge"))
    before = tree(target)
    done = run(words, tmp_path / "log", kill=(*place, signum), environment={"TMPDIR": temporary})
    assert done.returncode == 128 + signum and "tinytl-hf: terminated\n" in done.stderr, done.stderr
    assert tree(target) == before and not list(temporary.glob("tinytl*"))  # onnxruntime leaves a file of its own


def test_a_signal_that_is_ignored_stays_ignored(finished, tmp_path):
    code = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); from tinytl_hf import cli, commands; "
        "from tinytl_hf.reports import page; write = page.write_text; "
        "page.write_text = lambda *a: (os.kill(os.getpid(), signal.SIGHUP), write(*a)); cli.main(sys.argv[1:])"
    )
    words = [sys.executable, "-c", code, "report", finished, "--output", tmp_path / "page.html"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / 'page.html'}\n"


def test_the_signals_are_as_before_after_a_command(capsys):
    before = signal.getsignal(signal.SIGTERM)
    run_cli("--version")
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_was_saved_to_be_pushed_stays_where_the_push_failed_alone(tmp_path, monkeypatch, make_model):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(Terminated), folder_to_push() as folder:
        make_model("FT-Last").save_pretrained(folder)
        raise Terminated(signal.SIGTERM)
    assert tree(tmp_path) == {}


def test_an_export_whose_temporary_folder_is_full_says_so(finished, tmp_path):
    words = [*TIMM, "--adapter", finished / "adapter", "--output", tmp_path / "out" / "model"]
    (temporary := tmp_path / "tmp").mkdir()
    done = run(words, tmp_path / "log", limit=300_000, environment={"TMPDIR": temporary})
    assert done.returncode == 1 and f"there is no room in {temporary} to try it out" in done.stderr, done.stderr
    assert tree(tmp_path / "out") == {} and not list(temporary.glob("tinytl*"))
