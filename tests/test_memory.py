import json
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from shared import assert_left_as_found, run_cli, small_run, state_of

from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.network import LiteConfig
from tinytl_hf.config.run import Config, MemoryConfig
from tinytl_hf.config.train import TrainConfig
from tinytl_hf.config.verbs import MemoryTableConfig
from tinytl_hf.device import make_accelerator
from tinytl_hf.errors import TinyTLError
from tinytl_hf.lean import native_library
from tinytl_hf.lean.notes import grouped
from tinytl_hf.measure import memory
from tinytl_hf.measure.ledger import kept_by_layer, kept_for_backward
from tinytl_hf.measure.measured_step import random_batch
from tinytl_hf.measure.memory import DataMemory, MemoryRow, memory_table, photo_size_of, to_json
from tinytl_hf.measure.paper_rule import paper_rule
from tinytl_hf.measure.peak import Peak, _cuda_peak, measure_peak, measure_speed, process_high_water

pytestmark = pytest.mark.usefixtures("one_thread")


def make_batch(images, size=64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(images, 3, size, size, generator=generator), torch.arange(images) % 4


@pytest.mark.slow
def test_measured_peak_of_lean_is_under_a_fifth_of_stock(make_model):
    batch = make_batch(8)
    lean = measure_peak(make_model("TinyTL-L+B"), *batch)
    stock = measure_peak(make_model("TinyTL-L+B", lean=False), *batch)
    assert lean.dynamic < stock.dynamic / 5
    assert (lean.frozen_weights, lean.trained_weights) == (stock.frozen_weights, stock.trained_weights)


def test_measuring_leaves_weights_statistics_modes_and_gradients_alone(make_model):
    model = make_model().eval()
    gradient = torch.ones_like(model.backbone.classifier[1].bias)
    model.backbone.classifier[1].bias.grad = gradient
    before, trains = state_of(model), [p.requires_grad for p in model.parameters()]
    measure_peak(model, *make_batch(2))
    assert measure_speed(model, *make_batch(2), repeats=1) > 0
    assert model.backbone.classifier[1].bias.grad is gradient
    model.backbone.classifier[1].bias.grad = None
    assert_left_as_found(model, before)
    assert [p.requires_grad for p in model.parameters()] == trains
    assert not any(module.training for module in model.modules())


def test_parts_of_the_peak_are_what_they_are(make_model):
    model, batch = make_model("FT-Last"), make_batch(2)
    peak = measure_peak(model, *batch)
    trained = 4 * (1280 * 4 + 4)
    assert peak.trained_weights == peak.gradients == trained
    assert peak.optimizer_state == 2 * trained + 2 * 4  # two moments, and a step count for each of two tensors
    everything = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert peak.frozen_weights + peak.trained_weights == everything
    assert peak.kept_activations == kept_for_backward(model, *batch)
    assert peak.dynamic == peak.kept_activations + peak.transient
    assert peak.photos == batch[0].nbytes and peak.gradient_buckets == 0
    assert peak.total == everything + peak.gradients + peak.optimizer_state + peak.photos + peak.dynamic


def test_peak_of_full_training_adds_up_to_no_more_than_was_measured(make_model):
    # The peak comes at the start of the backward pass, before there are all gradients.
    peak = measure_peak(make_model("FT-Full"), *make_batch(8))
    assert peak.gradients < peak.trained_weights
    assert peak.kept_activations > 50e6


def photos(height, width, count=2):
    return torch.zeros(count, height, width, 3, dtype=torch.uint8).permute(0, 3, 1, 2), torch.arange(count) % 4


def test_the_step_starts_from_photos_and_large_ones_cost_no_more(make_model):
    # A large photo's crop goes from bytes to bytes of the network's size; as floats a photo takes up to 9.6 MB.
    sizes, whole = ((32, 32), (448, 672), (448, 1792)), Config(data=DataConfig(crop_scale=(1.0, 1.0)))
    peaks = {size: measure_peak(make_model("TinyTL-B"), *photos(*size), whole) for size in sizes}
    small, middle, large = peaks.values()
    assert [peak.photos for peak in peaks.values()] == [2 * 3 * height * width for height, width in peaks]
    assert abs(middle.dynamic - small.dynamic) < 0.2e6 and abs(large.dynamic - small.dynamic) < 0.2e6
    assert small.kept_activations == large.kept_activations
    # It is over when the forward pass starts, so a step that needs more takes no more of large photos.
    full = [measure_peak(make_model("FT-Full"), *photos(*size, 8), whole).dynamic for size in (sizes[0], sizes[2])]
    assert full[0] == full[1] > large.dynamic


@pytest.mark.skipif(native_library.kernels() is None, reason="without a compiler bf16 saves nothing on a CPU")
def test_bf16_saves_half_of_what_fp32_takes_where_the_processor_multiplies_it(make_model):
    dynamic = {}
    for precision in ("no", "bf16"):
        config = Config(train=TrainConfig(mixed_precision=precision))
        model = make_accelerator(precision, 1, cpu=True).prepare(make_model(train_size=224))
        dynamic[precision] = measure_peak(model, *photos(448, 672, 8), config).dynamic
    multiplies = native_library.kernels().name == b"AVX-512 BF16"  # others hold a lite residual's maps in fp32
    assert dynamic["bf16"] < dynamic["no"] * (0.55 if multiplies else 0.9)


@pytest.mark.slow
def test_the_step_has_the_optimizer_and_the_accumulation_of_the_run(make_model):
    once, twice = (
        measure_peak(make_model("FT-Full", train_size=224), *make_batch(4), Config(train=TrainConfig(**options)))
        for options in ({"optimizer": "sgd"}, {"gradient_accumulation_steps": 2, "max_grad_norm": 1.0})
    )
    trained = sum(p.nbytes for p in make_model("FT-Full").parameters())
    assert once.optimizer_state == trained < twice.optimizer_state / 2  # one moment; two and a step count
    # The first pass's gradients are there when the second pass takes most.
    assert once.gradients < trained == twice.gradients
    assert twice.total > once.total + trained


def test_images_that_a_layer_keeps_count(make_model):
    model, (images, labels) = make_model("FT-Full", lean=False), make_batch(2)
    assert kept_by_layer(model, images, labels)["features.0.0"] >= images.nbytes


def test_photos_are_of_the_size_that_is_named_or_of_the_data_or_those_that_decoding_makes():
    config, data = (
        Config(data=DataConfig(train_size=224)),
        DataMemory({"train": 10_000_000, "eval": "streams"}, (47, 40)),
    )
    assert photo_size_of(config, MemoryTableConfig(photo_size="32x64"), data) == (32, 64)
    assert photo_size_of(config, MemoryTableConfig(), data) == (47, 40)
    assert photo_size_of(config, MemoryTableConfig(), None) == (448, 672)
    assert "once a machine: train 10.0 MB, eval streams" in memory_table(make_rows(), data)
    with pytest.raises(TinyTLError, match="photo_size=448: use height x width in px, such as 448x672"):
        MemoryTableConfig(photo_size="448")


def test_the_conditions_name_the_gpu_that_is_measured_and_how_the_runs_passes_go_there(monkeypatch):
    monkeypatch.setattr(memory, "device_of_figures", lambda: torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU {device}")
    config = Config(memory=MemoryConfig(backend="eager"))
    engines = []
    for processes in (1, 2):
        monkeypatch.setattr(memory, "world_size", lambda processes=processes: processes)
        found = memory.conditions(config)
        assert found["device"] == "GPU cuda:1"
        engines.append(found["engine"])
    assert engines == ["lean, eager, CUDA graph", "lean, eager, no CUDA graph (several processes)"]


def test_the_peak_on_cuda_is_that_of_the_gpu_that_is_named(monkeypatch):
    here, figures = torch.device("cuda", 1), {torch.device("cuda", 1): [100, 350]}
    reset = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: reset.append(device))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: figures.get(device, [0, 0])[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: figures.get(device, [0, 0])[1])
    assert _cuda_peak(lambda: None, here) == 250 and reset == [here]


@pytest.mark.gpu
def test_peak_on_a_gpu(make_model):
    images, labels = (tensor.cuda() for tensor in make_batch(8))
    lean = measure_peak(make_model().cuda(), images, labels)
    stock = measure_peak(make_model(lean=False).cuda(), images, labels)
    assert 0 < lean.dynamic < stock.dynamic / 5


def test_high_water_is_the_most_that_was_resident():
    resource = pytest.importorskip("resource")
    unit = 1 if sys.platform == "darwin" else 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    assert process_high_water() == pytest.approx(most, rel=0.05)
    assert most > 50e6  # torch alone takes that


def make_rows():
    peak = Peak(1_000_000, 2_000_000, 3_000_000, 4_000_000, 5_000_000, 6_000_000, photos=500_000)
    layers = {f"features.{i} (Conv2d)": 9_000_000 - 1_000_000 * i for i in range(9)}
    return [
        MemoryRow("TinyTL-L+B", "lean", 63.9e6, 5_000_000, peak, 12.34, 456_000_000, {}),
        MemoryRow("FT-Full", "stock", 447.2e6, 5_000_000, peak, 7.0, 0, layers),
    ]


def test_table_has_every_row_and_says_what_kind_each_figure_is():
    table = memory_table(make_rows())
    for label in ("paper rule (analytic)", "kept for backward (ledger)", "peak (measured)"):
        assert label in table
    lines = [line.split() for line in table.splitlines()]
    parts = ["1.0", "2.0", "3.0", "4.0", "0.5", "5.0", "6.0"]
    assert ["TinyTL-L+B", "lean", "63.9", "5.0", "21.5", *parts, "11.0", "456.0", "12.3"] in lines
    assert ["FT-Full", "stock", "447.2", "5.0", "21.5", *parts, "11.0", "0.0", "7.0"] in lines
    assert "FT-Full, stock: 9 layers stay stock: features.0 (Conv2d)" in table
    assert "features.0 (Conv2d) 9.0, features.1 (Conv2d) 8.0, " in table and "keep 45.0 MB for backward" in table


def test_the_table_says_which_part_trains_how_where_it_is_not_stock():
    paths = {"conv1": "masks", **{f"layer1.{i}": "masks" for i in range(3)}, "layer2.0": "recompute", "fc": "stock"}
    lean, stock = make_rows()
    table = memory_table([replace(lean, training_paths=paths), replace(stock, training_paths={"conv1": "stock"})])
    assert "TinyTL-L+B, lean: masks: conv1, layer1.0-2; recompute: layer2.0; stock: fc\n" in table
    assert "FT-Full, stock: stock" not in table


@pytest.mark.parametrize(
    ("backbone", "method", "expected"),
    [
        ("mobilenet_v2", "TinyTL-L+B", {"masks": ["features.0-18"]}),
        (
            "mobilenet_v3_large",
            "TinyTL-B",
            {"recompute": ["features.0", "features.4-16"], "masks": ["features.1-3"], "stock": ["classifier.1"]},
        ),
        (
            "resnet18",
            "FT-Norm+Last",
            {
                "masks": ["conv1", "relu", "maxpool"],
                "stock": ["bn1"],
                "layer by layer": ["layer1.0-1", "layer2.0-1", "layer3.0-1", "layer4.0-1"],
            },
        ),
        (
            "convnext_tiny",
            "TinyTL-B",
            {
                "recompute": [
                    *("features.0", "features.1.0-2", "features.2", "features.3.0-2"),
                    *("features.4", "features.5.0-8", "features.6", "features.7.0-2"),
                ],
                "stock": ["classifier.0"],
            },
        ),
    ],
)
def test_a_model_knows_which_part_trains_how(backbone, method, expected, make_model):
    assert grouped(make_model(method, backbone).training_paths) == expected
    assert set(make_model(method, backbone, lean=False).training_paths.values()) == {"stock"}


@pytest.mark.parametrize("method", ["TinyTL-B", "TinyTL-L+B", "FT-Norm+Last", "FT-Full"])
def test_memory_of_one_network_is_the_same_in_both_libraries(method, make_model):
    """timm's norms hold their activations, and are layers of their own all the same."""
    pytest.importorskip("timm")
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    ours, theirs = (make_model(method, name, lean=False) for name in ("mobilenet_v2", "timm/mobilenetv2_100"))
    assert paper_rule(theirs, 2) == paper_rule(ours, 2)
    assert kept_for_backward(theirs, images, labels) == kept_for_backward(ours, images, labels)


@pytest.mark.slow
def test_the_table_of_a_timm_network_names_its_parts(ready_processes):
    pytest.importorskip("timm")
    options = [
        "--backbone.name",
        "timm/tf_efficientnet_lite0",
        "--backbone.weights",
        "none",
        "--data.train_size",
        "32",
    ]
    done = run_cli("memory", *options, "--methods", "[TinyTL-B]", "--batch_size", "1", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    assert "backbone timm/tf_efficientnet_lite0, train_size 32" in done.stdout
    assert "TinyTL-B, lean: masks: conv_stem, bn1, blocks.0.0, blocks.1.0-1," in done.stdout


def test_json_has_every_row_its_labels_and_the_conditions():
    report = json.loads(to_json(make_rows(), {"device": "cpu", "threads": 1}))
    assert report["unit"] == "bytes" and report["conditions"] == {"device": "cpu", "threads": 1}
    assert report["labels"]["peak"] == "peak (measured)"
    assert [row["method"] for row in report["rows"]] == ["TinyTL-L+B", "FT-Full"]
    assert report["rows"][0]["peak"]["total"] == 21_500_000 and report["rows"][0]["peak"]["dynamic"] == 11_000_000
    assert len(report["rows"][1]["stock_layers"]) == 9


COLOURS_DECODED = {  # two classes of images 40 px wide and 36 px high, 37 px, ...
    "train": sum(2 * 3 * 40 * (36 + i) for i in range(12)),
    "eval": sum(2 * 3 * 40 * (36 + i) for i in range(5)),
}


def test_the_verb_measures_each_engine_in_a_process_of_its_own(colour_folder, tmp_path, ready_processes):
    arguments = ["memory", "--methods", "[TinyTL-B]", "--backbone.weights", "none", "--data.train_size", "64"]
    data = ["--data.dataset", colour_folder, "--with_data"]
    done = run_cli(*arguments, "--batch_size", "4", "--repeats", "1", "--json", "--plot", tmp_path / "bars.png", *data)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    plain, lean = report["rows"]
    assert (plain["engine"], lean["engine"]) == ("stock", "lean")
    assert report["conditions"]["batch_size"] == 4 and plain["paper"] == lean["paper"]
    assert report["decoded_images"] == COLOURS_DECODED and plain["peak"]["photos"] == 4 * 3 * 47 * 40
    assert [report["conditions"][name] for name in ("photo_size", "optimizer")] == ["47x40", "adamw"]
    assert plain["kept"] > 50 * lean["kept"] and plain["peak"]["dynamic"] > 4 * lean["peak"]["dynamic"]
    assert set(lean["training_paths"].values()) == {"masks"} and set(plain["training_paths"].values()) == {"stock"}
    assert plain["high_water"] > 100e6 and plain["images_per_second"] > 0
    with Image.open(tmp_path / "bars.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backbone.name", "mobilnet_v2"], "backbone.name=mobilnet_v2: torchvision has no such classifier"),
        (["--backbone.name", "swin_t"], "belongs to a ShiftedWindowAttention, which no method knows how to train"),
        (["--data.train_size", "16"], "data.train_size=16: mobilenet_v2 reduces an image 32 times"),
    ],
)
def test_what_no_method_can_train_is_said_once_before_anything_is_measured(options, message, monkeypatch):
    monkeypatch.setattr("tinytl_hf.measure.memory.in_own_process", None)
    done = run_cli("memory", "--backbone.weights", "none", *options)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert message in line


def test_no_empty_table_is_printed_where_all_methods_are_left_out(monkeypatch):
    def fails(*arguments):
        raise TinyTLError(f"lite.groups=2: does not fit {arguments[-2]}")

    monkeypatch.setattr("tinytl_hf.measure.memory.in_own_process", fails)
    done = run_cli("memory", "--backbone.weights", "none", "--data.train_size", "32")
    *others, last = done.stderr.splitlines()
    assert done.returncode == 1 and done.stdout == "" and "error: lite.groups=2: does not fit FT-Layerwise" in last
    assert len(others) == 6 and all("is left out" in line for line in others)


def test_a_run_leaves_what_its_training_step_takes(colour_folder, tmp_path):
    options = ["--train.epochs", "1", "--memory.report", "true", "--train.optimizer", "sgd"]
    options += ["--train.gradient_accumulation_steps", "2", "--train.max_grad_norm", "1"]
    done = run_cli(*small_run(colour_folder, tmp_path, *options))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "memory.json").read_text())
    (row,) = report["rows"]
    assert (row["method"], row["engine"]) == ("TinyTL-L+B", "lean")
    expected = {"batch_size": 4, "train_size": 32, "photo_size": "47x40", "optimizer": "sgd", "processes": 1}
    expected |= {"gradient_accumulation_steps": 2, "max_grad_norm": 1.0}
    assert expected.items() <= report["conditions"].items()
    assert report["decoded_images"] == COLOURS_DECODED
    (line,) = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row["images_per_second"] == line["train"]["images_per_second"]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert row["peak"]["trained_weights"] == sum(tensor.nbytes for tensor in tensors.values())
    trained = sum(tensor.nbytes for name, tensor in tensors.items() if "running" not in name and "num_" not in name)
    assert row["peak"]["optimizer_state"] == row["peak"]["gradients"] == trained
    assert row["kept"] == row["peak"]["kept_activations"] > 0 and row["high_water"] > 100e6


@pytest.mark.slow
def test_memory_is_measured_in_the_precision_of_the_run(ready_processes):
    arguments = ["memory", "--methods", "[TinyTL-B]", "--backbone.weights", "none", "--data.train_size", "64"]
    arguments += ["--backbone.name", "mnasnet0_5", "--batch_size", "8", "--repeats", "1", "--json"]
    kept = {}
    for precision in ("no", "bf16"):
        done = run_cli(*arguments, "--train.mixed_precision", precision)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["conditions"]["precision"] == precision
        kept[precision] = report["rows"][0]["kept"]
    assert 0.45 < kept["bf16"] / kept["no"] < 0.7


@pytest.mark.slow
def test_the_promised_memory_of_mobilenet_v2_at_224_px(make_model):
    full = make_model("FT-Full", train_size=224, lean=False)
    both = make_model("TinyTL-L+B", train_size=224)
    stock = measure_peak(full, *random_batch(full, 8))
    eight, sixteen = (measure_peak(both, *random_batch(both, size)) for size in (8, 16))
    assert stock.dynamic > 15 * eight.dynamic and stock.total > 8 * eight.total
    assert sixteen.dynamic - eight.dynamic < 8 * 2.75e6


@pytest.mark.slow
def test_one_image_at_a_time_takes_a_twelfth_of_full_training(make_model):
    full = make_model("FT-Full", train_size=224, lean=False)
    both = make_model("TinyTL-L+B", train_size=224, lite=LiteConfig(norm="group"))
    assert measure_peak(full, *random_batch(full, 8)).total > 12 * measure_peak(both, *random_batch(both, 1)).total
