"""`make demo`, on fewer images: in this process, and (slow) in processes of its own as the Makefile starts it."""

import re
import subprocess
import sys

import pytest
from shared import ROOT, run_cli
from started_runs import HANG

from tinytl_hf.deploy import quickstart


def write_small_config(folder, images):
    text = (ROOT / "configs" / "demo.yaml").read_text()
    for option, value in (
        ("\n  epochs: .*", "\n  epochs: 1"),
        ("global_batch_size: .*", f"global_batch_size: {min(images, 64)}"),
        ("train_size: .*", f"train_size: 32\n  max_train_samples: {images}\n  max_eval_samples: {images}"),
    ):
        text, count = re.subn(option, value, text)
        assert count == 1
    (folder / "small.yaml").write_text(text)


def check_table(printed, folder):
    table = printed[printed.index("MobileNetV2 on handwritten digits") :]
    rows = re.findall(r"^(\S+) +([\d.]+)% +([\d,]+) +([\d.]+) MB +(\d+) +(\S+)$", table, re.M)
    assert [row[0] for row in rows] == ["FT-Last", "TinyTL-L+B"]
    assert rows[0][2] == "12,810" and all((folder / row[5] / "adapter").is_dir() for row in rows)
    assert "Next: .venv/bin/tinytl-hf" in table


def test_the_demo_trains_reloads_and_prints_one_table(tmp_path, monkeypatch, capsys):
    def run_here(*words):
        arguments = words[words.index("tinytl_hf") + 1 :]
        done = run_cli(*arguments, *(["--memory.report", "false"] if arguments[0] == "train" else []))
        assert done.returncode == 0, done.stderr

    write_small_config(tmp_path, images=8)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "_run", run_here)
    monkeypatch.setattr(sys, "argv", ["quickstart", "small.yaml"])
    quickstart.main()
    check_table(capsys.readouterr().out, tmp_path)


@pytest.mark.slow
def test_the_demo_in_processes_of_its_own(tmp_path):
    write_small_config(tmp_path, images=400)
    command = [sys.executable, "-m", "tinytl_hf.deploy.quickstart", "small.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=HANG)
    assert done.returncode == 0, done.stderr
    check_table(done.stdout, tmp_path)
