"""All seven methods under one budget: tune the learning rate of each, train it with three seeds, publish the runs.

    python model_cards/comparison.py tune
    python model_cards/comparison.py run
    python model_cards/comparison.py publish
    python model_cards/comparison.py memory
    python model_cards/comparison.py draw

From the root of the repository. Every step leaves out what is done already and goes on with what was cut off, so it
can be stopped at any time. Options of ``tinytl-hf train`` at the end of the line are passed on, such as
``--data.dataset path/to/cifar10``. The step memory measures what has been published again, with the engine as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import defaults
import yaml

from tinytl_hf.config.verbs import CompareConfig
from tinytl_hf.reports.plots import draw_confusion, draw_curves

CONFIG = "configs/cifar10_comparison.yaml"
CARDS = Path("model_cards")
TUNED = CARDS / "tuning.json"
SEEDS = (0, 1, 2)
CARD_SEED = "seed0"
LEARNING_RATES = {
    "FT-Last": (1e-3, 3e-3, 1e-2),
    "TinyTL-B": (1e-3, 2e-3, 5e-3, 1e-2),
    "TinyTL-L": (1e-3, 2e-3, 4e-3),
    "TinyTL-L+B": (1e-3, 2e-3, 4e-3),
    "FT-Norm+Last": (1e-3, 3e-3, 1e-2),
    "FT-Full": (2e-4, 5e-4, 1e-3),
    "FT-Layerwise": (5e-4, 1e-3, 2e-3, 4e-3),
}
# glibc then keeps a step's memory for the next, in place of page faults for each large map; stock gains most.
KEEPS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
# Tuning never sees the test set: a part of the training set to learn from, another to choose by.
TUNING = ["--data.eval_split", "holdout", "--data.max_train_samples", "15000", "--data.max_eval_samples", "2500"]
TUNING += ["--data.eval_size", "96", "--train.epochs", "1", "--memory.report", "false"]


def main() -> None:
    """Tune, train what has been tuned, publish what has been trained, or measure or draw what has been published."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("tune", "run", "publish", "memory", "draw"))
    parser.add_argument("--output", type=Path, default=Path("runs/comparison"), help="folder of the runs")
    parser.add_argument("--methods", nargs="+", choices=LEARNING_RATES, default=list(LEARNING_RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    options, passed_on = parser.parse_known_args()
    if options.step == "tune":
        for method in options.methods:
            tune(method, options.output / method, passed_on)
    elif options.step == "run":
        for seed in options.seeds:
            for method in options.methods:
                if not (CARDS / "runs" / method / f"seed{seed}").is_dir():
                    run_seed(options.output / method, method, seed, passed_on)
    elif options.step == "memory":
        for method in options.methods:
            measured = None  # once for all seeds
            for run in sorted((CARDS / "runs" / method).glob("seed*")):
                measured = measured or measure_memory(run / "config.yaml", method)
                (run / "memory.json").write_text(measured)
    else:
        if options.step == "publish":
            publish(options.output)
        draw()
        for name in defaults.SETS:
            defaults.draw(name)


def run_verb(*words: str) -> str:
    """Run a verb in a process of its own, and give what it printed."""
    command = [sys.executable, "-m", "tinytl_hf", *words]
    environment = {**os.environ, **KEEPS_MEMORY}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def run_seed(folder: Path, method: str, seed: int, more: list[str]) -> None:
    """Train a method with a seed; its step's memory is measured once, as no seed changes it."""
    run, first = folder / f"seed{seed}", folder / CARD_SEED
    is_measured = run != first and has_stock(first)
    report = ["--memory.report", "false"] if is_measured else []
    train(run, method, read_tuning()[method]["best"], ["--seed", str(seed), *report, *more])
    if is_measured:
        copy(first, run, "memory.json")
    elif not has_stock(run):
        (run / "memory.json").write_text(measure_memory(run / "config.yaml", method))


def train(folder: Path, method: str, lr: float, more: list[str]) -> None:
    """Train into ``folder``, unless that holds a finished run."""
    if not (folder / "adapter" / "eval_results.json").is_file():  # among the last things that a run writes
        words = ["train", "--config", CONFIG, "--output_dir", str(folder), "--method", method]
        run_verb(*words, "--train.lr", str(lr), "--train.resume", "auto", *more)


def has_stock(run: Path) -> bool:
    """Whether stock PyTorch's training step stands beside the one that the run has measured."""
    measured = run / "memory.json"
    return measured.is_file() and len(json.loads(measured.read_text())["rows"]) > 1


def measure_memory(config: Path, method: str) -> str:
    """What the training step takes, stock and lean, from the decoded images of CIFAR-10 on."""
    batch = yaml.safe_load(config.read_text())["train"]["global_batch_size"]
    words = ["memory", "--config", str(config), "--methods", f"[{method}]", "--photo_size", "32x32"]
    return run_verb(*words, "--batch_size", str(batch), "--json")


def tune(method: str, folder: Path, more: list[str]) -> None:
    """Try the method's learning rates and write what each gave, and which was best."""
    tuning = read_tuning()
    accuracy = tuning.get(method, {}).get("accuracy", {})
    for lr in LEARNING_RATES[method]:
        if f"{lr:g}" not in accuracy:
            train(folder / f"lr{lr:g}", method, lr, [*TUNING, *more])
            accuracy[f"{lr:g}"] = json.loads((folder / f"lr{lr:g}" / "eval_results.json").read_text())["accuracy"]
    tuning[method] = {"best": float(max(accuracy, key=accuracy.__getitem__)), "accuracy": accuracy}
    TUNED.write_text(json.dumps(tuning, indent=2) + "\n")


def read_tuning() -> dict[str, Any]:
    """What has been tuned, by method."""
    return json.loads(TUNED.read_text()) if TUNED.is_file() else {}


def publish(runs: Path) -> None:
    """Copy the raw figures of finished runs and a card of each method here."""
    for results in sorted(runs.glob("*/seed*/adapter/eval_results.json")):
        run, method = results.parents[1], results.parents[2].name
        if not has_stock(run):
            continue  # stopped before stock's memory was measured; the step run goes on there
        copy(run, CARDS / "runs" / method / run.name, "config.yaml", "metrics.jsonl", "memory.json")
        copy(run / "adapter", CARDS / "runs" / method / run.name, "eval_results.json")  # says nothing of the machine
        if run.name == CARD_SEED:
            copy(run / "adapter", CARDS / method, "README.md", "eval_results.json")


def draw() -> None:
    """Draw every table and picture from what has been published."""
    from tinytl_hf.reports.compare import compare  # torch comes with it, which the other steps do without
    from tinytl_hf.reports.finished_run import read_run

    published = [run for method in LEARNING_RATES for run in sorted(CARDS.glob(f"runs/{method}/seed*"))]
    if not published:
        sys.exit(f"{CARDS}/runs holds no run: publish finished ones first")
    print(compare(CompareConfig(output=str(CARDS / "comparison")), map(str, published))[0])
    for run in map(read_run, published):
        if run.folder.name == CARD_SEED:
            (CARDS / run.method / "curves.png").write_bytes(draw_curves({run.method: run.epochs}))
            matrix = draw_confusion(run.results["confusion_matrix"], run.results["label_names"])
            (CARDS / run.method / "confusion_matrix.png").write_bytes(matrix)


def copy(source: Path, target: Path, *names: str) -> None:
    """Copy files into a folder that is made if there is none."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(source / name, target / name)


if __name__ == "__main__":
    main()
