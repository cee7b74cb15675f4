"""``~`` is the user's home in every option and argument that is a path, also where no shell has seen it."""

import json
import shutil

import pytest
from shared import run_cli, small_run

from tinytl_hf import TinyTLError, TinyTLModel, load_merged
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
from tinytl_hf.disk import local_path


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
