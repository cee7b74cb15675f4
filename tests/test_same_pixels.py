"""A run, ``eval`` and ``predict`` show the network the same pixels, whatever the photo's size."""

import json
import math

import pytest
import torch
from shared import run_cli, small_run, write_image

from tinytl_hf import TinyTLModel

SIZES = [(60, 40), (41, 57), (130, 130), (150, 420), (257, 1100), (640, 480), (1500, 1000), (3000, 2000)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for number in range(8):
        write_image(root / "train" / "ab"[number % 2] / f"{number}.png", seed=number)
    for number, size in enumerate(SIZES):
        write_image(root / "test" / "ab"[number % 2] / f"{number}.png", size=size, seed=100 + number)
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("train_size", "eval_size"), [(32, 96), pytest.param(96, 32, marks=pytest.mark.slow)])
def test_a_run_eval_and_predict_give_the_same_figures_of_photos_of_all_sizes(train_size, eval_size, photos, tmp_path):
    options = ["--method", "FT-Last", "--train.epochs", "1", "--train.lr", "1e-2", "--train.warmup_epochs", "0"]
    sizes = ["--data.train_size", train_size, "--data.eval_size", eval_size]
    done = run_cli(*small_run(photos, tmp_path / "run", *options, *sizes))
    assert done.returncode == 0, done.stderr
    again, adapter = tmp_path / "again.json", tmp_path / "run" / "adapter"
    assert run_cli("eval", "--adapter", adapter, "--batch_size", "3", "--output", again).returncode == 0
    done = run_cli("predict", "--adapter", adapter, "--json", "--top_k", "2", photos / "test")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    of_true_class = [
        next(label["probability"] for label in line["labels"] if label["label"] == line["image"].split("/")[-2])
        for line in lines
    ]
    loss = sum(-math.log(probability) for probability in of_true_class) / len(SIZES)
    first, second = (json.loads(path.read_text()) for path in (tmp_path / "run" / "eval_results.json", again))
    assert first["n"] == second["n"] == len(lines) == len(SIZES)
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-5) and loss == pytest.approx(first["loss"], rel=1e-5)
    assert second["confusion_matrix"] == first["confusion_matrix"]
    model = TinyTLModel.from_pretrained(adapter).eval()
    with torch.no_grad():
        probabilities = model(model.preprocess([line["image"] for line in lines])).softmax(1)
    true = torch.tensor([model.label_names.index(line["image"].split("/")[-2]) for line in lines])
    assert probabilities[range(len(lines)), true].tolist() == pytest.approx(of_true_class, rel=1e-5)
