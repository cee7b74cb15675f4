"""Who computes frozen blocks: what ``auto`` means on a device, what is said of it, and errors where it cannot run."""

import pytest
import torch
import torch.nn.functional as F

from tinytl_hf.config.engine import Engine
from tinytl_hf.errors import TinyTLError
from tinytl_hf.lean import backend
from tinytl_hf.lean.layers import upsample_add

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nothing_remembered():
    backend.why_not.cache_clear()
    yield
    backend.why_not.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    """Pretend a machine: its GPU, and what is installed."""

    def pretend(capability=(9, 0), triton=True, compiled="AVX-512 BF16", interpreter="0", hip=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(backend, "find_spec", lambda name: object() if triton else None)
        monkeypatch.setattr(backend, "instruction_sets", lambda: {compiled: object()} if compiled else {})
        monkeypatch.setenv("TRITON_INTERPRET", interpreter)

    return pretend


@pytest.mark.parametrize(
    ("device", "given", "runs", "said"),
    [
        (GPU, {}, "triton", "lean, triton"),
        (GPU, {"capability": (8, 0)}, "triton", "lean, triton"),
        (GPU, {"capability": (7, 5)}, "eager", "8.0 or more, and this one has 7.5"),
        (GPU, {"triton": False}, "eager", "lean, eager (triton needs the package triton: pip install triton)"),
        (GPU, {"hip": "6.0"}, "eager", "lean, eager (triton runs on NVIDIA GPUs, not on AMD)"),
        (CPU, {}, "native", "lean, native AVX-512 BF16"),
        (
            CPU,
            {"compiled": "AVX-512"},
            "native",
            "native AVX-512, as this processor or its compiler has no",
        ),
        (CPU, {"compiled": "AVX2"}, "native", "lean, native AVX2, as this processor has no AVX-512"),
        (CPU, {"compiled": None, "interpreter": "1"}, "eager", "lean, eager (native needs a C compiler"),
        (torch.device("mps"), {}, "eager", "lean, eager"),
    ],
)
def test_auto_is_the_fastest_that_is_there_and_why_it_is_not_faster_is_said(device, given, runs, said, machine):
    machine(**given)
    assert backend.chosen("auto", device) == runs
    assert said in backend.describe(Engine(), device)


@pytest.mark.parametrize(
    ("name", "device", "given", "message"),
    [
        ("triton", CPU, {}, "memory.backend=triton: runs on NVIDIA GPUs, not on cpu; or use auto"),
        ("triton", GPU, {"triton": False}, "memory.backend=triton: needs the package triton: pip install triton; or"),
        ("triton", GPU, {"capability": (7, 0)}, "memory.backend=triton: needs a GPU of compute capability 8.0"),
        ("native", GPU, {}, "memory.backend=native: runs on CPUs, not on cuda; or use auto"),
        ("native", CPU, {"compiled": None}, "memory.backend=native: needs a C compiler when tinytl_hf is installed"),
    ],
)
def test_a_named_back_end_that_cannot_run_is_an_error_with_the_fix(name, device, given, message, machine):
    machine(**given)
    with pytest.raises(TinyTLError) as error:
        backend.describe(Engine(backend=name), device)  # the first thing that a run and a measurement do
    assert message in str(error.value)
    machine(interpreter="1")
    backend.why_not.cache_clear()
    backend.check("triton", CPU)
    backend.check("eager", device)


def test_a_model_says_so_at_its_first_training_pass_and_evaluates_all_the_same(make_model, machine):
    machine()
    model = make_model("TinyTL-L+B", backend="triton")
    images = torch.randn(2, 3, 64, 64)
    assert model.eval()(images).shape == (2, 4)
    with pytest.raises(TinyTLError, match="triton: runs on NVIDIA GPUs, not on cpu"):
        model.train()(images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_maps_of_a_type_that_a_back_end_does_not_read_are_up_sampled_by_eager(dtype):
    maps, small = (torch.randn(2, 8, size, size, dtype=dtype) for size in (6, 3))
    maps, small = (each.contiguous(memory_format=torch.channels_last) for each in (maps, small))
    expected = maps + F.interpolate(small, size=(6, 6), mode="bilinear")
    torch.testing.assert_close(upsample_add(maps, small, "auto"), expected)
