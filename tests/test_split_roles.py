"""Which split is trained on, which one chooses the epoch, and which one is reported."""

import json
import shutil

import datasets
import pytest
from shared import run_cli, small_run, write_image
from test_tables import opened, png, saved

from tinytl_hf import TinyTLError
from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.sets import open_eval_split

AB = ["a", "b"] * 4


@pytest.mark.parametrize(
    ("splits", "options", "roles"),
    [
        (("train", "validation", "test"), {}, ("train", "validation", "test")),
        (("training", "val", "evaluation"), {}, ("training", "val", "evaluation")),
        (("train", "test"), {}, ("train", "test", None)),
        (("train", "dev"), {}, ("train", "dev", None)),
        (("train",), {}, ("train", "holdout", None)),
        (("train", "validation", "test"), {"eval_split": "test"}, ("train", "test", None)),
        (("train", "val", "test"), {"eval_split": "validation"}, ("train", "val", None)),
        (("train", "validation", "test"), {"eval_split": "holdout"}, ("train", "holdout", None)),
        (("validation",), {"train_split": "validation"}, ("validation", "holdout", None)),
        (("validation", "test"), {"train_split": "validation"}, ("validation", "test", None)),
    ],
)
def test_splits_have_the_same_roles_whatever_the_source(splits, options, roles, tmp_path):
    found = opened(saved(tmp_path, **dict.fromkeys(splits, AB)), **options)
    assert tuple(None if split is None else split.title for split in found[:3]) == roles


def test_a_lone_split_of_another_name_is_explained_by_what_was_asked_for(tmp_path):
    with pytest.raises(TinyTLError, match=r"train_split=train: the data set has validation; --data.train_split valid"):
        opened(saved(tmp_path, validation=AB))


def test_a_test_split_without_labels_is_left_out_unless_it_is_named(tmp_path, caplog):
    root = saved(tmp_path, train=AB, validation=AB, test=[None] * 4)
    assert opened(root).test is None
    assert "split test is not used: no row of split test has a label" in caplog.text
    with pytest.raises(TinyTLError, match="no row of split test has a label"):
        opened(root, eval_split="test")


def test_splits_that_are_not_used_are_said(tmp_path):
    found = opened(saved(tmp_path, train=AB, test=AB, extra=AB), eval_split="holdout").found
    assert "8 images in train, 8 in test (not used), 8 in extra (not used); training on 4" in str(found)
    assert found.to_json()["not_used"] == ["test", "extra"]


def test_a_test_split_of_one_class_is_evaluated(tmp_path):
    root = saved(tmp_path, train=AB, test=["b"] * 4)
    train, test = opened(root)[:2]
    assert train.label_names == ["a", "b"] and test.labels.tolist() == [1] * 4
    split = open_eval_split(DataConfig(dataset=str(root)), whole=True)
    assert split.label_names == ["b"]


@pytest.fixture(scope="module")
def run_with_three_splits(tmp_path_factory):
    root = tmp_path_factory.mktemp("three")
    for split, count in (("train", 8), ("val", 3), ("test", 5)):
        for number in range(2 * count):
            write_image(root / "data" / split / "ab"[number % 2] / f"{number}.png", seed=number + 100 * count)
    done = run_cli(*small_run(root / "data", root / "run", "--method", "FT-Last"))
    assert done.returncode == 0, done.stderr
    return root, done


def test_the_epoch_is_chosen_on_validation_and_test_is_reported_once(run_with_three_splits):
    root, done = run_with_three_splits
    results = json.loads((root / "run" / "eval_results.json").read_text())
    lines = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    assert (results["split"], results["n"], results["best_epoch_chosen_on"]) == ("test", 10, "validation")
    assert (results["selection"]["split"], results["selection"]["n"]) == ("validation", 6)
    best = max(line["eval"]["accuracy"] for line in lines)
    assert results["selection"]["accuracy"] == best and sum(map(sum, results["confusion_matrix"])) == 10
    assert results["data"]["images"] == {"test": 10, "train": 16, "validation": 6}
    assert "evaluating after each epoch on 6 (validation), and at the end on 10 (test)" in done.stderr
    assert "the epoch that is best on validation is kept; its figures are of test" in done.stderr
    card = (root / "run" / "adapter" / "README.md").read_text()
    assert "of the epoch that was best on validation |" in card and "evaluated on split `test`" in card


def test_eval_repeats_the_figures_of_the_test_split(run_with_three_splits):
    root, _ = run_with_three_splits
    done = run_cli("eval", "--adapter", root / "run" / "adapter", "--output", root / "again.json")
    assert done.returncode == 0, done.stderr
    again = json.loads((root / "again.json").read_text())
    results = json.loads((root / "run" / "eval_results.json").read_text())
    for key in ("loss", "n", "split", "sha256", "trained_on"):
        assert again[key] == results[key]


def test_local_data_are_never_asked_for_on_the_hub(run_with_three_splits, tmp_path, monkeypatch):
    root, _ = run_with_three_splits
    shutil.copytree(root / "run" / "adapter", tmp_path / "adapter")
    record = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert record["data"]["source"] == "local" and record["data"]["dataset"] == str(root / "data")
    record["data"]["dataset"] = "data"  # as a pushed one says it
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(record))
    monkeypatch.setattr(datasets, "load_dataset", None)  # what asks the Hub
    monkeypatch.chdir(tmp_path)
    done = run_cli("eval", "--adapter", "adapter")
    assert done.returncode == 1 and "data.dataset=data: the adapter was trained on these local data" in done.stderr
    from tinytl_hf import TinyTLModel

    TinyTLModel.from_pretrained("adapter").save_pretrained("again")
    card = (tmp_path / "again" / "README.md").read_text()
    assert "huggingface.co/datasets" not in card and "datasets:" not in card and str(root) not in card


def test_a_split_called_as_the_part_held_out_is_refused_where_it_would_be_left_out(tmp_path):
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    rows = {"image": [{"bytes": png(number), "path": None} for number in range(8)], "label": [0, 1] * 4}
    table = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=table, holdout=table, test=table).save_to_disk(tmp_path / "three")
    assert opened(tmp_path / "three").evaluation.name == "test"
    for options in ({"eval_split": "holdout"}, {}):
        name = "three" if options else "two"
        datasets.DatasetDict(train=table, holdout=table).save_to_disk(tmp_path / "two")
        with pytest.raises(TinyTLError, match=r"the data set has a split holdout, and a part held out of train"):
            opened(tmp_path / name, **options)
