import re
from typing import get_args

import pytest
import yaml
from shared import ROOT

from tinytl_hf import TinyTLError, cli
from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.network import METHOD_ALIASES, HeadConfig, LiteConfig, MethodAlias
from tinytl_hf.config.run import Config, MemoryConfig
from tinytl_hf.config.train import LrFactors, TrainConfig
from tinytl_hf.config.verbs import CompareConfig, EvalConfig, MemoryTableConfig, ReportConfig
from tinytl_hf.config.yaml12 import Yaml12Loader, dump_yaml, load_yaml
from tinytl_hf.network.methods import METHODS

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def load(path):
    parser = cli.make_parser("train")
    parsed = parser.parse_args(["train", "--config", str(path)])
    values = parser.instantiate(parsed).train
    return Config(**{name: values[name] for name in Config.__dataclass_fields__})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_its_header_says_how_to_run_it_and_what_it_gave(path):
    config = load(path)
    header = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert f"accelerate launch -m tinytl_hf train --config configs/{path.name}" in header
    assert f"`{path.name}`" in (ROOT / "configs" / "README.md").read_text()
    assert re.search(r"Result: (not run here\.|.*\d\.\d)", header)
    assert config.output_dir.startswith("runs/")


def test_the_reports_recipe_is_in_a_config_for_each_method():
    recipes = [load(path) for path in CONFIGS if path.name.startswith("cifar10_")]
    report = [config for config in recipes if config.train.epochs == 40]
    assert {config.method for config in report} == set(METHODS)
    for config in report:
        options = config.train
        assert (config.backbone.name, config.data.dataset) == ("mobilenet_v2", "uoft-cs/cifar10")
        assert (config.data.train_size, options.global_batch_size, options.optimizer) == (224, 128, "adamw")
        assert (options.lr, options.schedule, options.gamma, options.weight_decay) == (4e-4, "exponential", 0.9, 1e-4)
        assert (options.warmup_epochs, config.data.crop_scale) == (0.0, (0.08, 1.0))
    paper = load(ROOT / "configs" / "cifar10_tinytl_lb_paper.yaml").train
    assert (paper.global_batch_size, paper.epochs, paper.optimizer, paper.lr) == (8, 50, "adam", 3e-4)
    assert (paper.schedule, paper.label_smoothing) == ("cosine", 0.1)


def test_a_saved_config_reads_back_the_same(tmp_path):
    config = Config(method="deep", train=TrainConfig(mixed_precision="no", lr=1e-4), data=DataConfig(flip=False))
    config.save(tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config
    assert config.method == "FT-Full"


def test_whole_numbers_are_those_of_yaml_1_2():
    read = load_yaml("[010, -08, 0o17, 0x1F, 1_000, '010', 1:30, 2026-11-27, 0b11, 0]")
    assert read == [10, -8, 15, 31, "1_000", "010", "1:30", "2026-11-27", "0b11", 0]
    assert load_yaml(dump_yaml(read)) == read


def test_yaml_reads_no_as_a_word_and_1e_4_as_a_number():
    values = yaml.load("{a: no, b: 1e-4, c: true, d: .5, e: 12, f: null, g: 'on', h: -2.5e+3}", Loader=Yaml12Loader)
    assert values == {"a": "no", "b": 1e-4, "c": True, "d": 0.5, "e": 12, "f": None, "g": "on", "h": -2500.0}


def test_names_and_aliases_are_those_of_the_methods():
    assert set(get_args(MethodAlias)) == set(METHOD_ALIASES)
    assert set(METHOD_ALIASES.values()) <= set(METHODS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(gradient_accumulation_steps=0), r"train.gradient_accumulation_steps=0: use 1 or more"),
        (lambda: TrainConfig(gradient_accumulation_steps=3), r"steps=3: use a divisor of train.global_batch_size=32"),
        (lambda: TrainConfig(epochs=0), r"train.epochs=0"),
        (lambda: TrainConfig(lr=0), r"train.lr=0: use a number above 0"),
        (lambda: TrainConfig(warmup_epochs=4, epochs=4), r"train.warmup_epochs=4: .*less than train.epochs=4"),
        (lambda: TrainConfig(gamma=1.5), r"train.gamma=1.5"),
        (lambda: TrainConfig(label_smoothing=1.0), r"train.label_smoothing=1.0"),
        (lambda: TrainConfig(max_grad_norm=0.0), r"train.max_grad_norm=0.0"),
        (lambda: DataConfig(crop_scale=(0.9, 0.1)), r"data.crop_scale=\[0.9, 0.1\]"),
        (lambda: DataConfig(eval_fraction=1.0), r"data.eval_fraction=1.0"),
        (lambda: DataConfig(max_train_samples=0), r"data.max_train_samples=0"),
        (lambda: DataConfig(train_size=0), r"data.train_size=0"),
        (lambda: DataConfig(train_size=96, start_size=128), r"data.start_size=128: use at most .*=96"),
        (
            lambda: Config(method="FT-Last", train=TrainConfig(cache_features=True), data=DataConfig(start_size=96)),
            r"data.start_size=96: train.cache_features takes one size",
        ),
        (lambda: TrainConfig(patience=0), r"train.patience=0: use 1 or more"),
        (lambda: TrainConfig(mixup=-0.1), r"train.mixup=-0.1: use 0 \(off\) or more"),
        (lambda: LrFactors(head=-1.0), r"train.lr_factors.head=-1.0: use 0 or more"),
        (
            lambda: Config(method="FT-Last", train=TrainConfig(cache_features=True, cutmix=1.0)),
            r"train.cutmix=1.0: train.cache_features computes features of images as they are",
        ),
        (lambda: LiteConfig(kernel_size=4), r"lite.kernel_size=4: use an odd number"),
        (lambda: HeadConfig(dropout=1.0), r"head.dropout=1.0"),
    ],
)
def test_a_value_out_of_range_is_named_with_the_fix(make, message):
    with pytest.raises(TinyTLError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Config(method="TinyTL-LB"), "method=TinyTL-LB: use one of FT-Last, TinyTL-B"),
        (lambda: Config(tracker="mlflow"), "tracker=mlflow: use one of none, tensorboard"),
        (lambda: Config(trained_blocks="some"), "trained_blocks=some: use a whole number or all"),
        (lambda: TrainConfig(optimizer="lion"), "train.optimizer=lion: use one of adamw, adam, sgd, muon"),
        (lambda: TrainConfig(schedule="linear"), "train.schedule=linear: use one of exponential, cosine, constant"),
        (lambda: TrainConfig(mixed_precision="fp8"), "train.mixed_precision=fp8: use one of no, bf16, fp16, null"),
        (lambda: LiteConfig(norm="layer"), "lite.norm=layer: use one of batch, group"),
        (lambda: TrainConfig(lr="1e-3"), "train.lr=1e-3: use a number or null"),
        (lambda: TrainConfig(epochs=2.0), "train.epochs=2.0: use a whole number or null"),
        (lambda: DataConfig(crop_scale=(0.5,)), r"data.crop_scale=\(0.5,\): use a list of 2 values"),
        (lambda: MemoryConfig(lean=None), "memory.lean=null: use true or false"),
        (lambda: LrFactors(head=None), "train.lr_factors.head=null: use a number"),
        (lambda: EvalConfig("a", mixed_precision="fp8"), "mixed_precision=fp8: use one of no, bf16, fp16, null"),
        (lambda: MemoryTableConfig(methods=["foo"]), r"methods=\['foo'\]: use a list of values or null"),
        (lambda: Config(seed=2**32), r"seed=4294967296: use 0 or more, below 2\*\*32"),
        (lambda: DataConfig(split_seed=-1), r"data.split_seed=-1: use 0 or more, below 2\*\*32"),
        (lambda: CompareConfig(output=""), "output=: it is empty"),
        (lambda: ReportConfig(output=" "), "output= : it is empty"),
        (lambda: DataConfig(auto_augment="rand"), "data.auto_augment=rand: use one of none, trivial"),
    ],
)
def test_a_name_that_is_no_choice_is_refused_in_python_as_on_the_command_line(make, message):
    with pytest.raises(TinyTLError, match=f"^{message}"):
        make()


def test_a_path_is_taken_for_a_text(tmp_path):
    config = Config(output_dir=tmp_path / "run", data=DataConfig(dataset=tmp_path))
    assert (config.output_dir, config.data.dataset) == (str(tmp_path / "run"), str(tmp_path))
    assert Config(method="finetune").method == "FT-Last" and TrainConfig().mixed_precision is None
