import json
import sys
from dataclasses import replace

import pytest
import torch
from conftest import METHODS, run_cli, small_run
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision.models._api import BUILTIN_MODELS

from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.network import HeadConfig, LiteConfig
from tinytl_hf.config.run import Config
from tinytl_hf.config.train import TrainConfig
from tinytl_hf.config.verbs import MemoryTableConfig
from tinytl_hf.device import make_accelerator
from tinytl_hf.errors import TinyTLError
from tinytl_hf.lean import native_library
from tinytl_hf.lean.notes import grouped
from tinytl_hf.measure.convolutions import Convolutions
from tinytl_hf.measure.ledger import kept_by_layer, kept_for_backward
from tinytl_hf.measure.measured_step import MeasuredStep, random_batch
from tinytl_hf.measure.memory import DataMemory, MemoryRow, memory_table, photo_size_of, to_json
from tinytl_hf.measure.paper_rule import paper_rule
from tinytl_hf.measure.peak import Peak, measure_peak, measure_speed, process_high_water
from tinytl_hf.measure.speed import BenchRow, bench_table

HEAD_INPUT = 1280 * 4  # bytes an image


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def two_convolutions(monkeypatch):
    """The name under which torchvision then knows :class:`TwoConvolutions`, as one of its own."""

    def make(weights=None):
        return TwoConvolutions()

    make.__module__ = "torchvision.models.two_convolutions"
    monkeypatch.setitem(BUILTIN_MODELS, "two_convolutions", make)
    return "two_convolutions"


def make_batch(images, size=64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(images, 3, size, size, generator=generator), torch.arange(images) % 4


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_left_as_found(model, before):
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def bytes_of_loss(images, classes=4):
    """What cross entropy keeps: the log-probabilities, and a scalar to divide by."""
    return images * classes * 4 + 4


def test_paper_rule_gives_the_papers_figure_of_full_fine_tuning(make_model):
    # Figure 4 of the paper: MobileNetV2, 100 classes, 224 px, batch 8.
    assert paper_rule(make_model("FT-Full", num_classes=100, train_size=224), 8) / 1e6 == pytest.approx(447.8, abs=0.2)


def test_training_biases_takes_little_more_than_training_the_head_by_the_papers_rule(make_model):
    # Section 3.1: biases need no activations, only a bit for each value of a ReLU.
    mb = {m: paper_rule(make_model(m, num_classes=10, train_size=224), 8) / 1e6 for m in METHODS}
    assert mb["FT-Last"] < mb["TinyTL-B"] < 1.03 * mb["FT-Last"]
    assert mb["TinyTL-B"] < mb["TinyTL-L"] <= mb["TinyTL-L+B"] < mb["FT-Norm+Last"] < mb["FT-Full"]
    assert mb["FT-Full"] > 6.5 * mb["TinyTL-L+B"]  # "up to 6.5x", abstract
    assert mb["FT-Layerwise"] == mb["FT-Full"]


PIXELS = 32 * 32


class TwoConvolutions(nn.Module):
    """3 -> 4 -> 8 channels on maps of one size, two classes."""

    def __init__(self):
        super().__init__()
        first = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        second = nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.features = nn.Sequential(*first, *second)
        self.classifier = nn.Linear(8, 1000)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("method", "kept_and_run", "trained"),
    [
        # Nothing is kept; the second convolution takes its input and output, 4 and 8 maps.
        ("FT-Last", 4 * PIXELS * (4 + 8), 18),
        # As much, and a bit for each value of the first ReLU.
        ("TinyTL-B", 4 * PIXELS * (4 + 8) + 4 * PIXELS // 8, 18 + 4 + 8),
        # Inputs of both convolutions and both norms, the first ReLU's bits, and what the second ReLU reads.
        ("FT-Full", 4 * PIXELS * (3 + 4 + 4 + 8 + 8) + 4 * PIXELS // 8, 182),
    ],
)
def test_paper_rule_of_two_convolutions_by_hand(method, kept_and_run, trained, make_model, two_convolutions):
    # 182 parameters: 4 * 3 * 9 and 4 * 8 weights, 2 * 4 and 2 * 8 of the norms, 8 * 2 + 2 of the head.
    model = make_model(method, two_convolutions, num_classes=2, train_size=32)
    assert paper_rule(model, 5) == 5 * kept_and_run + 4 * trained + (182 - trained)  # frozen ones in 8 bits


def test_paper_rule_does_not_depend_on_the_engine_and_leaves_the_model_alone(make_model):
    lean, stock = make_model(), make_model(lean=False)
    before = state_of(lean)
    lean.backbone.features[0].eval()
    assert paper_rule(lean, 2) == paper_rule(stock, 2)
    assert lean.training and not lean.backbone.features[0].training
    assert_left_as_found(lean, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lean.modules())


def test_paper_rule_by_hand_where_the_widest_layer_decides(make_model):
    model = make_model("FT-Last", train_size=32)
    # features.2's expansion reads 16 and writes 96 channels of 16x16 px; nothing is kept before it.
    expected = 4 * 16 * 16 * (16 + 96)
    trained = 1281 * 4
    frozen = sum(p.numel() for p in model.parameters()) - trained
    assert paper_rule(model, 3) == 3 * expected + 4 * trained + frozen
    assert paper_rule(model, 3, frozen_bits=32) == 3 * expected + 4 * (trained + frozen)


@pytest.mark.parametrize("backbone", ["mobilenet_v3_small", "efficientnet_b0", "mnasnet1_0", "resnet18"])
def test_paper_rule_ranks_the_methods_on_other_backbones(make_model, backbone):
    figures = [
        paper_rule(make_model(method, backbone=backbone), 8)
        for method in ("FT-Last", "TinyTL-B", "TinyTL-L+B", "FT-Full")
    ]
    assert figures == sorted(figures)


@pytest.mark.parametrize("lean", [True, False])
def test_ledger_of_last_layer_is_the_heads_input_and_the_loss(make_model, lean):
    model = make_model("FT-Last", lean=lean)
    assert kept_for_backward(model, *make_batch(3)) == 3 * HEAD_INPUT + bytes_of_loss(3)


def test_ledger_of_lean_biases_is_one_bit_for_each_relu6(make_model):
    model = make_model("TinyTL-B")
    values = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: values.append(output.numel()))
        for module in model.modules()
        if isinstance(module, nn.ReLU6)
    ]
    with torch.no_grad():  # the stock pass, with layers one by one
        model.eval()(make_batch(2)[0])
    for hook in hooks:
        hook.remove()
    masks = sum(-(-count // 8) for count in values)
    assert kept_for_backward(model, *make_batch(2)) == masks + 2 * HEAD_INPUT + bytes_of_loss(2)


def test_ledger_sees_what_each_lite_residual_keeps(make_model):
    biases, both = make_model("TinyTL-B"), make_model("TinyTL-L+B")
    kept = []  # the pooled input, and mean and deviation of each norm's channels
    for block in both._blocks.values():
        lite = block.lite_residual
        vectors = 2 * (lite.norm1.num_features + lite.norm2.num_features)
        lite.conv1.register_forward_hook(
            lambda _, inputs, output, vectors=vectors: kept.append(inputs[0].numel() + vectors)
        )
    with torch.no_grad():
        both.eval()(make_batch(2)[0])
    assert len(kept) == 17
    batch, expected = make_batch(2), 4 * sum(kept)
    assert kept_for_backward(both, *batch) == kept_for_backward(biases, *batch) + expected


def test_ledger_of_lean_biases_is_over_50_times_smaller_than_of_stock(make_model):
    batch = make_batch(2)
    lean = kept_for_backward(make_model("TinyTL-B"), *batch)
    stock = kept_for_backward(make_model("TinyTL-B", lean=False), *batch)
    assert stock > 50 * lean


def test_ledger_leaves_the_model_and_the_generator_alone(make_model):
    model = make_model("FT-Full", head=HeadConfig(dropout=0.5)).eval()
    before, generator = state_of(model), torch.get_rng_state()
    kept_for_backward(model, *make_batch(2))
    assert_left_as_found(model, before)
    assert not any(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), generator)


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


def test_bench_times_each_contender_and_says_where_a_batch_is_too_small(ready_processes):
    arguments = ["bench", "--backbone.weights", "none", "--train_sizes", "[32]", "--batch_sizes", "[1, 4]"]
    arguments += ["--backbone.name", "mobilenet_v3_small", "--train.mixed_precision", "bf16", "--repeats", "1"]
    done = run_cli(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    one, four = report["rows"]
    assert "larger batch" in one["refused"] and one["images_per_second"] == {}
    steps = ["FT-Full stock", "TinyTL-L+B stock", "TinyTL-L+B lean"]
    assert list(four["images_per_second"])[:3] == steps and "TinyTL-L+B convolutions" in four["images_per_second"]
    assert all(speed > 0 for speed in four["images_per_second"].values())
    assert report["conditions"]["threads"] == torch.get_num_threads() and report["conditions"]["precision"] == "bf16"


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


def test_the_ledger_names_the_layer_that_keeps_a_map(make_model):
    model, batch = make_model("FT-Full", "resnet18", lean=False), make_batch(2)
    kept = kept_by_layer(model, *batch)
    assert sum(kept.values()) == kept_for_backward(model, *batch)
    # The first norm keeps its input; the pooling keeps its own and, as int64, where each value came from.
    assert kept["bn1"] > 4 * 2 * 64 * 32 * 32
    assert kept["maxpool"] >= 8 * 2 * 64 * 16 * 16
