import re
import subprocess
import sys

from conftest import ROOT


def test_the_demo_trains_reloads_and_prints_one_table(tmp_path):
    text = (ROOT / "configs" / "demo.yaml").read_text()
    for option, value in (
        ("\n  epochs: .*", "\n  epochs: 1"),
        ("train_size: .*", "train_size: 32\n  max_train_samples: 400"),
    ):
        text, count = re.subn(option, value, text)
        assert count == 1
    (tmp_path / "small.yaml").write_text(text)
    command = [sys.executable, "-m", "tinytl_hf.deploy.quickstart", "small.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("MobileNetV2 on handwritten digits") :]
    rows = re.findall(r"^(\S+) +([\d.]+)% +([\d,]+) +([\d.]+) MB +(\d+)  (\S+)$", table, re.M)
    assert [row[0] for row in rows] == ["FT-Last", "TinyTL-L+B"]
    assert rows[0][2] == "12,810" and all((tmp_path / row[5] / "adapter").is_dir() for row in rows)
    assert "Next: .venv/bin/tinytl-hf" in table
