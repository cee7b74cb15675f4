"""One process and two, with the same global batch, give the same run."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import METHODS, ROOT
from safetensors.torch import load_file
from torch import nn

from tinytl_hf import TinyTLModel
from tinytl_hf.network.lite_residual import LiteResidual
from tinytl_hf.network.methods import METHODS as TABLE

# `accelerate launch --cpu --num_processes 2` starts one process; this starts two on the CPU.
LAUNCH_TWO = (
    *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(processes, *arguments):
    script = [str(ROOT / "tests" / "train_by_all_methods.py"), *map(str, arguments)]
    module = ["-m", *LAUNCH_TWO, "--main_process_port", str(free_port())] if processes == 2 else []
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *module, *script], capture_output=True, text=True, timeout=150, env=environment
    )


@pytest.fixture(scope="module")
def runs(colour_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    for processes in (1, 2):
        done = launch(processes, colour_folder, root / str(processes))
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(f"on {processes} process(es), cpu") == len(METHODS)
    return root / "1", root / "2"


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_the_adapter_that_one_does(method, runs):
    one, two = (run / method for run in runs)
    first, second = (load_file(run / "adapter_last" / "adapter_model.safetensors") for run in (one, two))
    assert first.keys() == second.keys()
    # Batch norms over eight small images amplify the rounding of float32; in float64, below, they are exact.
    tolerance = 1e-4 if TABLE[method].batch_statistics else 1e-5
    for name, tensor in first.items():
        torch.testing.assert_close(
            second[name], tensor, atol=tolerance, rtol=10 * tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    ours, theirs = (json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in (one, two))
    assert theirs["train"]["loss"] == pytest.approx(ours["train"]["loss"], rel=1e-3)
    assert theirs["eval"]["loss"] == pytest.approx(ours["eval"]["loss"], rel=1e-3)
    # Nine images do not divide by two processes: each is counted once.
    for run in (one, two):
        results = json.loads((run / "eval_results.json").read_text())
        assert results["n"] == 9 and np.sum(results["confusion_matrix"]) == 9


def _gradients(method, images, labels):
    torch.manual_seed(0)
    model = TinyTLModel.from_backbone("mobilenet_v2", method=method, num_classes=4, weights="none", train_size=64)
    model.double().train()
    for module in model.modules():
        if isinstance(module, LiteResidual):
            nn.init.ones_(module.norm2.weight)  # so that the whole branch gets a gradient
    nn.functional.cross_entropy(model(images), labels).backward()
    return {n: p.grad for n, p in model.backbone.named_parameters() if p.requires_grad}, model.adapter_tensors()


def _gradients_of_a_part(rank, port, method, images, labels, path):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    gradients, tensors = _gradients(method, images.chunk(2)[rank], labels.chunk(2)[rank])
    for gradient in gradients.values():
        dist.all_reduce(gradient)
        gradient /= 2
    if rank == 0:
        torch.save((gradients, tensors), path)
    dist.destroy_process_group()


@pytest.mark.parametrize("method", ["TinyTL-L+B", "FT-Full"])
def test_gradients_and_statistics_over_two_processes_are_exact(method, tmp_path):
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(8, 3, 64, 64, dtype=torch.float64, generator=generator), torch.arange(8) % 4
    whole, whole_tensors = _gradients(method, images, labels)
    arguments = (free_port(), method, images, labels, tmp_path / "gradients.pt")
    mp.spawn(_gradients_of_a_part, args=arguments, nprocs=2)
    parts, part_tensors = torch.load(tmp_path / "gradients.pt")
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-10, rtol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    for name, tensor in whole_tensors.items():
        torch.testing.assert_close(part_tensors[name], tensor, atol=1e-10, rtol=1e-8)
