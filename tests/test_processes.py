"""Two processes add up to the gradients and statistics of one: in float64 on the eager back-end without tolerance for
rounding, in fp32 on the fastest there is within it.
"""

import pytest
import torch
import torch.distributed as dist
from shared import slow
from started_runs import in_two_processes
from torch import nn

from tinytl_hf import TinyTLError, TinyTLModel
from tinytl_hf.network.lite_residual import LiteResidual


def _gradients(method, images, labels):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = TinyTLModel.from_backbone("mobilenet_v2", method=method, num_classes=4, weights="none", train_size=64)
    model.to(images.dtype).train()
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


@pytest.mark.parametrize(
    ("method", "dtype", "limit"),
    [
        ("TinyTL-L+B", torch.float64, 1e-10),
        slow("FT-Full", torch.float64, 1e-10),
        slow("TinyTL-L+B", torch.float32, 2e-4),
    ],
)
def test_gradients_and_statistics_over_two_processes_are_those_of_one(method, dtype, limit, tmp_path):
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(8, 3, 64, 64, dtype=dtype, generator=generator), torch.arange(8) % 4
    whole, whole_tensors = _gradients(method, images, labels)
    assert in_two_processes(_gradients_of_a_part, method, images, labels, tmp_path / "gradients.pt") == [0, 0]
    parts, part_tensors = torch.load(tmp_path / "gradients.pt")
    largest = max(gradient.abs().max() for gradient in whole.values())
    for name, gradient in whole.items():
        assert (parts[name] - gradient).abs().max() <= limit * largest, name
    for name, tensor in whole_tensors.items():
        torch.testing.assert_close(part_tensors[name], tensor, atol=limit, rtol=limit)


def _said_of_an_uneven_batch(rank, port, method, path):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = TinyTLModel.from_backbone("mobilenet_v2", method=method, num_classes=2, weights="none", train_size=32)
    try:
        model.train()(torch.zeros(4 - rank, 3, 32, 32))
        said = "nothing"
    except TinyTLError as error:
        said = str(error)
    said += str(tuple(model.eval()(torch.zeros(4 - rank, 3, 32, 32)).shape))
    path.with_name(f"{rank}").write_text(said)
    dist.destroy_process_group()


@pytest.mark.parametrize("method", ["TinyTL-L+B", "TinyTL-B", slow("FT-Full")])
def test_processes_with_batches_of_other_sizes_are_told_so_where_norms_see_all_of_them(method, tmp_path):
    assert in_two_processes(_said_of_an_uneven_batch, method, tmp_path / "said") == [0, 0]
    said = [(tmp_path / f"{rank}").read_text() for rank in (0, 1)]
    assert said[0].endswith("(4, 2)") and said[1].endswith("(3, 2)")
    told = [
        f"a batch of {4 - rank} images: of the processes, one has 3 and another 4" in said[rank] for rank in (0, 1)
    ]
    assert told == [method != "TinyTL-B"] * 2, said
