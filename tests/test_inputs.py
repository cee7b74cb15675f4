"""What ``preprocess`` and ``features`` take, give and refuse."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image
from shared import write_image

from tinytl_hf import TinyTLError


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)


@pytest.fixture
def model(make_model):
    return make_model("FT-Last", train_size=32).eval()


def test_one_photo_gives_the_same_numbers_in_each_of_its_forms(model, pixels, tmp_path):
    image = Image.fromarray(pixels)
    image.save(tmp_path / "photo.png")
    expected = model.preprocess(image)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    alpha = np.dstack([pixels, np.full((50, 60), 255, np.uint8)])
    for one in (
        *(pixels, tensor, str(tmp_path / "photo.png"), tmp_path / "photo.png", [image], (pixels,), iter([image])),
        *(pixels[None], tensor[None], pixels.astype(np.int64), pixels / 255.0, tensor / 255, tensor.double() / 255),
        *(alpha, np.ascontiguousarray(pixels[::-1])[::-1]),
    ):
        assert torch.equal(model.preprocess(one), expected), type(one)
    mixed = model.preprocess([image, pixels, tensor, tmp_path / "photo.png"])
    assert mixed.shape == (4, 3, 32, 32) and torch.equal(mixed[3:], expected)
    grey = model.preprocess(Image.fromarray(pixels[..., 0]))
    for one in (pixels[..., 0], pixels[..., :1], torch.from_numpy(pixels[..., 0].copy()), tensor[:1]):
        assert torch.equal(model.preprocess(one), grey)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "there is no image"),
        (np.zeros((0, 5, 5, 3), np.uint8), "there is no image"),
        (None, "NoneType is no image"),
        (3, "int is no image"),
        ([None], "NoneType is no image"),
        (b"bytes", "bytes is no image"),
        (Image.new("RGB", (0, 5)), "an image of 0 x 5 px has no pixels"),
        ({"path": "x.png"}, "dict is no image"),
        (np.zeros((3, 50, 60), np.uint8), "array [3, 50, 60] of uint8 is no image"),
        (np.zeros((0, 60, 3), np.uint8), "array [0, 60, 3] of uint8 is no image"),
        (torch.zeros(50, 60, 3, dtype=torch.uint8), "tensor [50, 60, 3] of torch.uint8 is no image"),
        (torch.zeros(60), "tensor [60] of torch.float32 is no image"),
        (np.array(["a"]), "array [1] of <U1 is no image"),
        (np.full((4, 4), 300), "has values that are no pixels (from 300 to 300)"),
        (np.full((4, 4), 255.0), "has values that are no pixels"),
        (torch.full((3, 4, 4), -2.0), "has values that are no pixels"),
        (torch.full((3, 4, 4), float("nan")), "has values that are no pixels"),
        (np.zeros((4, 4), bool), "of bool holds no numbers"),
        ("nowhere.png", "nowhere.png cannot be read as an image"),
        ("", "'' is empty: name the file of an image"),
        ("https://x.org/a.png", "'https://x.org/a.png' is an address"),
    ],
)
def test_what_is_no_image_is_named_with_what_is_one(given, message, model):
    with pytest.raises(TinyTLError) as caught:
        model.preprocess(given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_truncated_photo_is_an_error_of_ours(model, pixels, tmp_path):
    write_image(tmp_path / "cut.png", size=(200, 200))
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:20000])
    for given in (tmp_path / "cut.png", Image.open(tmp_path / "cut.png")):
        with pytest.raises(TinyTLError, match="cannot be read"):
            model.preprocess(given)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize(
    ("backbone", "method", "size"),
    [
        ("convnext_tiny", "TinyTL-B", (3, 64)),
        ("convnext_tiny", "TinyTL-L+B", (16, 16)),
        ("mobilenet_v2", "TinyTL-L+B", (0, 8)),
        ("resnet18", "TinyTL-B", (8, 0)),
    ],
)
def test_photos_that_are_too_small_for_a_network_are_refused_in_training(backbone, method, size, backend, make_model):
    model = make_model(method, backbone, backend=backend).train()
    with pytest.raises((TinyTLError, RuntimeError), match=r"too small for the network|greater than actual input size"):
        model(torch.zeros(2, 3, *size))  # by the kernels' check, or by PyTorch's


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_type_gets_images_of_its_type(dtype, make_model, pixels):
    model = make_model("TinyTL-L+B", train_size=32).eval().to(dtype)
    view = model.preprocess(pixels)
    with torch.no_grad():
        assert view.dtype == dtype and model(view).dtype == dtype
    assert model.features(view).dtype == dtype


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "resnet18", "convnext_tiny"])
def test_features_are_what_the_head_gets_and_leave_the_model_as_it_was(backbone, make_model):
    model = make_model("FT-Last", backbone=backbone, train_size=32).eval()
    images, caught = torch.randn(2, 3, 32, 32), []
    handle = model._head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    with torch.no_grad():
        logits = model(images)
        handle.remove()
        assert torch.equal(model.features(images), caught[0])
        assert torch.equal(model(images), logits) and torch.equal(model(model.features(images)), logits)


def test_features_of_several_threads_are_each_of_its_own_images(make_model):
    model = make_model("FT-Last", train_size=32).eval()
    images = [torch.randn(2, 3, 32, 32) for _ in range(6)]
    expected = [model.features(each) for each in images]
    found, start = {}, threading.Barrier(6)

    def many(number):
        start.wait()
        found[number] = [model.features(images[number]) for _ in range(4)]

    threads = [threading.Thread(target=many, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, expected[number]) for number in range(6) for one in found[number])
