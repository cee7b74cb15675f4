"""Options that do nothing beside others, and counts in words: a run says the first, and says the second rightly."""

import logging
from dataclasses import replace

import pytest
import yaml
from shared import ROOT, run_cli, small_run

from tinytl_hf import TinyTLError
from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.fit import FitConfig
from tinytl_hf.config.hub import HubConfig
from tinytl_hf.config.network import BackboneConfig, LiteConfig
from tinytl_hf.config.recipe import describe, resolve, warmup_steps
from tinytl_hf.config.run import AdapterOptions, Config, MemoryConfig
from tinytl_hf.config.train import LrFactors, TrainConfig
from tinytl_hf.config.verbs import BenchConfig, MemoryTableConfig
from tinytl_hf.data.sets import open_data
from tinytl_hf.device import check_divides
from tinytl_hf.measure.results import Evaluated
from tinytl_hf.network.methods import FACTOR_ROLES, METHODS
from tinytl_hf.network.trained_blocks import last_blocks
from tinytl_hf.train.idle import (
    Facts,
    check_trains,
    idle_options,
    rules_of_bench,
    rules_of_fit,
    rules_of_memory,
    rules_of_run,
    say_idle_of_data,
)
from tinytl_hf.train.plans import Plan
from tinytl_hf.train.schedule import lr_factor
from tinytl_hf.train.start import settle
from tinytl_hf.words import counted

DRAWN = Facts(steps=4)
WHOLE = Facts(steps=4, holds_out=False, draws=False)
RESUMED = Facts(steps=4, goes_on=True, in_place=True)


def trained(method="TinyTL-L+B", data=None, **options):
    return Config(method=method, train=TrainConfig(**options), data=data or DataConfig(train_size=64))


def idle(config, facts=DRAWN):
    """Names of the options that do nothing."""
    found = idle_options(config, rules_of_run(resolve(config, 2_000), facts))
    return [each.partition("=")[0] for each in found]


@pytest.mark.parametrize(
    ("config", "works", "name"),
    [
        (trained(gamma=0.5), trained(gamma=0.5, schedule="exponential"), "train.gamma"),
        (trained(momentum=0.5), trained(momentum=0.5, optimizer="sgd"), "train.momentum"),
        (trained("FT-Full", optimizer="muon"), trained("TinyTL-L", optimizer="muon"), "train.optimizer"),
        (
            trained(decay_norms_and_biases=True, weight_decay=0.0),
            trained(decay_norms_and_biases=True),
            "train.decay_norms_and_biases",
        ),
        (
            trained(schedule="exponential", epochs=1),
            trained(schedule="exponential", epochs=2),
            "train.schedule",
        ),
        (trained(max_grad_norm=float("inf")), trained(max_grad_norm=1.0), "train.max_grad_norm"),
        (trained(patience=4, epochs=5), trained(patience=3, epochs=5), "train.patience"),
        (trained(checkpoint_every=8, epochs=2), trained(checkpoint_every=7, epochs=2), "train.checkpoint_every"),
        (
            trained("FT-Last", gradient_checkpointing=True),
            trained("FT-Full", gradient_checkpointing=True),
            "train.gradient_checkpointing",
        ),
        (
            trained("TinyTL-L", lr_factors=LrFactors(biases=2.0)),
            trained("TinyTL-B", lr_factors=LrFactors(biases=2.0)),
            "train.lr_factors.biases",
        ),
        (
            trained("TinyTL-B", lr_factors=LrFactors(lite=2.0)),
            trained("TinyTL-L", lr_factors=LrFactors(lite=2.0)),
            "train.lr_factors.lite",
        ),
        (
            trained("FT-Last", DataConfig(crop_scale=(0.1, 1.0)), cache_features=True),
            trained("FT-Last", DataConfig(crop_scale=(0.1, 1.0))),
            "data.crop_scale",
        ),
        (
            trained(data=DataConfig(start_size=32, train_size=64), epochs=1),
            trained(data=DataConfig(start_size=32, train_size=64), epochs=2),
            "data.start_size",
        ),
        (
            trained(data=DataConfig(start_size=64, train_size=64)),
            trained(data=DataConfig(start_size=32, train_size=64)),
            "data.start_size",
        ),
        (
            Config(method="FT-Layerwise", backbone=BackboneConfig(frozen_weights="int8")),
            Config(method="FT-Layerwise", backbone=BackboneConfig(frozen_weights="int8"), trained_blocks=2),
            "backbone.frozen_weights",
        ),
        (
            Config(method="FT-Full", memory=MemoryConfig(backend="eager")),
            Config(method="FT-Full", memory=MemoryConfig(backend="eager"), trained_blocks=2),
            "memory.backend",
        ),
        (
            Config(memory=MemoryConfig(lean=False, slice_mb=3.0)),
            Config(memory=MemoryConfig(slice_mb=3.0)),
            "memory.slice_mb",
        ),
        (
            Config(method="FT-Norm+Last", lite=LiteConfig(norm="group")),
            Config(lite=LiteConfig(norm="group")),
            "lite.norm",
        ),
        (
            Config(train=TrainConfig(epochs=1), adapter=AdapterOptions(keep="last")),
            Config(train=TrainConfig(epochs=2), adapter=AdapterOptions(keep="last")),
            "adapter.keep",
        ),
        (Config(hub=HubConfig(repo="a/b")), Config(hub=HubConfig(push=True, repo="a/b")), "hub.repo"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_option_that_others_leave_nothing_to_do_is_named(config, works, name):
    assert idle(config) == [name] and idle(works) == []


@pytest.mark.parametrize(
    ("config", "facts", "works", "name"),
    [
        (Config(data=DataConfig(eval_fraction=0.3)), WHOLE, DRAWN, "data.eval_fraction"),
        (Config(data=DataConfig(split_seed=3)), WHOLE, WHOLE._replace(draws=True), "data.split_seed"),
        (Config(data=DataConfig(split_seed=3)), WHOLE, WHOLE._replace(holds_out=True), "data.split_seed"),
        (trained(class_weights="balanced"), DRAWN._replace(alike=True), DRAWN, "train.class_weights"),
        (Config(memory=MemoryConfig(cuda_graph=False)), DRAWN._replace(has_gpu=False), DRAWN, "memory.cuda_graph"),
        (
            Config(data=DataConfig(max_eval_samples=99)),
            DRAWN._replace(takes_all=("data.max_eval_samples",)),
            DRAWN,
            "data.max_eval_samples",
        ),
        (Config(overwrite=True), RESUMED, RESUMED._replace(in_place=False), "overwrite"),
        (
            Config(method="FT-Layerwise", memory=MemoryConfig(lean=False)),
            DRAWN._replace(has_gpu=False),
            DRAWN,  # whose passes a CUDA graph replays
            "memory.lean",
        ),
        (Config(adapter=AdapterOptions(init="x")), RESUMED, DRAWN, "adapter.init"),
    ],
)
def test_an_option_that_the_data_or_a_checkpoint_leave_nothing_to_do_is_named(config, facts, works, name):
    assert idle(config, facts) == [name] and idle(config, works) == []


def test_a_line_has_the_value_and_the_reason_and_an_option_once():
    config = trained("TinyTL-B", DataConfig(start_size=64, train_size=64), epochs=1, momentum=0.5)
    config = replace(config, lite=LiteConfig(norm="group", groups=4))
    assert idle_options(config, rules_of_run(resolve(config, 8), DRAWN)) == [
        "lite.groups=4, lite.norm=group (TinyTL-B has no lite residuals)",
        "train.momentum=0.5 (of sgd alone)",
        "data.start_size=64 (it is data.train_size)",
    ]


@pytest.mark.parametrize("method", METHODS)
def test_by_the_defaults_every_option_works(method):
    for facts in (DRAWN, WHOLE, RESUMED):
        assert idle(Config(method=method), facts) == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_no_config_sets_what_does_nothing(path):
    values = yaml.safe_load(path.read_text())
    groups = {"data": DataConfig, "train": TrainConfig, "lite": LiteConfig, "backbone": BackboneConfig}
    values["train"]["lr"] = float(values["train"]["lr"])
    values["train"].pop("weight_decay", None)  # 1e-4 is a text to YAML 1.1
    values["data"]["crop_scale"] = tuple(values["data"].get("crop_scale", DataConfig.crop_scale))
    made = {name: kind(**values[name]) for name, kind in groups.items() if name in values}
    config = Config(method=values["method"], **made)
    assert idle(config) == []


def test_a_run_in_which_nothing_would_train_is_refused_with_the_factors():
    assert {role for roles in FACTOR_ROLES.values() for role in roles} >= METHODS["TinyTL-L+B"].trains
    off = LrFactors(head=0.0, biases=0.0)
    for method in ("FT-Last", "TinyTL-B"):
        with pytest.raises(TinyTLError, match=f"^train.lr_factors.head=0.*: {method} trains nothing"):
            check_trains(trained(method, lr_factors=off))
    for method in ("TinyTL-L", "TinyTL-L+B", "FT-Norm+Last", "FT-Full"):
        check_trains(trained(method, lr_factors=off))


def test_other_verbs_name_what_they_do_not_use_of_a_run():
    config = Config(
        method="FT-Last",
        data=DataConfig(train_size=64),
        train=TrainConfig(global_batch_size=64, cache_features=True, momentum=0.5),
        memory=MemoryConfig(lean=False, budget_mb=9.0),
    )

    def names(rules):
        return [each.partition("=")[0] for each in idle_options(config, rules)]

    steps = ["train.global_batch_size", "train.momentum", "train.cache_features", "memory.budget_mb"]
    assert names(rules_of_memory(config, MemoryTableConfig())) == ["method", "memory.lean", *steps]
    assert names(rules_of_memory(config, MemoryTableConfig(methods=["FT-Last"]))) == ["memory.lean", *steps]
    assert names(rules_of_bench(config, BenchConfig())) == ["memory.lean", steps[0], "data.train_size", *steps[1:]]
    assert names(rules_of_fit(FitConfig())) == ["method", "memory.budget_mb"]
    assert names(rules_of_fit(FitConfig(train_sizes=[96]))) == ["method", "data.train_size", "memory.budget_mb"]


@pytest.mark.parametrize(("patience", "told"), [(2, False), (1, True)])
def test_a_last_epoch_that_patience_can_choose_is_said(patience, told, colour_folder, caplog, tmp_path):
    config = trained(data=DataConfig(dataset=str(colour_folder)), patience=patience, epochs=3)
    config = replace(config, adapter=AdapterOptions(keep="last"), output_dir=str(tmp_path / "run"))
    with caplog.at_level(logging.INFO):
        settle(config, None, open_data(config.data))
    line = "adapter.keep=last: train.patience chooses by the accuracy on test which epoch that is"
    assert (line in caplog.messages) == told


def test_an_evaluation_names_the_options_that_are_of_training(caplog):
    with caplog.at_level(logging.INFO):
        say_idle_of_data(["eval_size", "flip", "crop_scale", "max_eval_samples"])
        say_idle_of_data(["eval_size"])
    assert caplog.messages == ["set, and of no effect: data.crop_scale, data.flip (of training alone)"]


def test_a_run_says_it_in_one_line_and_that_it_starts(colour_folder, tmp_path):
    options = ["--method", "FT-Last", "--train.mixup", "0.2", "--lite.norm", "group", "--train.resume", "auto"]
    options += ["--data.workers", "3", "--train.class_weights", "balanced", "--data.split_seed", "4"]
    options += ["--data.max_train_samples", "24", "--data.max_eval_samples", "11"]
    lines = run_cli(*small_run(colour_folder, tmp_path / "run", *options, "--train.epochs", "1")).stderr
    of_no_effect = [line.partition(": ")[2] for line in lines.splitlines() if line.startswith("set, and of no effect")]
    assert of_no_effect == [
        "lite.norm=group (FT-Last has no lite residuals); train.class_weights=balanced (all classes have as many "
        "training images); data.max_eval_samples=11 (there are fewer)",
        "data.workers=3 (all decoded images stay in memory)",
    ]
    assert "images are changed or blended in all epochs" in lines and "1 epoch of 3 steps" in lines
    assert f"train.resume=auto: there is no checkpoint in {tmp_path / 'run'}, so the run starts" in lines


def test_counts_are_said_in_the_singular_and_in_the_plural():
    assert [counted(n, "step") for n in (0, 1, 1.0, 1797, 0.5)] == [
        "0 steps",
        "1 step",
        "1 step",
        "1,797 steps",
        "0.5 steps",
    ]
    assert [counted(n, "row is", "rows are") for n in (1, 2)] == ["1 row is", "2 rows are"]
    asked = trained(lr=1e-3, epochs=1)
    assert (
        describe(asked, asked, 8, 1)
        == "lr 0.001, 1 epoch of 1 step, cosine, no warm-up (0.5 epochs: less than a step)"
    )
    asked = trained(lr=1e-3, epochs=2, warmup_epochs=1.0)
    assert describe(asked, asked, 64, 2) == "lr 0.001, 2 epochs of 2 steps, cosine, warm-up 1 epoch"


def test_the_last_step_of_a_run_has_the_highest_rate_if_all_before_warm_up():
    options = TrainConfig(epochs=1, warmup_epochs=0.9, lr=1.0, schedule="constant")
    assert [warmup_steps(options, steps) for steps in (1, 3, 10)] == [0, 2, 9]
    assert [lr_factor(options, 3)(step) for step in range(3)] == [1 / 3, 2 / 3, 1]


def test_messages_of_one_thing_are_in_the_singular():
    plan = Plan("TinyTL-B", trained_blocks=1, share=0.1, train_size=64, batch=1)
    assert str(plan) == "TinyTL-B of the last 1 block, 64 px, 1 image a pass"
    assert str(Evaluated("x", "test", "0", 1, None)).startswith("1 image of x, split test;")
    with pytest.raises(TinyTLError, match=r"a multiple of 2 \(1 process times 2 accumulation steps\)"):
        check_divides(3, "batch_size", 1, 2)
    with pytest.raises(TinyTLError, match="this backbone has 1 residual block; use 1 to 1"):
        last_blocks({"a": None}, 2)
