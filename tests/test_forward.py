"""Forward passes in parts."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tinytl_hf.config.run import Config
from tinytl_hf.device import forward_in_parts
from tinytl_hf.measure.measured_step import MeasuredStep, random_batch


@pytest.mark.parametrize(("train_size", "images"), [(32, 70), (112, 8), (224, 2), (640, 1)])
def test_a_cpu_works_on_a_few_images_at_a_time_and_gives_the_logits_of_the_batch(train_size, images):
    seen = []
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    layer.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    count = min(70, 3 * images)
    batch = torch.rand(count, 3, train_size, train_size)
    with torch.no_grad():
        assert torch.allclose(forward_in_parts(layer, batch), layer(batch), atol=1e-6)
    assert max(seen[:-1]) == images and sum(seen[:-1]) == count


def test_features_are_one_batch():
    layer = torch.nn.Linear(4, 2)
    features = torch.rand(5, 4)
    assert forward_in_parts(layer, features).equal(layer(features))


@pytest.mark.gpu
def test_a_gpu_works_on_the_whole_batch():
    seen = []
    layer = torch.nn.Conv2d(3, 2, 3).cuda()
    layer.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    forward_in_parts(layer, torch.rand(9, 3, 224, 224, device="cuda"))
    assert seen == [9]


class Copies(TorchDispatchMode):
    """The storages of all results that have the shape of a batch of the network's input."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.storages = shape, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape == self.shape:
            storage = result.untyped_storage()
            self.storages[storage.data_ptr()] = storage  # held, so that no address comes a second time
        return result


@pytest.mark.parametrize("lean", [True, False])
def test_the_network_reads_the_resampled_batch_itself(lean, make_model):
    model = make_model(lean=lean).train()
    images = MeasuredStep(model, *random_batch(model, 3, (80, 96)), Config()).view()
    with Copies(images.shape) as copies:
        model(images).sum().backward()
    assert copies.storages.keys() <= {images.untyped_storage().data_ptr()}
    with Copies(images.shape) as copies:
        model(images.contiguous())  # a batch in another layout is brought to the network's
    assert len(copies.storages.keys() - {images.untyped_storage().data_ptr()}) == 2
