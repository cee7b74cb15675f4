"""One test for each thing that once went wrong, named after what a user saw."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from shared import ROOT, run_cli, small_run, write_image

from tinytl_hf import TinyTLModel
from tinytl_hf.adapter.format import read_config
from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.recipe import resolve
from tinytl_hf.config.run import Config
from tinytl_hf.data.augment import RandomCropFlip
from tinytl_hf.data.batches import read_images
from tinytl_hf.data.changes import Changes
from tinytl_hf.data.sets import open_data
from tinytl_hf.measure.speed import _memsave
from tinytl_hf.train.loop import augmented
from tinytl_hf.version import __version__


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
    mine = (
        "notes.txt",
        "checkpoints/mine.pt",
        "adapter/mine.onnx",
        "checkpoints/step_1/weights.pt",
        "tinytl_hf/my.py",
    )
    former = output / "tinytl_hf" / "events.out.tfevents.1"  # of TensorBoard, which draws all that lie there as one
    for path in (*(output / name for name in mine), former):
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    card = output / "adapter" / "README.md"
    card.write_text(card.read_text() + "\nWritten by hand.\n")
    done = run_cli(*last_layer(colour_folder, output, "--overwrite", "true"))
    assert done.returncode == 0, done.stderr
    for name in mine:
        assert (output / name).read_text() == "mine"
    assert not former.exists()
    assert "Written by hand." in card.read_text()
    assert json.loads((output / "eval_results.json").read_text())["n"] == 10  # of the new data


@pytest.mark.parametrize("overwrite", ["true", "false"])
def test_an_adapter_that_i_had_linked_into_a_run_was_emptied(overwrite, trained, colour_folder, tmp_path):
    output, kept = tmp_path / "run", tmp_path / "kept"
    shutil.copytree(trained, output)
    (output / "adapter").rename(kept)
    (output / "adapter").symlink_to(kept)
    before = files(kept)
    done = run_cli(*last_layer(colour_folder, output, "--overwrite", overwrite, "--train.resume", "auto"))
    assert done.returncode == 1 and "holds adapter, which no run of tinytl-hf wrote" in done.stderr
    assert files(kept) == before


@pytest.mark.parametrize("name", ["x" * 300, "a/" + "\u00e9" * 200 + "/b"])
@pytest.mark.parametrize("words", [["train", "--output_dir"], ["fit", "--memory_mb", "9", "--output"]])
def test_a_name_that_no_file_can_have_was_an_unexpected_error(words, name, colour_folder):
    done = run_cli(words[0], "--data.dataset", colour_folder, *words[1:], f"{name}.yaml")
    assert done.returncode == 1 and done.stderr.strip().endswith("use names of up to 255 bytes")


@pytest.mark.parametrize("words", [["train", "--output_dir", ""], ["predict", "--adapter", "{}/adapter", ""]])
def test_a_variable_that_was_not_set_meant_the_current_folder(words, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_cli(*(word.format(trained) for word in words))
    assert done.returncode == 1 and "it is empty, as of a variable that is not set" in done.stderr
    assert not any(tmp_path.iterdir())


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
    data = spelling.format(photos) if "{" in spelling else str(tmp_path / spelling)
    output = tmp_path / "again.json"
    done = run_cli("eval", "--adapter", trained / "adapter", "--data.dataset", data, "--output", output)
    assert done.returncode == 0, done.stderr
    place = Path(data).resolve()
    assert f"evaluating on 4 images of {place}, split holdout; it was trained on none of them" in done.stderr
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data.image_size", "96"], "data.image_size: this option is called data.train_size now"),
        (["train", "--data.eval_image_size", "96"], "data.eval_image_size: this option is called data.eval_size now"),
        (
            ["train", "--data.start_image_size", "96"],
            "data.start_image_size: this option is called data.start_size now",
        ),
        (["bench", "--image_sizes", "[96]"], "image_sizes: this option is called train_sizes now"),
        (["train", "--config", "old.yaml"], "data.image_size: this option is called data.train_size now"),
    ],
)
def test_an_option_with_a_new_name_was_no_such_option(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.yaml").write_text("data:\n  image_size: 96\n")
    done = run_cli(*arguments)
    assert done.returncode == 2 and done.stderr == f"tinytl-hf: error: {message}\n"


def test_a_run_and_eval_saw_different_pixels_of_large_photos(tmp_path):
    for number in range(20):
        write_image(tmp_path / "photos" / "ab"[number % 2] / f"{number}.png", size=(150, 130), seed=number)
    sizes = ["--data.train_size", "32", "--data.eval_size", "64", "--data.eval_fraction", "0.3"]
    done = run_cli(*last_layer(tmp_path / "photos", tmp_path / "run", *sizes))
    assert done.returncode == 0, done.stderr
    assert (
        run_cli("eval", "--adapter", tmp_path / "run" / "adapter", "--output", tmp_path / "again.json").returncode == 0
    )
    in_the_run = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["loss"] == in_the_run["loss"] and again["eval_size"] == in_the_run["eval_size"] == 64
    # What the network sees is made from photos of at most twice its own input, not twice the training's.
    split, _ = open_data(DataConfig(dataset=str(tmp_path / "photos"), eval_split="holdout"))[:2]
    assert read_images(split, DataConfig(), 64).images.shape[-2:] == (128, 148)
    assert read_images(split, DataConfig(), 32).images.shape[-2:] == (64, 74)


def test_training_normalised_by_imagenet_whatever_the_backbone_wants(make_model):
    model = make_model("FT-Last", train_size=32)
    own = replace(model.config.preprocessing, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    model.config = replace(model.config, preprocessing=own)
    augment = RandomCropFlip(images=1, seed=0, scale=(1.0, 1.0), flip=False)
    changes = Changes(1, resolve(Config(), 1))
    run = SimpleNamespace(
        model=model, augment=augment, changes=changes, accelerator=SimpleNamespace(mixed_precision="no")
    )
    pixels, sizes = torch.full((1, 3, 40, 40), 255, dtype=torch.uint8), torch.tensor([[40, 40]])
    batch = {"pixels": pixels, "sizes": sizes, "index": torch.tensor([0])}
    torch.testing.assert_close(augmented(run, batch, 224).unique(), torch.tensor([(1 - 0.5) / 0.25]))


THREADS = """
import os, torch, tinytl_hf.device as device
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
launched = {"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}
for told in ({"OMP_NUM_THREADS": "3"}, {}, {"LOCAL_WORLD_SIZE": "9"}, launched):
    os.environ.update(told)
    device.joblib.cpu_count = lambda: 4 if told is launched else len(os.sched_getaffinity(0))
    device.set_threads(None)
    print(torch.get_num_threads())
    for name in told:
        del os.environ[name]
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="affinity masks are Linux's")
def test_a_run_on_one_core_of_many_started_a_thread_for_each_and_one_of_a_launcher_a_single_one():
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["3", "1", "1", "4"], done.stderr


def test_bench_crashed_where_memsave_torch_is_installed(make_model):
    pytest.importorskip("memsave_torch")
    model = _memsave(make_model("FT-Last", train_size=32, lean=False))
    model.train()(torch.rand(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.trainable_parameters())


def test_an_adapter_could_not_be_loaded_with_the_stock_engine(make_model, tmp_path):
    make_model("TinyTL-B", train_size=32).save_pretrained(tmp_path)
    stock = TinyTLModel.from_pretrained(tmp_path, lean=False, slice_mb=1.0)
    assert not any("lean" in type(module).__module__ for module in stock.modules()) and stock.engine.slice_mb == 1.0


def test_results_asked_git_for_a_commit_and_printed_what_it_said(trained):
    results = json.loads((trained / "eval_results.json").read_text())
    assert "_git_commit_hash" not in results
    assert results["_timestamp"] and results["_python_version"] and results["_evaluate_version"]
    assert not list(trained.glob("*.tmp"))


def test_a_run_resumed_into_the_folder_of_another_kept_the_others_adapter(trained, photos, tmp_path):
    other = tmp_path / "other"
    assert run_cli(*last_layer(photos, other, "--train.lr", "5e-2", "--seed", "1")).returncode == 0
    checkpoint = sorted((trained / "checkpoints").glob("step_*"))[-1]
    options = ["--overwrite", "true", "--train.resume", checkpoint]
    done = run_cli(*last_layer(photos, other, *options))
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (other, trained))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    results = [json.loads((run / "eval_results.json").read_text())["loss"] for run in (other, trained)]
    assert results[0] == results[1]
    assert (other / "metrics.jsonl").read_text() == (trained / "metrics.jsonl").read_text()
    assert run_cli("report", other).returncode == 0


def test_a_finished_run_without_its_checkpoints_was_trained_again_by_resume_auto(trained, photos, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    shutil.rmtree(output / "checkpoints")
    before = files(output)
    done = run_cli(*last_layer(photos, output, "--train.resume", "auto"))
    assert done.returncode == 1 and "holds a run already" in done.stderr and files(output) == before


def test_a_config_of_mine_with_options_of_a_run_was_replaced(colour_folder, tmp_path):
    groups = "".join(f"{group}: {{}}\n" for group in ("backbone", "data", "train", "memory", "adapter"))
    (tmp_path / "config.yaml").write_text(f"# mine\nmethod: FT-Last\n{groups}")
    before = files(tmp_path)
    done = run_cli(*last_layer(colour_folder, tmp_path, "--overwrite", "true"))
    assert done.returncode == 1 and "holds config.yaml, which no run" in done.stderr and files(tmp_path) == before


def test_options_that_i_set_were_left_out_for_data_under_another_name(photos, trained, tmp_path):
    shutil.copytree(photos, tmp_path / "copy")
    options = ["--data.split_seed", "5", "--data.eval_fraction", "0.5"]
    for data in (photos, tmp_path / "copy"):
        done = run_cli("eval", "--adapter", trained / "adapter", "--data.dataset", data, *options)
        assert "20 images of" in done.stderr and "it was trained on 1" in done.stderr, done.stderr


def test_a_null_that_i_set_was_left_out_for_data_under_another_name(photos, trained, tmp_path):
    shutil.copytree(photos, tmp_path / "copy")
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    record = tmp_path / "adapter" / "adapter_config.json"
    record.write_text(record.read_text().replace('"max_eval_samples": null', '"max_eval_samples": 3'))
    for data in (photos, tmp_path / "copy"):
        for options, images in (([], 3), (["--data.max_eval_samples", "null"], 4)):
            done = run_cli("eval", "--adapter", tmp_path / "adapter", "--data.dataset", data, *options)
            assert f"evaluating on {images} images of" in done.stderr, done.stderr


def test_a_pushed_adapter_told_where_the_data_lie_on_my_disk(trained, photos, server):
    done = run_cli("push", "--adapter", trained / "adapter", "--repo", "me/photos")
    assert done.returncode == 0, done.stderr
    pushed = {name: file.content for name, file in server.repos["me/photos"].files().items()}
    assert not any(str(photos.parent).encode() in content for content in pushed.values())
    assert json.loads(pushed["adapter_config.json"])["data"]["dataset"] == "photos"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "--data.dataset", "~no_such_user/x"], 1, "cannot be loaded"),
        (["memory", "--plot", "/proc/no/folder/x.png"], 1, "plot=/proc/no/folder/x.png: cannot be written"),
    ],
)
def test_an_odd_command_line_was_an_unexpected_error(arguments, code, message, monkeypatch):
    done = run_cli(*arguments)
    assert done.returncode == code and message in done.stderr and "unexpected" not in done.stderr, done.stderr


def test_a_command_line_without_a_verb_shows_the_help():
    done = run_cli()
    assert done.returncode == 0 and "label images with an adapter" in done.stdout


def test_a_process_without_a_rank_was_a_traceback():
    environment = {**os.environ, "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "tinytl_hf", "report", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    message = "tinytl-hf (process 0): error: nowhere is no run: it has no config.yaml\n"
    assert done.returncode == 1 and done.stderr == message


def test_an_adapter_saved_again_said_that_the_old_version_had_written_it(tmp_path):
    model = TinyTLModel(read_config(ROOT / "tests" / "adapters_of_0_1" / "last"))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["tinytl_hf_version"] == __version__
