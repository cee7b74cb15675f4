import pytest
import torch
from shared import slow
from torchvision.transforms.v2 import functional as TF

from tinytl_hf.adapter.record import Preprocessing
from tinytl_hf.data.augment import RandomCropFlip, centre_boxes, normalise, random_crops, resample
from tinytl_hf.measure.peak import cpu_peak

MEAN, STD = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)  # leaves pixel values as they are


def pixels(n, height, width):
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (64, 128), (240, 120)])
@pytest.mark.parametrize("target", [32, 96])
def test_evaluation_view_is_torchvisions_resize_and_centre_crop(size, target):
    images = pixels(2, *size)
    sizes = torch.tensor([size, size])
    ours = resample(images, sizes, centre_boxes(sizes, 1.0), target, mean=MEAN, std=STD)
    theirs = TF.center_crop(TF.resize(images.float(), [target], antialias=True), [target, target])
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0)


@pytest.mark.parametrize("target", [16, 64])
def test_a_box_of_whole_pixels_is_torchvisions_crop_of_the_resized_image(target):
    images = pixels(1, 64, 64)
    box = torch.tensor([[16.0, 16.0, 32.0, 32.0]])
    ours = resample(images, torch.tensor([[64, 64]]), box, target, mean=MEAN, std=STD)
    theirs = TF.center_crop(TF.resize(images.float(), [2 * target, 2 * target], antialias=True), [target, target])
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0)


def test_padding_never_shows():
    small = pixels(1, 20, 30)
    padded = torch.full((1, 3, 50, 60), 255, dtype=torch.uint8)
    padded[..., :20, :30] = small
    sizes = torch.tensor([[20, 30]])
    box = torch.tensor([[0.0, 0.0, 20.0, 30.0]])
    assert torch.equal(resample(padded, sizes, box, 32, MEAN, STD), resample(small, sizes, box, 32, MEAN, STD))


@pytest.mark.parametrize("target", [24, 36])
def test_flip_mirrors_only_the_chosen_images(target):
    images, sizes = pixels(2, 24, 24), torch.tensor([[24, 24]] * 2)
    boxes = centre_boxes(sizes, 1.0)
    plain = resample(images, sizes, boxes, target, MEAN, STD)
    flipped = random_crops(images, sizes, boxes, torch.tensor([True, False]), target, MEAN, STD)
    torch.testing.assert_close(flipped[0], plain[0].flip(-1))
    assert torch.equal(flipped[1], plain[1])


def test_normalising_does_not_depend_on_how_pixels_lie():
    planar = pixels(2, 8, 12).float()
    channels_last = planar.contiguous(memory_format=torch.channels_last)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    expected = (planar / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    for images in (planar, channels_last):
        torch.testing.assert_close(normalise(images, mean, std), expected)


def test_pixels_are_exact_under_autocast():
    images, sizes = pixels(2, 48, 32), torch.tensor([[48, 32]] * 2)
    exact = resample(images, sizes, centre_boxes(sizes, 1.0), 64, MEAN, STD)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resample(images, sizes, centre_boxes(sizes, 1.0), 64, MEAN, STD), exact)


def test_normalisation_is_imagenets():
    white = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    sizes = torch.tensor([[8, 8]])
    defaults = Preprocessing(train_size=8, eval_size=8)
    out = resample(white, sizes, centre_boxes(sizes, 1.0), 8, defaults.mean, defaults.std)
    expected = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(out.amax((0, 2, 3)), expected)


def test_boxes_stay_inside_and_keep_to_the_scale():
    augment = RandomCropFlip(images=4000, seed=0, scale=(0.25, 0.5), flip=True)
    sizes = torch.tensor([[48, 64]]).expand(4000, 2)
    boxes, flips = augment(sizes, torch.arange(4000))
    area = boxes[:, 2] * boxes[:, 3] / (48 * 64)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= sizes + 1e-3).all()
    assert area.min() >= 0.25 * 0.99 and area.max() <= 0.5 * 1.01
    assert 0.45 < flips.float().mean() < 0.55
    assert len(boxes.unique(dim=0)) == 4000  # each image has its own box


@pytest.mark.parametrize(("size", "least", "most"), [((64, 64), 0.866, 1.0), ((100, 400), 0.433, 0.578)])
def test_what_does_not_fit_of_a_crop_is_cut_off(size, least, most):
    boxes, _ = RandomCropFlip(4000, seed=0, scale=(1.0, 1.0), flip=False)(
        torch.tensor([size] * 4000), torch.arange(4000)
    )
    shares = boxes[:, 2] * boxes[:, 3] / (size[0] * size[1])
    assert least <= shares.min() < least + 0.01 and most - 0.01 < shares.max() <= most
    assert (boxes[:, :2] + boxes[:, 2:]).amax(0).tolist() == pytest.approx(size, abs=0.01)  # to the last pixel


def test_a_draw_depends_on_seed_epoch_and_image_alone():
    augment = RandomCropFlip(images=10, seed=3, scale=(0.1, 1.0), flip=True)
    sizes = torch.tensor([[32, 32]] * 10)
    whole, _ = augment(sizes, torch.arange(10))
    part, _ = augment(sizes[:3], torch.tensor([7, 0, 4]))
    assert torch.equal(part, whole[[7, 0, 4]])
    augment.set_epoch(1)
    assert not torch.equal(augment(sizes, torch.arange(10))[0], whole)
    augment.set_epoch(0)
    assert torch.equal(augment(sizes, torch.arange(10))[0], whole)
    other = RandomCropFlip(images=10, seed=4, scale=(0.1, 1.0), flip=False)
    boxes, flips = other(sizes, torch.arange(10))
    assert not torch.equal(boxes, whole) and not flips.any()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_that_get_smaller_are_torchvisions_and_near_the_exact_ones(interpolation):
    images, sizes = pixels(6, 90, 120), torch.tensor([[90, 120]] * 3 + [[80, 100]] * 3)
    boxes, flips = RandomCropFlip(images=6, seed=1, scale=(0.3, 1.0), flip=True)(sizes, torch.arange(6))
    assert (boxes[:, 2:] > 40).all() and 0 < flips.sum() < 6
    found = random_crops(images, sizes, boxes, flips, 40, MEAN, STD, interpolation)
    for image, box, flip, ours in zip(images, boxes, flips, found, strict=True):
        top, left, bottom, right = (round(side.item()) for side in (*box[:2], *(box[:2] + box[2:])))
        options = {"interpolation": TF.InterpolationMode(interpolation), "antialias": True}
        theirs = TF.resized_crop(image, top, left, bottom - top, right - left, [40, 40], **options)
        assert torch.equal(ours, (theirs.flip(-1) if flip else theirs).float())
    smooth = torch.nn.functional.interpolate(images[:, :, ::15, ::15].float(), (90, 120), mode="bilinear").byte()
    exact = resample(smooth, sizes, boxes, 40, MEAN, STD, interpolation)
    close = random_crops(smooth, sizes, boxes, torch.zeros(6, dtype=torch.bool), 40, MEAN, STD, interpolation)
    assert (close - exact).abs().mean() < 3  # of 255: half a pixel of the crop at most


@pytest.mark.parametrize(("width", "megabytes"), [slow(448, 10), slow(672, 12), (1792, 16)])
def test_large_photos_take_little_more_than_what_the_network_gets_of_them(width, megabytes):
    pixels = torch.zeros(8, 448, width, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    sizes = torch.tensor([[448, width]]).expand(8, 2)
    boxes, flips = RandomCropFlip(images=8, seed=0, scale=(0.08, 1.0), flip=True)(sizes, torch.arange(8))
    result = 8 * 3 * 224 * 224 * 4  # 4.8 MB
    peak = cpu_peak(lambda: resample(pixels, sizes, boxes, 224, MEAN, STD))
    assert result <= peak < megabytes * 1e6
    peak = cpu_peak(lambda: random_crops(pixels, sizes, boxes, flips, 224, MEAN, STD))
    assert result <= peak < 7.5e6


def test_an_image_is_the_same_alone_and_in_a_batch_and_of_its_crop_only():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (5, 3, 300, 280), dtype=torch.uint8, generator=generator)
    sizes = torch.tensor([[300, 280], [120, 280], [300, 90], [64, 64], [299, 279]])
    boxes, flips = RandomCropFlip(images=5, seed=3, scale=(0.08, 1.0), flip=True)(sizes, torch.arange(5))
    whole = random_crops(pixels, sizes, boxes, flips, 96, MEAN, STD)
    assert whole.is_contiguous(memory_format=torch.channels_last)
    for i in range(5):
        one = slice(i, i + 1)
        alone = random_crops(pixels[one], sizes[one], boxes[one], flips[one], 96, MEAN, STD)
        torch.testing.assert_close(alone[0], whole[i], atol=0.01, rtol=0)  # of values up to 255
