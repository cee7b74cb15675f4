"""A machine that reaches no Hub: the command line says so soon, and takes what is in the cache."""

import time

import datasets
import pytest
from datasets import Dataset
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils import _http

from tinytl_hf import TinyTLError, TinyTLModel
from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.tables import load
from tinytl_hf.hub import client

NOWHERE = "http://127.0.0.1:1"


@pytest.fixture
def waits(monkeypatch, tmp_path):
    """How long the command line's client waits in all for a Hub that nobody reaches."""
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for module, name in ((constants, "ENDPOINT"), (datasets.config, "HF_ENDPOINT")):
        monkeypatch.setattr(module, name, NOWHERE)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", NOWHERE + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    client.bound_waiting()
    yield slept
    set_client_factory(_http.default_client_factory)


@pytest.mark.parametrize(
    "ask",
    [
        lambda: load(DataConfig(dataset="nobody/flowers")),
        lambda: TinyTLModel.from_pretrained("nobody/flowers"),
        lambda: TinyTLModel.from_backbone("timm/resnet10t.c3_in1k", num_classes=2),
    ],
)
def test_what_is_not_in_the_cache_is_told_after_two_seconds_at_most(ask, waits):
    with pytest.raises(TinyTLError):
        ask()
    assert 0 < sum(waits) <= 2


def test_a_data_set_of_the_cache_is_loaded(waits, tmp_path):
    Dataset.from_dict({"image": ["a.png", "b.png"], "label": [0, 1]}).to_parquet(tmp_path / "train.parquet")
    cache = tmp_path / "datasets"
    builder = datasets.load_dataset_builder("parquet", data_files={"train": str(tmp_path / "train.parquet")})
    target = cache / "nobody___flowers" / "default" / "0.0.0" / ("0" * 40)
    builder.download_and_prepare(str(target))
    for file in target.glob("*.arrow"):
        file.rename(file.with_name(file.name.replace("parquet", "flowers")))
    loaded = load(DataConfig(dataset="nobody/flowers"))
    assert loaded.splits["train"]["label"] == [0, 1] and sum(waits) <= 2
