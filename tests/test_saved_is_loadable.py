"""Whatever can be written can be read again, with values that a careless or hostile person would give."""

import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import torch
from hub_server import yaml_errors
from shared import run_cli, slow

from tinytl_hf import TinyTLError, TinyTLModel, load_merged
from tinytl_hf.adapter.record import DataRecord
from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.hub import HubConfig
from tinytl_hf.config.run import Config
from tinytl_hf.config.train import TrainConfig
from tinytl_hf.config.verbs import MergeConfig
from tinytl_hf.config.yaml12 import dump_yaml, load_yaml
from tinytl_hf.deploy.merge import merge

ODD = [
    *("", " ", "two\nlines", "tab\there", "\x00", "\x1b[31mred\x1b[0m", "\u202egnp.exe", "a\u2028b", "\ufeffbom"),
    *("\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u732b \u306d\u3053", "e\u0301", "\u00e9"),
    *(
        "null",
        "~",
        "true",
        "no",
        "1e5",
        "1e-4",
        ".inf",
        "010",
        "2024-01-01",
        "12:30",
        "- a",
        "a: b",
        "*a",
        "&a",
        "!!b",
    ),
    *("---", "```", "`x`", "| a | b |", "<script>alert(1)</script>", "<!-- tinytl_hf: end -->", "{{ 7 * 7 }}", "$x$"),
    *("{% raw %}", "&lt;", "\\", '"', "'", "%s", "../../x", "C:\\x", "[a](javascript:b)", "a" * 10_000),
]


@pytest.mark.parametrize("name", ["regnet_y_400mf", "shufflenet_v2_x0_5", "proxylessnas_mobile"])
def test_an_adapter_of_another_network_loads(name, make_model, tmp_path):
    model = make_model("TinyTL-B", name, train_size=32)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(save_and_load(model, tmp_path).eval()(images), model.eval()(images))


def save_and_load(model, folder, **options):
    model.save_pretrained(folder, **options)
    return TinyTLModel.from_pretrained(folder)


def test_odd_names_of_classes_are_the_same_in_the_adapter_and_the_merged_file(make_model, tmp_path):
    model = make_model("FT-Last", num_classes=None, label_names=ODD, train_size=32)
    loaded = save_and_load(model, tmp_path / "a", data=DataRecord("digits"), metrics={"accuracy": 0.5})
    assert loaded.label_names == ODD and loaded.config == save_and_load(loaded, tmp_path / "b").config
    assert torch.equal(loaded._head.weight, model._head.weight)
    merge(MergeConfig(str(tmp_path / "a"), str(tmp_path / "m.safetensors")))
    assert load_merged(tmp_path / "m.safetensors").label_names == ODD
    card = (tmp_path / "a" / "README.md").read_text()
    assert yaml_errors(card) == [] and card.count("<!-- tinytl_hf: end -->") == 1
    labels = card.partition("## Labels\n")[2].partition("\n## How to use")[0]
    assert labels.count("\n") == 2 and "\x1b" not in labels and "\x00" not in labels  # one line of them
    assert (
        "\\<script\\>" in labels and "\U0001f468\u200d\U0001f469\u200d\U0001f467" in labels and "(no name)" in labels
    )


@pytest.mark.parametrize(
    ("names", "strings"),
    [
        ([0, 1, 2], ["0", "1", "2"]),
        (np.array([3, 4]), ["3", "4"]),
        (np.array(["a", "b"]), ["a", "b"]),
        (np.array(["a", 2], dtype=object), ["a", "2"]),
        ([np.str_("a"), np.int64(2), True], ["a", "2", "True"]),
        ((str(i) for i in range(2)), ["0", "1"]),
        (np.array([0.5, 1.0]), ["0.5", "1.0"]),
        (range(2), ["0", "1"]),
    ],
)
def test_names_of_classes_become_strings(names, strings, make_model, tmp_path):
    model = make_model("FT-Last", num_classes=None, label_names=names, train_size=32)
    assert model.label_names == strings and all(type(name) is str for name in model.label_names)
    assert save_and_load(model, tmp_path).label_names == strings


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("cat", "use a list of names"),
        ({0: "cat", 1: "dog"}, "use a list of names"),
        ({"cat", "dog"}, "use a list of names"),
        (7, "use a list of names"),
        ([], "give one, or both alike"),
        (np.array([]), "give one, or both alike"),
        ([1, "1"], "'1' is there more than once"),
        ([None, "a"], "None is no name"),
        ([float("nan"), "a"], "nan is no name"),
        ([b"a", "b"], "b'a' is no name"),
        ([["a"], ["b"]], "['a'] is no name"),
        (np.array([["a"], ["b"]]), "is no name"),
        (["caf\udce9", "b"], "no UTF-8 text; rename the class"),
    ],
)
def test_what_are_no_names_of_classes_is_said_before_anything_is_built(names, message, make_model):
    with pytest.raises(TinyTLError) as caught:
        make_model("FT-Last", num_classes=None, label_names=names, train_size=32)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_values_that_no_adapter_can_have_are_refused_when_it_is_saved(value, dtype, make_model, tmp_path):
    model = make_model("TinyTL-B", train_size=32)
    next(model.trainable_parameters()).data[0] = value
    with pytest.raises(TinyTLError, match="values that are not finite"):
        model.save_pretrained(tmp_path / "a", dtype=dtype)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, slow(torch.float64)])
@pytest.mark.parametrize("method", ["TinyTL-L+B", slow("FT-Norm+Last")])
def test_a_cast_model_is_saved_as_it_is_read(dtype, method, make_model, tmp_path):
    model = make_model(method, train_size=32).to(dtype)
    loaded = save_and_load(model, tmp_path)
    given, read = model.adapter_tensors(), loaded.adapter_tensors()
    assert read.keys() == given.keys()
    for name, tensor in read.items():
        assert torch.equal(tensor, given[name].to(tensor.dtype)), name


@pytest.mark.parametrize("taken_by", ["file", "below_a_file", "config_is_a_folder", "card_is_a_folder"])
def test_a_path_that_cannot_be_a_folder_is_an_error_of_ours(taken_by, make_model, tmp_path):
    (tmp_path / "file").write_text("mine")
    for name in ("adapter_config.json", "README.md"):
        (tmp_path / f"{name}.d" / name).mkdir(parents=True)
    path = {
        "file": tmp_path / "file",
        "below_a_file": tmp_path / "file" / "adapter",
        "config_is_a_folder": tmp_path / "adapter_config.json.d",
        "card_is_a_folder": tmp_path / "README.md.d",
    }[taken_by]
    with pytest.raises(TinyTLError) as caught:
        make_model("FT-Last", train_size=32).save_pretrained(path)
    assert str(path) in str(caught.value) and (tmp_path / "file").read_text() == "mine"


def test_what_a_card_says_of_data_and_weights_cannot_break_out_of_its_line(make_model, tmp_path):
    odd = "a`b\n## <b>x</b> $y$"
    data = DataRecord(f"/data/{odd}", subset=odd, train_split=odd, eval_split=odd)
    model = make_model("FT-Last", train_size=32)
    weights = dataclasses.replace(model.config.backbone, weights='/w/my "own`\n weights.pth')
    model.config = dataclasses.replace(model.config, backbone=weights)
    model.save_pretrained(tmp_path, data=data, metrics={"accuracy": 0.5})
    card = (tmp_path / "README.md").read_text()
    body = card.partition("tinytl_hf: begin -->")[2]
    assert yaml_errors(card) == [] and "\n## <b>" not in body
    assert 'weights="my \\"own`\\n weights.pth"' in body  # what Python reads as the file's name
    assert all(
        line.count("`") % 2 == 0 for line in body.splitlines() if "```" not in line and "from_pretrained" not in line
    )


@pytest.mark.parametrize("value", [value for value in ODD if len(value) < 100])
def test_a_string_in_a_config_file_stays_the_string_that_it_was(value):
    assert load_yaml(dump_yaml({"a": value, "b": [value]})) == {"a": value, "b": [value]}


def test_a_config_file_reads_back_as_the_same_run(tmp_path, colour_folder):
    config = Config(
        output_dir="1e5",
        metrics=["no", "~"],
        data=DataConfig(dataset=str(colour_folder), label_column="010", subset="1e4", crop_scale=(1e-05, 1.0)),
        train=TrainConfig(max_grad_norm=math.inf, mixed_precision="no", lr=1e-30),
        hub=HubConfig(repo="a/no"),
    )
    config.save(tmp_path / "config.yaml")
    done = run_cli("train", "--config", tmp_path / "config.yaml", "--print_config")
    assert done.returncode == 0, done.stderr
    read = load_yaml(done.stdout)
    assert read == json.loads(json.dumps(config.to_dict()))


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text here")
def test_a_folder_whose_name_is_not_utf8_holds_an_adapter_or_is_refused_before_a_run(make_model, tmp_path):
    odd = tmp_path / "caf\udce9"
    model = make_model("FT-Last", train_size=32)
    model.save_pretrained(odd / "adapter")
    assert torch.equal(TinyTLModel.from_pretrained(odd / "adapter")._head.weight, model._head.weight)
    done = run_cli("train", "--output_dir", odd / "run")
    assert done.returncode == 1 and "use a path that is UTF-8 text" in done.stderr and not (odd / "run").exists()
    done = run_cli("merge", "--adapter", odd / "adapter", "--output", odd / "m.safetensors")
    assert done.returncode == 1 and "use a path that is UTF-8 text" in done.stderr
