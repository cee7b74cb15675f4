"""``~`` is the user's home in every option and argument that is a path, also where no shell has seen it."""

import json
import shutil

import pandas as pd
import pytest
from shared import run_cli, small_run, write_image

from tinytl_hf import TinyTLError, TinyTLModel, load_merged
from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.hub import PullConfig, PushConfig
from tinytl_hf.config.network import BackboneConfig
from tinytl_hf.config.run import Config
from tinytl_hf.config.train import TrainConfig
from tinytl_hf.config.verbs import (
    CompareConfig,
    EvalConfig,
    MemoryTableConfig,
    MergeConfig,
    PredictConfig,
    ReportConfig,
)
from tinytl_hf.data.sets import open_data
from tinytl_hf.disk import local_path, path_of


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    yield tmp_path / "home"
    assert not list((tmp_path / "elsewhere").iterdir())  # no folder called ~


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((Config, ["output_dir"]), (TrainConfig, ["resume"]), (BackboneConfig, ["weights"])),
        (EvalConfig, ["adapter", "weights", "output=~/x.json"]),
        (PredictConfig, ["adapter", "weights", "csv=~/x.csv"]),
        (MergeConfig, ["adapter", "output=~/x.safetensors", "weights"]),
        *((CompareConfig, ["output"]), (ReportConfig, ["output"]), (MemoryTableConfig, ["plot=~/x.png"])),
        *((PushConfig, ["adapter", "repo=a/b"]), (PullConfig, ["output", "repo=a/b"])),
    ],
)
def test_options_that_are_paths_are_expanded(kind, options, home):
    pairs = [option.split("=") if "=" in option else (option, "~/x") for option in options]
    config = kind(**dict(pairs))
    for name, value in pairs:
        assert getattr(config, name) == value.replace("~", str(home))


def test_a_run_and_what_follows_it_with_paths_below_the_home(home, colour_folder):
    shutil.copytree(colour_folder, home / "data")
    (home / "run.yaml").write_text("output_dir: ~/out\ndata: {dataset: ~/data}\nmethod: FT-Last\n")
    options = small_run("~/data", "~/out", "--train.epochs", "1")
    done = run_cli(options[0], "--config", home / "run.yaml", *options[5:])
    assert done.returncode == 0, done.stderr
    assert json.loads((home / "out" / "adapter" / "adapter_config.json").read_text())["data"]["dataset"] == str(
        home / "data"
    )
    for arguments in (
        ["eval", "--adapter", "~/out/adapter", "--output=~/deep/r.json"],
        ["predict", "--adapter", "~/out/adapter", "~/data/test/red/0.png"],
        ["merge", "--adapter", "~/out/adapter", "--output=~/m.safetensors"],
        ["compare", "~/out", "--output=~/table"],
        ["report", "~/out", "--html", "--output=~/page.html"],
    ):
        done = run_cli(*arguments)
        assert done.returncode == 0, done.stderr
    assert {"deep", "m.safetensors", "table", "page.html"} <= {path.name for path in home.iterdir()}
    TinyTLModel.from_pretrained("~/out/adapter").save_pretrained("~/saved")
    assert (home / "saved" / "adapter_config.json").is_file()
    assert load_merged("~/m.safetensors").label_names == ["blue", "red"]


def test_a_home_that_is_not_there_is_no_crash():
    assert local_path("~no_such_user/x").name == "x"
    with pytest.raises(TinyTLError, match="~no_such_user/x"):
        TinyTLModel.from_pretrained("~no_such_user/x")


ADDRESSES = ["file://{}", "file:{}", "file://localhost{}", "FILE://{}"]


@pytest.mark.parametrize("spelling", ADDRESSES)
def test_an_address_of_this_disk_is_its_path_in_every_option(spelling, home):
    place = str(home / "my runs" / "x")
    address = spelling.format(place.replace(" ", "%20"))
    config = Config(output_dir=address, data=DataConfig(dataset=address), backbone=BackboneConfig(weights=address))
    assert (config.output_dir, config.data.dataset, config.backbone.weights) == (place, place, place)
    assert PredictConfig(adapter=address, csv=f"{address}.csv").csv == f"{place}.csv"
    assert local_path(address) == home / "my runs" / "x"


def test_what_is_there_is_meant_before_an_address_is_decoded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "100%25.png")
    write_image(tmp_path / "a b.png")
    assert path_of(f"file://{tmp_path}/100%25.png") == f"{tmp_path}/100%25.png"
    assert path_of(f"file://{tmp_path}/a%20b.png") == f"{tmp_path}/a b.png"
    assert path_of("file://a b.png") == "a b.png"  # two slashes, as people write them
    for name in ("a%20b.png", "files/x.png", "https://x.org/file://x", "profile:x"):
        assert path_of(name) == name
    (tmp_path / "file:").mkdir()
    write_image(tmp_path / "file:" / "x.png")
    assert path_of("file:/x.png") == "file:/x.png"


def test_commands_take_addresses_of_this_disk(tmp_path):
    for number in range(8):
        write_image(tmp_path / "my photos" / ["cat", "dog"][number % 2] / f"{number}.png", seed=number)
    address = f"file://{tmp_path}/my%20photos"
    run = tmp_path / "run"
    done = run_cli(*small_run(address, f"file://{run}", "--method", "FT-Last", "--train.epochs", "1"))
    assert done.returncode == 0 and "2 classes (cat, dog), 8 images in train" in done.stderr, done.stderr
    adapter = f"file://{run}/adapter"
    done = run_cli("eval", "--adapter", adapter, "--data.dataset", address)
    assert done.returncode == 0 and "trained on none of them" in done.stderr, done.stderr
    done = run_cli("predict", "--adapter", adapter, f"{address}/cat/0.png", f"{address}/dog", "--json", "true")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line)["image"] for line in done.stdout.splitlines()]
    assert found == [f"{tmp_path}/my photos/{name}" for name in ("cat/0.png", *(f"dog/{n}.png" for n in (1, 3, 5, 7)))]
    done = run_cli("predict", "--adapter", adapter, f"file://{tmp_path}/none.png")
    assert done.returncode == 1 and f"{tmp_path}/none.png: error: " in done.stderr and "URL" not in done.stderr
    with pytest.raises(TinyTLError, match=f"there is no {tmp_path}/none"):
        open_data(DataConfig(dataset=f"file://{tmp_path}/none"))


@pytest.mark.parametrize("name", ["metadata.csv", "x.csv", "x.parquet"])
def test_addresses_in_tables_are_decoded(name, tmp_path):
    paths = [write_image(tmp_path / "data" / "my photos" / f"{number}.png", seed=number) for number in range(8)]
    addresses = [f"file://{str(path).replace(' ', '%20')}" for path in paths]
    table = pd.DataFrame({"file_name": addresses, "label": ["cat", "dog"] * 4})
    if name.endswith("csv"):
        table.to_csv(tmp_path / "data" / name, index=False)
    else:
        table.to_parquet(tmp_path / "data" / name)
    dataset = tmp_path / "data" if name == "metadata.csv" else tmp_path / "data" / name
    assert open_data(DataConfig(dataset=str(dataset), eval_fraction=0.5)).found.images == {"train": 8}


def test_an_address_is_one_image_in_python(make_model, tmp_path):
    model = make_model("FT-Last", train_size=32).eval()
    path = write_image(tmp_path / "a b.png")
    assert model.preprocess(path.as_uri()).equal(model.preprocess(path))
