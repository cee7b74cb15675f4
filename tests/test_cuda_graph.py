"""Training passes that are replayed from a CUDA graph, against the same ones launched kernel by kernel."""

import gc
import json
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from shared import run_cli, small_run
from torch import nn

from tinytl_hf import cuda_graph
from tinytl_hf.config.run import Config, MemoryConfig
from tinytl_hf.config.train import TrainConfig
from tinytl_hf.cuda_graph import ReplayedPasses, describe_passes, training_passes, why_launched
from tinytl_hf.data.images import decoded_photo_size
from tinytl_hf.errors import TinyTLError
from tinytl_hf.measure.measured_step import MeasuredStep, random_batch
from tinytl_hf.measure.peak import measure_peak

CONFIG = Config(train=TrainConfig(lr=1e-2, epochs=1, optimizer="sgd", global_batch_size=8))


@pytest.mark.parametrize(
    ("options", "processes", "reason"),
    [
        ({}, 1, None),
        ({"memory": MemoryConfig(cuda_graph=False)}, 1, "memory.lean and memory.cuda_graph are not both on"),
        ({}, 2, "several processes"),
        ({"train": TrainConfig(gradient_accumulation_steps=2)}, 1, "gradient accumulation"),
        ({"train": TrainConfig(gradient_checkpointing=True)}, 1, "gradient checkpointing"),
    ],
)
def test_it_is_said_why_passes_are_not_replayed(options, processes, reason):
    config = Config(**options)
    assert why_launched(config, processes) == reason
    said = ", CUDA graph" if reason is None else f", no CUDA graph ({reason})"
    assert describe_passes(config, torch.device("cuda", 0), processes) == said
    assert describe_passes(config, torch.device("cpu"), processes) == ""


def test_on_a_cpu_and_of_a_stock_model_passes_are_the_models_own(make_model):
    for lean in (True, False):
        model = make_model(lean=lean)
        assert training_passes(model, CONFIG) is model


@pytest.mark.parametrize(("processes", "replayed"), [(1, True), (2, False)])
def test_a_step_that_is_measured_is_replayed_where_the_runs_own_is(processes, replayed, make_model, monkeypatch):
    model = make_model("FT-Last")
    monkeypatch.setattr(model, "parameters", lambda: iter([SimpleNamespace(device=torch.device("cuda", 0))]))
    monkeypatch.setattr(cuda_graph, "world_size", lambda: processes)
    assert cuda_graph.is_replayed(model, CONFIG) == replayed


def test_passes_are_recorded_with_the_device_of_the_images_as_the_current_one(make_model, monkeypatch):
    current, seen = [], []

    @contextmanager
    def device_of(tensor):
        current.append(tensor.data_ptr())
        yield
        current.pop()

    def record(passes, *_, **__):
        seen.extend(current)
        return passes

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(cuda_graph, "make_graphed_callables", record)
    images = torch.randn(2, 3, 64, 64)
    ReplayedPasses(make_model().train())(images)
    assert seen == [images.data_ptr()] and not current


def test_passes_are_recorded_anew_for_what_they_are_not_of(make_model, tmp_path, monkeypatch):
    made = []

    def record(passes, sample, **_):
        (images,) = sample
        made.append((images.shape[-1], passes(images).dtype, passes.model.active_adapter))
        return lambda given: f"replayed {made[-1]}"

    monkeypatch.setattr(cuda_graph, "make_graphed_callables", record)
    model = make_model("FT-Last").train()
    model.save_pretrained(tmp_path / "adapter")
    model.load_adapter(tmp_path / "adapter", "other")
    passes, images = ReplayedPasses(model), torch.randn(2, 3, 64, 64)
    for _ in range(2):
        assert passes(images) == "replayed (64, torch.float32, 'default')"
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # as PyTorch asks for
        for _ in range(2):
            assert passes(images) == "replayed (64, torch.bfloat16, 'default')"
    model.set_adapter("other")
    assert passes(images) == "replayed (64, torch.float32, 'other')"
    assert passes(images[..., :32, :32]) == "replayed (32, torch.float32, 'other')"
    assert len(made) == 4


def test_the_graph_of_another_size_is_gone_before_the_next_one_takes_memory(make_model, monkeypatch):
    recorded = []

    def record(passes, *_, **__):
        assert [each() for each in recorded] == [None] * len(recorded)
        recorded.append(weakref.ref(passes))
        own = passes.forward
        passes.forward = lambda images: own(images) if passes.training else None  # holds itself, as PyTorch's does
        return passes

    monkeypatch.setattr(cuda_graph, "make_graphed_callables", record)
    passes = ReplayedPasses(make_model("FT-Last").train())
    gc.disable()
    try:
        for size in (32, 64, 96):
            passes(torch.randn(2, 3, size, size))
    finally:
        gc.enable()
    assert len(recorded) == 3


def test_without_gradients_and_in_evaluation_mode_the_model_itself_is_called(make_model, monkeypatch):
    monkeypatch.setattr(cuda_graph, "make_graphed_callables", lambda *_, **__: pytest.fail("recorded"))
    model, images = make_model().train(), torch.randn(4, 3, 64, 64)
    passes = ReplayedPasses(model)
    with torch.no_grad():
        assert torch.equal(passes(images), model(images))
    model.eval()
    assert torch.equal(passes(images), model(images)) and passes(images).requires_grad


def train(model, passes, sizes):
    """Losses of a few steps, a new batch of this many px each."""
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=1e-2, momentum=0.9)
    random = torch.Generator().manual_seed(1)
    losses = []
    for size in sizes:
        images = torch.randn(8, 3, size, size, generator=random, dtype=torch.float64).cuda()
        labels = torch.randint(4, (8,), generator=random).cuda()
        loss = nn.functional.cross_entropy(passes(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.gpu
@pytest.mark.parametrize("backbone", ["mobilenet_v2", "mobilenet_v3_large", "resnet18"])
@pytest.mark.parametrize("method", ["TinyTL-L+B", "FT-Full"])
def test_a_replayed_run_is_the_launched_one(make_model, method, backbone):
    launched, replayed = (make_model(method, backbone).double().cuda().train() for _ in range(2))
    passes = training_passes(replayed, CONFIG)
    assert isinstance(passes, ReplayedPasses)
    sizes = [64, 64, 64, 96, 96, 64]
    expected, found = train(launched, launched, sizes), train(replayed, passes, sizes)
    assert passes._passes is not replayed  # it could be recorded
    assert found == pytest.approx(expected, rel=1e-7)
    for name, tensor in launched.adapter_tensors().items():
        torch.testing.assert_close(replayed.adapter_tensors()[name], tensor, atol=1e-7, rtol=1e-7, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_passes_on_a_gpu_that_is_not_the_current_one_are_replayed_too(make_model):
    images = [torch.randn(4, 3, 64, 64, dtype=torch.float64, device="cuda:1") for _ in range(3)]
    launched, replayed = (make_model().double().to("cuda:1").train() for _ in range(2))
    assert torch.cuda.current_device() == 0
    passes = ReplayedPasses(replayed)
    for each in images:
        torch.testing.assert_close(passes(each), launched(each), atol=1e-7, rtol=1e-7)
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_recording_draws_no_random_numbers_and_leaves_gradients(make_model):
    model = make_model().cuda().train()
    for parameter in model.trainable_parameters():
        parameter.grad = torch.ones_like(parameter)
    before, images = {name: t.clone() for name, t in model.adapter_tensors().items()}, torch.randn(4, 3, 64, 64).cuda()
    drawn = torch.cuda.get_rng_state()
    ReplayedPasses(model)._record(images)
    assert torch.equal(drawn, torch.cuda.get_rng_state())
    assert all(torch.equal(before[name], t) for name, t in model.adapter_tensors().items())
    assert all((parameter.grad == 1).all() for parameter in model.trainable_parameters())


@pytest.mark.gpu
def test_what_cannot_be_recorded_ends_with_the_option_that_helps(make_model):
    model = make_model().cuda().train()
    # It waits for the GPU, which cannot be recorded.
    model.backbone.register_forward_hook(lambda module, inputs, output: output * float(output.abs().max() > 0))
    with pytest.raises(TinyTLError, match=r"mobilenet_v2 cannot be recorded .*; use --memory.cuda_graph false"):
        ReplayedPasses(model)(torch.randn(4, 3, 64, 64, device="cuda"))
    generator = torch.cuda.default_generators[0]
    generator.graphsafe_set_state(generator.clone_state())  # as the tests after this one draw random numbers


@pytest.mark.gpu
def test_runs_and_figures_are_of_the_gpu(colour_folder, tmp_path):
    done = run_cli(*small_run(colour_folder, tmp_path / "run", "--train.lr", "1e-3"))
    assert done.returncode == 0, done.stderr
    assert torch.cuda.get_device_name() in done.stderr and "engine lean, triton, CUDA graph" in done.stderr
    assert "wait for kernels to be compiled" in done.stderr
    options = ["--backbone.weights", "none", "--train.mixed_precision", "bf16", "--repeats", "1", "--json"]
    bench = run_cli("bench", *options, "--train_sizes", "[64]", "--batch_sizes", "[4]")
    assert bench.returncode == 0, bench.stderr
    assert set(json.loads(bench.stdout)["rows"][0]["images_per_second"]) == {
        *("FT-Full stock", "FT-Full lean", "TinyTL-L+B stock", "TinyTL-L+B lean")
    }
    memory = run_cli("memory", *options, "--data.train_size", "64", "--batch_size", "4", "--methods", "[TinyTL-B]")
    assert memory.returncode == 0, memory.stderr
    for content in (json.loads(bench.stdout), json.loads(memory.stdout)):
        assert content["conditions"]["device"] == torch.cuda.get_device_name()


@pytest.mark.gpu
def test_a_replayed_step_holds_no_more_than_twice_its_measured_peak(make_model):
    model = make_model(train_size=224).cuda().train()
    batch = random_batch(model, 64, decoded_photo_size(224))
    peak = measure_peak(model, *batch, CONFIG)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    step = MeasuredStep(model, *batch, CONFIG)
    for _ in range(3):
        step()
    reserved = torch.cuda.memory_reserved() - before
    assert reserved < 2 * (peak.dynamic + peak.gradients + peak.optimizer_state)  # 1.4 to 1.7 times on an H200
