"""Forward passes in parts."""

import pytest
import torch

from tinytl_hf.device import forward_in_parts


@pytest.mark.parametrize(("train_size", "images"), [(32, 70), (112, 8), (224, 2), (640, 1)])
def test_a_cpu_works_on_a_few_images_at_a_time_and_gives_the_logits_of_the_batch(train_size, images):
    seen = []
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    layer.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    batch = torch.rand(70, 3, train_size, train_size)
    with torch.no_grad():
        assert torch.allclose(forward_in_parts(layer, batch), layer(batch), atol=1e-6)
    assert max(seen[:-1]) == images and sum(seen[:-1]) == 70


def test_features_are_one_batch():
    layer = torch.nn.Linear(4, 2)
    features = torch.rand(5, 4)
    assert forward_in_parts(layer, features).equal(layer(features))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_works_on_the_whole_batch():
    seen = []
    layer = torch.nn.Conv2d(3, 2, 3).cuda()
    layer.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    forward_in_parts(layer, torch.rand(9, 3, 224, 224, device="cuda"))
    assert seen == [9]
