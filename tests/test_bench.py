import json

import pytest
import torch
from shared import run_cli
from torchvision.models._api import BUILTIN_MODELS

from tinytl_hf import TinyTLError
from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.network import BackboneConfig
from tinytl_hf.config.run import Config
from tinytl_hf.config.train import TrainConfig
from tinytl_hf.config.verbs import BenchConfig
from tinytl_hf.measure import speed
from tinytl_hf.measure.convolutions import Convolutions
from tinytl_hf.measure.measured_step import MeasuredStep, random_batch
from tinytl_hf.measure.speed import BenchRow, bench_table

pytestmark = pytest.mark.usefixtures("one_thread")


def test_bench_times_each_contender_and_says_where_a_batch_is_too_small(ready_processes):
    arguments = ["bench", "--backbone.weights", "none", "--train_sizes", "[32]", "--batch_sizes", "[1, 4]"]
    arguments += ["--backbone.name", "mobilenet_v3_small", "--train.mixed_precision", "bf16", "--repeats", "1"]
    done = run_cli(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    one, four = report["rows"]
    assert one["refused"].startswith("FT-Full stock: batch norm needs") and "larger batch" in one["refused"]
    assert one["images_per_second"] == {}
    steps = ["FT-Full stock", "TinyTL-L+B stock", "TinyTL-L+B lean"]
    assert list(four["images_per_second"])[:3] == steps and "TinyTL-L+B convolutions" in four["images_per_second"]
    assert all(value > 0 for value in four["images_per_second"].values())
    assert report["conditions"]["threads"] == torch.get_num_threads() and report["conditions"]["precision"] == "bf16"


def test_no_empty_table_is_printed_where_nothing_can_be_timed(monkeypatch):
    refuse = BenchRow(32, 1, {}, "method=TinyTL-L+B: no blocks")
    monkeypatch.setattr(speed, "in_own_process", lambda *_: refuse)
    options = ["--backbone.weights", "none", "--train_sizes", "[32]"]
    done = run_cli("bench", *options, "--batch_sizes", "[2, 1]")
    assert done.returncode == 1 and done.stdout == ""
    assert "error: nothing can be timed; at 32 px, batch 1: method=TinyTL-L+B: no blocks" in done.stderr
    monkeypatch.setattr(speed, "in_own_process", None)
    done = run_cli("bench", *options, "--backbone.name", "mobilnet_v2")
    assert done.returncode == 1 and "error: backbone.name=mobilnet_v2: torchvision has no such" in done.stderr


@pytest.mark.parametrize(
    ("size", "reason"), [(16, "mobilenet_v2 reduces an image 32 times; use 32 or more"), (4000, "use 2048 or less")]
)
def test_a_size_that_cannot_be_timed_is_told_by_the_option_that_has_it(size, reason):
    with pytest.raises(TinyTLError, match=f"at {size} px, batch 1: train_sizes={size}: {reason}"):
        list(
            speed.bench_rows(
                Config(backbone=BackboneConfig(weights="none")), BenchConfig(train_sizes=[size], batch_sizes=[1])
            )
        )


def test_a_size_that_images_grow_from_does_not_matter_to_a_step(monkeypatch):
    seen = []
    monkeypatch.setattr(speed, "_steps", lambda config, _: seen.append(config.data) or {})
    monkeypatch.setattr(speed, "Convolutions", lambda _: None)
    monkeypatch.setattr(speed, "_speeds", lambda *_: {})
    monkeypatch.setattr(speed, "device_of_figures", lambda: torch.device("cuda"))
    row = speed._time_in_turns(Config(data=DataConfig(start_size=128)), 96, 1, 1)
    assert row.refused is None and (seen[0].train_size, seen[0].start_size) == (96, None)


def test_bench_gives_the_speed_of_lean_as_a_multiple_of_both_stock_ones_and_as_a_share_of_the_convolutions():
    speeds = {"FT-Full stock": 10.0, "TinyTL-B stock": 12.0, "TinyTL-B lean": 18.0, "TinyTL-B convolutions": 36.0}
    table = bench_table([BenchRow(96, 8, speeds), BenchRow(96, 1, {}, "batch too small")], "TinyTL-B")
    rows = [line.split() for line in table.splitlines()]
    assert ["96", "8", "10.0", "12.0", "18.0", "36.0", "1.80x", "1.50x", "0.50x"] in rows
    assert ["96", "1", "-", "-", "-", "-", "-", "-", "-"] in rows and "96 px, batch 1: batch too small" in table


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "timm/tf_efficientnet_lite0"])
def test_convolutions_are_counted_forward_and_back_to_what_needs_a_gradient(make_model, backbone):
    if backbone.startswith("timm/"):
        pytest.importorskip("timm", reason="the extra timm is not installed")

    def passes(method, accumulation=1):
        model = make_model(method, backbone, train_size=32, lean=False).train()
        config = Config(
            train=TrainConfig(gradient_accumulation_steps=accumulation, global_batch_size=2 * accumulation)
        )
        step = Convolutions(MeasuredStep(model, *random_batch(model, 2), config))
        step()
        assert step.images == 2 * accumulation
        return len(step.passes)

    model = make_model("FT-Full", backbone, train_size=32)
    count = sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    assert passes("FT-Last") == count  # forward alone
    assert passes("FT-Full") == 3 * count - 1  # the photos need no gradient
    assert passes("TinyTL-B") == 2 * count - 1
    assert passes("TinyTL-B", accumulation=2) == 2 * (2 * count - 1)


class PaddedByName(torch.nn.Module):
    """Convolutions as ConvMixer has them, whose padding is a word, on maps that are much smaller than the kernel."""

    def __init__(self):
        super().__init__()
        patches = torch.nn.Conv2d(3, 4, 16, stride=16, padding="valid")
        self.features = torch.nn.Sequential(patches, torch.nn.Conv2d(4, 4, 9, padding="same", groups=4))
        self.classifier = torch.nn.Linear(4, 1000)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


def test_convolutions_whose_padding_is_a_word_are_timed(make_model, monkeypatch):
    def make(weights=None):
        return PaddedByName()

    make.__module__ = "torchvision.models.padded_by_name"
    monkeypatch.setitem(BUILTIN_MODELS, "padded_by_name", make)
    model = make_model("FT-Full", "padded_by_name", train_size=32, lean=False).train()
    step = Convolutions(MeasuredStep(model, *random_batch(model, 2), Config()))
    assert [tuple(run().shape) for run in step.passes if isinstance(run(), torch.Tensor)] == [(2, 4, 2, 2)] * 2
    assert len(step.passes) == 2 * 3 - 1
