"""What tests share: fixtures, settings of this process, the command line in it, small data."""

import gc
import io
import os
import subprocess
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from unittest.mock import patch

import datasets
import numpy as np
import pytest
import torch
import yaml

# Where there is no GPU, Triton's kernels run in its interpreter: it is to be chosen before Triton is imported.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from accelerate.state import AcceleratorState, GradientState
from hub_server import WRITER, HubServer
from huggingface_hub import constants
from jinja2 import Environment
from PIL import Image
from started_runs import CONTEXT, start_server
from torch.overrides import _get_current_function_mode

from tinytl_hf import TinyTLModel, cli
from tinytl_hf.adapter import build as adapter_build
from tinytl_hf.data import tables
from tinytl_hf.lean.native_library import instruction_sets
from tinytl_hf.measure import memory, speed
from tinytl_hf.network import torchvision_nets
from tinytl_hf.network.no_values import NoRandomValues
from tinytl_hf.train import budget, fit

# No test ends with the power: what is written need not be on the disk, which takes longer than to train.
os.fsync = lambda descriptor: None
# The template of a card is compiled for each card, and takes longer than to fill it in.
Environment.compile = cache(Environment.compile)


PARSER = cache(cli.make_parser)


def make_parser(verb, defaults=None):
    """The parser of the command line, made once for each verb unless an adapter changes what it takes by default."""
    return PARSER.__wrapped__(verb, defaults) if defaults else PARSER(verb)


cli.make_parser = make_parser


def copy_of(module):
    """Copy a network that nothing was done with and that has each module once; deepcopy takes four times as long."""
    copied = object.__new__(type(module))
    for name, value in vars(module).items():
        if isinstance(value, (dict, list, set)):
            value = value.copy()
        if isinstance(value, dict):
            value.update((key, _copy_of_part(part)) for key, part in value.items())
        vars(copied)[name] = value
    return copied


def _copy_of_part(part):
    if isinstance(part, torch.nn.Module):
        return copy_of(part)
    if isinstance(part, torch.nn.Parameter):
        return torch.nn.Parameter(part.detach().clone())
    return part.clone() if isinstance(part, torch.Tensor) else part


NETWORKS = {}
OFTEN = ("mobilenet_v2", "mobilenet_v3_small", "mnasnet1_0", "resnet18")


def build(name, built=torchvision_nets.build):
    """A network of torchvision, drawn once for each state of the generator: a copy takes a fraction of that."""
    if name not in OFTEN or _get_current_function_mode():
        return built(name)  # on no device, or without values
    key = name, torch.get_default_dtype(), torch.get_rng_state().numpy().tobytes()
    if key not in NETWORKS and len(NETWORKS) < 12:  # nearly all start from the same state
        NETWORKS[key] = built(name)
    return copy_of(NETWORKS[key]) if key in NETWORKS else built(name)


torchvision_nets.build = build
WITHOUT_VALUES = {}


def build_network(config, weights, *options, built=adapter_build.build_network):
    """What an adapter is compared with before it is loaded, a network without values: one for all of a kind."""
    if config.backbone.name not in OFTEN or not isinstance(_get_current_function_mode(), NoRandomValues):
        return built(config, weights, *options)  # where it is filled, as for a merged file
    kind = config.backbone.name, config.method, config.preprocessing, len(config.label_names), config.trained_blocks
    key = repr((*kind, config.lite, config.head, torch.get_default_dtype()))
    if key not in WITHOUT_VALUES and len(WITHOUT_VALUES) < 50:
        WITHOUT_VALUES[key] = built(config, weights, *options)
    return WITHOUT_VALUES[key] if key in WITHOUT_VALUES else built(config, weights, *options)


adapter_build.build_network = build_network
VALUES = {}


def load_yaml(text, read=cli.load_yaml):
    """The value of an option, read once: most are those of other tests, too."""
    if text not in VALUES:
        value = read(text)
        if isinstance(value, (list, dict)) or len(text) > 40:
            return value
        VALUES[text] = value
    return VALUES[text]


cli.load_yaml = load_yaml
tables._digits = cache(tables._digits)  # 1,797 images are encoded for it
# Cards are read by libyaml where it is there, which takes a tenth of the time.
yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

ROOT = Path(__file__).parents[1]
METHODS = ("FT-Last", "TinyTL-B", "TinyTL-L", "TinyTL-L+B", "FT-Norm+Last", "FT-Full", "FT-Layerwise")
BACKBONES = (
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "mnasnet1_0",
    "resnet18",
    "resnet50",
    "convnext_tiny",
)


@pytest.fixture(scope="session", autouse=True)
def forks():
    gc.collect()
    gc.freeze()  # a search for garbage leaves out what was imported, which is most of what there is
    run_cli("train", "--help")  # makes the parser, which forks have then, as the network
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        torchvision_nets.build("mobilenet_v2")
    start_server()


@pytest.fixture(scope="session")
def make_model():
    def make(method="TinyTL-L+B", backbone="mobilenet_v2", **options):
        torch.manual_seed(0)
        options = {"num_classes": 4, "weights": "none", "train_size": 64, **options}
        return TinyTLModel.from_backbone(backbone, method=method, **options)

    return make


@pytest.fixture(scope="session")
def shared_data():
    """A folder with cifar10/ and weights/, named by TINYTL_TEST_DATA."""
    folder = os.environ.get("TINYTL_TEST_DATA")
    if folder is None:
        pytest.skip("TINYTL_TEST_DATA names no folder with cifar10/ and weights/")
    return Path(folder)


# Rows of these networks take seconds each: `make test-slow` has them. What only they have is tested without rows.
HEAVY = {"convnext_tiny", "resnet50", "efficientnet_b0", "timm/efficientnet_b0"}


def state_of(model):
    """A copy of what a model holds, for :func:`assert_left_as_found`."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_left_as_found(model, before):
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


NATIVE = pytest.param("native", marks=pytest.mark.skipif(not instruction_sets(), reason="needs the compiled kernels"))


def slow(*values):
    """A row of a matrix for `make test-slow`: `make test` has others that show the same."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.hookimpl(tryfirst=True)  # before rows are left out by their marks
def pytest_collection_modifyitems(items):
    for item in items:
        values = item.callspec.params.values() if item.get_closest_marker("parametrize") else ()
        if any(isinstance(value, str) and value in HEAVY for value in values):
            item.add_marker(pytest.mark.slow)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # a folder of that name is a keyword, too
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and TINYTL_TEST_GPU=1"))


FIGURES = []


@pytest.fixture
def one_thread():
    """Memory and speed are those of one thread, on any machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def figure():
    """Note a line with a figure, which is printed after the tests."""
    return FIGURES.append


def pytest_terminal_summary(terminalreporter):
    for line in FIGURES:
        terminalreporter.write_line(line)


@pytest.fixture
def use_server(tmp_path, monkeypatch):
    """Point the client, which reads its environment when it is imported, to a server."""

    def use(server):
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        values = {"ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
        values |= {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": server.xet is None}
        values |= {"HF_TOKEN_PATH": str(tmp_path / "no-token")}
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        return server

    return use


@pytest.fixture
def ready_processes(monkeypatch):
    """What measures in processes of its own gets such that have imported torch already."""
    for module in (memory, speed, budget):
        monkeypatch.setattr(module, "get_context", lambda _: CONTEXT)
    monkeypatch.setattr(fit, "quick_processes", lambda: CONTEXT)


@pytest.fixture
def server(use_server):
    with HubServer() as server:
        yield use_server(server)


def write_image(path, mode="RGB", size=(40, 36), colour=None, seed=0):
    """Write an image: of one colour, or of noise that depends on the seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if colour is not None:
        Image.new(mode, size, colour).save(path)
    else:
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.fixture(scope="session")
def colour_folder(tmp_path_factory):
    """An imagefolder of red and blue noise: 2 classes, 24 images to train on and 10 to test on."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 5)):
        for label, channel in (("blue", 2), ("red", 0)):
            for i in range(count):
                pixels = rng.integers(0, 60, (36 + i, 40, 3), dtype=np.uint8)
                pixels[..., channel] += 180
                path = root / split / label / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return root


def run_cli(*arguments, pictures=False):
    """Run the command line in this process, as on one core; most of a process of its own is spent importing torch.

    Pictures are a third of what a small training run takes: it draws them for a test that looks at them.
    """
    out, err, threads = io.StringIO(), io.StringIO(), torch.get_num_threads()
    draws = nullcontext() if pictures else patch("tinytl_hf.train.loop.draw_pictures")
    with redirect_stdout(out), redirect_stderr(err), patch("os.cpu_count", return_value=1), draws:
        try:
            cli.main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as end:
            code = end.code or 0
        finally:
            torch.set_num_threads(threads)
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def small_run(dataset, output, *options):
    """Options of a training run that takes seconds."""
    return [
        *("train", "--data.dataset", dataset, "--output_dir", output, "--backbone.weights", "none"),
        *("--data.train_size", "32", "--data.crop_scale", "[0.5, 1.0]", "--train.global_batch_size", "8"),
        *("--train.epochs", "2", "--train.threads", "1", "--memory.report", "false", *options),
    ]


@pytest.fixture
def file_server(monkeypatch):
    """Serves folders over HTTP on this machine."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    running = []

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    def serve(folder):
        running.append(ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)))
        Thread(target=running[-1].serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return f"http://127.0.0.1:{running[-1].server_port}"

    yield serve
    for each in running:
        each.shutdown()
        each.server_close()
