import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from tinytl_hf.norms import FrozenBatchNorm2d, GlobalBatchNorm2d, keep_running_statistics, replace_batch_norms


def stock_norm(channels=6):
    norm = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return norm


def replaced(norm, kind):
    parent = nn.Sequential(copy.deepcopy(norm))
    replace_batch_norms(parent, kind)
    return parent[0]


def test_a_frozen_norm_stays_frozen_in_training_mode():
    norm, x = stock_norm(), torch.randn(4, 6, 5, 5)
    frozen = replaced(norm, FrozenBatchNorm2d).train()
    before = copy.deepcopy(frozen.state_dict())
    assert torch.equal(frozen(x), norm.eval()(x))
    assert all(torch.equal(frozen.state_dict()[name], tensor) for name, tensor in before.items())
    assert frozen.state_dict().keys() == norm.state_dict().keys()


def test_a_global_norm_on_one_process_is_the_stock_norm():
    norm, x = stock_norm(), torch.randn(4, 6, 5, 5)
    ours = replaced(norm, GlobalBatchNorm2d)
    for _ in range(3):
        assert torch.equal(ours.train()(x), norm.train()(x))
    assert torch.equal(ours.eval()(x), norm.eval()(x))
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in norm.state_dict().items())


def test_recomputing_leaves_the_running_statistics():
    norm, x = GlobalBatchNorm2d(6), torch.randn(4, 6, 5, 5)
    before = copy.deepcopy(norm.state_dict())
    with keep_running_statistics():
        output = norm(x)
    assert all(torch.equal(norm.state_dict()[name], tensor) for name, tensor in before.items())
    assert torch.equal(output, norm(x))
    assert norm.num_batches_tracked == 1


def test_one_value_a_channel_is_refused():
    with pytest.raises(ValueError, match="more than one value"):
        GlobalBatchNorm2d(6)(torch.randn(1, 6, 1, 1))


def _norm_on_a_part(rank, world_size, port, x, results):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    norm = replaced(stock_norm().double(), GlobalBatchNorm2d).double()
    part = x.chunk(world_size)[rank].clone().requires_grad_()
    weights = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape).chunk(world_size)[rank]
    (norm(part) * weights).sum().backward()
    for parameter in norm.parameters():
        dist.all_reduce(parameter.grad)
    results[rank] = (part.grad, norm.weight.grad, norm.running_mean.clone(), norm.running_var.clone())
    dist.destroy_process_group()


def test_two_processes_compute_what_one_does_on_the_whole_batch():
    x = torch.randn(6, 6, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    norm = stock_norm().double().train()
    whole = x.clone().requires_grad_()
    (norm(whole) * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)).sum().backward()
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_norm_on_a_part, args=(2, _free_port(), x, results), nprocs=2)
        parts = [results[0], results[1]]
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), whole.grad, atol=1e-6, rtol=1e-5)
    for part in parts:
        torch.testing.assert_close(part[1], norm.weight.grad, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(part[2], norm.running_mean, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(part[3], norm.running_var, atol=1e-6, rtol=1e-6)


def _free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
