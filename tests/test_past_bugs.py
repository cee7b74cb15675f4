"""One test for each thing that once went wrong, named after what a user saw."""

import json
import shutil

import pytest
from conftest import run_cli, small_run, write_image


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of two classes and no splits: 40 photos, of which a run holds out 4."""
    root = tmp_path_factory.mktemp("own") / "photos"
    for number in range(40):
        write_image(root / ("cat", "dog")[number % 2] / f"{number}.png", seed=number)
    return root


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """A finished run on these photos."""
    output = tmp_path_factory.mktemp("runs") / "run"
    done = run_cli(*last_layer(photos, output))
    assert done.returncode == 0, done.stderr
    return output


def last_layer(data, output, *options):
    return small_run(data, output, "--method", "FT-Last", "--train.epochs", "1", *options)


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


OWN_FILES = [
    "checkpoints/m.pt",
    "adapter/notes.txt",
    "eval_results.json",
    "metrics.jsonl",
    "config.yaml",
    "memory.json",
]


@pytest.mark.parametrize("name", [*OWN_FILES, "adapter_last/adapter_config.json", "mistakes.json"])
@pytest.mark.parametrize("overwrite", ["false", "true"])
def test_training_into_a_folder_of_mine_deleted_my_files(name, overwrite, colour_folder, tmp_path):
    mine = tmp_path / "mine" / name
    mine.parent.mkdir(parents=True)
    mine.write_text('{"mine": 1}\n')
    before = files(tmp_path)
    done = run_cli(*last_layer(colour_folder, tmp_path / "mine", "--overwrite", overwrite))
    assert done.returncode == 1 and f"holds {name.partition('/')[0]}, which no run of tinytl-hf wrote" in done.stderr
    assert files(tmp_path) == before


def test_a_run_that_replaces_another_deleted_my_files_beside_it(trained, colour_folder, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    for name in ("notes.txt", "checkpoints/mine.pt", "adapter/mine.onnx", "checkpoints/step_1/weights.pt"):
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text("mine")
    card = output / "adapter" / "README.md"
    card.write_text(card.read_text() + "\nWritten by hand.\n")
    done = run_cli(*last_layer(colour_folder, output, "--overwrite", "true"))
    assert done.returncode == 0, done.stderr
    for name in ("notes.txt", "checkpoints/mine.pt", "adapter/mine.onnx", "checkpoints/step_1/weights.pt"):
        assert (output / name).read_text() == "mine"
    assert "Written by hand." in card.read_text()
    assert json.loads((output / "eval_results.json").read_text())["n"] == 10  # of the new data


def test_a_table_of_mine_called_metrics_jsonl_in_a_runs_folder_was_a_key_error(trained, colour_folder, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    (output / "metrics.jsonl").write_text('{"step": 1, "mine": 2}\n')
    before = files(output)
    done = run_cli(*last_layer(colour_folder, output, "--overwrite", "true"))
    assert done.returncode == 1 and "holds metrics.jsonl, which no run of tinytl-hf wrote" in done.stderr
    assert files(output) == before


@pytest.mark.parametrize("spelling", ["{}/", "{}/../photos", "{}/.", "link", "copy"])
def test_eval_scored_training_images_when_the_folder_was_spelled_otherwise(spelling, photos, trained, tmp_path):
    if spelling == "link":
        (tmp_path / "link").symlink_to(photos)
    elif spelling == "copy":
        shutil.copytree(photos, tmp_path / "copy")
    data = spelling.format(photos) if "{" in spelling else tmp_path / spelling
    output = tmp_path / "again.json"
    done = run_cli("eval", "--adapter", trained / "adapter", "--data.dataset", data, "--output", output)
    assert done.returncode == 0, done.stderr
    assert f"evaluating on 4 images of {data}, split holdout; it was trained on none of them" in done.stderr
    results, in_the_run = json.loads(output.read_text()), json.loads((trained / "eval_results.json").read_text())
    for key in ("n", "split", "sha256", "trained_on", "loss"):
        assert results[key] == in_the_run[key]
    assert (results["n"], results["split"], results["trained_on"]) == (4, "holdout", 0)


def test_eval_says_how_many_of_the_images_were_trained_on(photos, trained, tmp_path):
    output = tmp_path / "again.json"
    options = ["--data.dataset", f"{photos}/", "--data.eval_split", "train", "--output", output]
    done = run_cli("eval", "--adapter", trained / "adapter", *options)
    assert "40 images of" in done.stderr and "split train; it was trained on 36 of them" in done.stderr
    assert json.loads(output.read_text())["trained_on"] == 36


def test_eval_says_when_the_data_set_has_changed_since_the_training(photos, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos, "photos")
    assert run_cli(*last_layer("photos", "run")).returncode == 0
    write_image(tmp_path / "photos" / "cat" / "new.png", seed=99)
    done = run_cli("eval", "--adapter", "run/adapter")
    assert done.returncode == 0 and "is not as it was when the adapter was trained on it" in done.stderr
    assert "whether it was trained on any of them is not known" in done.stderr


def test_eval_of_other_data_says_that_it_does_not_know(trained, tmp_path):
    for number in range(6):
        write_image(tmp_path / "other" / ("cat", "dog")[number % 2] / f"{number}.png", seed=100 + number)
    done = run_cli("eval", "--adapter", trained / "adapter", "--data.dataset", tmp_path / "other")
    assert "6 images of" in done.stderr and "whether it was trained on any of them is not known" in done.stderr


def test_a_card_on_the_hub_told_where_the_data_lie_on_my_disk(photos, trained):
    for file in (trained / "adapter").glob("*.[jm][sd]*"):
        if file.name != "adapter_config.json":
            assert str(photos.parent) not in file.read_text()
    assert json.loads((trained / "adapter" / "eval_results.json").read_text())["dataset"] == "photos"
    assert json.loads((trained / "eval_results.json").read_text())["dataset"] == str(photos)
