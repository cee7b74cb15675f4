"""Crop, flip, resize and normalise a batch, each image by its own box.

One matrix product per axis resamples a few images at a time: row ``i`` of an image's matrix holds the
weights of the source pixels that make up output pixel ``i``. Those are the weights of bilinear or bicubic resizing
with anti-aliasing, as in Pillow and torchvision, whose transforms draw one box for a whole batch. Of large
photos those are mostly products with zero: random crops that a CPU makes smaller go through PyTorch's own kernel
for bytes.

Boxes are ``[N, 4]`` (top, left, height, width) in source pixels and may have fractions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ASPECT_RATIOS = (3 / 4, 4 / 3)
REACH = {"bilinear": 1, "bicubic": 2}  # of a source pixel's weight, in px of the coarser of the two grids
# Of pixels as floats at a time, so that large photos need little more than what the network gets; a GPU wants more.
GROUP_MB, GROUP_MB_ON_GPU = 1.0, 64.0
# Of random crops on a GPU, whose units for it are ten times as fast. On a scale of 0 to 255 they are off by less than
# 0.3; by up to 0.5 once they are whole numbers, as photos are.
COARSE = torch.float16


def centre_boxes(sizes: Tensor, crop_pct: float) -> Tensor:
    """The centred squares whose side is ``crop_pct`` of an image's shorter side.

    Args:
        sizes: ``[N, 2]`` (height, width) in px.
        crop_pct: Share of the shorter side.
    """
    sizes = sizes.float()
    side = sizes.amin(1, keepdim=True) * crop_pct
    return torch.cat([(sizes - side) / 2, side, side], dim=1)


class RandomCropFlip:
    """Random resized crop and flip whose draws depend on the seed, the epoch and the image alone.

    So they are the same for any number of processes, workers or batches, and after a resume.

    Args:
        images: Number of images in the training set.
        seed: Seed of the run.
        scale: Least and greatest share of an image's area.
        flip: Whether half of the images are mirrored.
    """

    def __init__(self, images: int, seed: int, scale: tuple[float, float], flip: bool) -> None:
        self.images, self.seed, self.scale, self.flip = images, seed, scale, flip
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the numbers of one epoch: five for each image."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        self.draws = torch.rand(self.images, 5, generator=generator)

    def __call__(self, sizes: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a box and a flip for each image.

        An aspect ratio that does not fit into an image is clamped to it.

        Args:
            sizes: ``[N, 2]`` (height, width) in px.
            index: ``[N]`` positions of the images in the training set.

        Returns:
            Boxes ``[N, 4]`` and flips ``[N]`` (true: mirror).
        """
        area, ratio, top, left, _ = self._drawn(index).unbind(1)
        height, width = sizes.float().unbind(1)
        low, high = self.scale
        area = (low + (high - low) * area) * height * width
        log_low, log_high = (math.log(bound) for bound in ASPECT_RATIOS)
        ratio = torch.exp(log_low + (log_high - log_low) * ratio)
        box_height = torch.minimum((area / ratio).sqrt(), height)
        box_width = torch.minimum((area * ratio).sqrt(), width)
        boxes = torch.stack([top * (height - box_height), left * (width - box_width), box_height, box_width], dim=1)
        return boxes, self.flips(index)

    def flips(self, index: Tensor) -> Tensor:
        """Which of the images at ``index`` ``[N]`` to mirror."""
        return self._drawn(index)[:, 4] < (0.5 if self.flip else 0)

    def _drawn(self, index: Tensor) -> Tensor:
        self.draws = self.draws.to(index.device)
        return self.draws[index]


def resample(
    pixels: Tensor,
    sizes: Tensor,
    boxes: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bilinear",
) -> Tensor:
    """Resize each image's box to a square and normalise it.

    Args:
        pixels: ``uint8`` ``[N, 3, H, W]``, padded at the bottom right.
        sizes: ``[N, 2]`` true height and width in px.
        boxes: ``[N, 4]``.
        size: Side of the result in px.
        mean: Per channel, on a scale of 0 to 1: what the backbone was trained with.
        std: Per channel, on the same scale.
        interpolation: ``bilinear`` or ``bicubic``.

    Returns:
        ``float32`` ``[N, 3, size, size]``, channels last, on the device of ``pixels``.
    """
    images = _empty(pixels, size)
    _by_products(images, _groups(pixels, size), pixels, sizes, boxes, None, interpolation, torch.float32)
    return normalise(images, mean, std)


def random_crops(
    pixels: Tensor,
    sizes: Tensor,
    boxes: Tensor,
    flips: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bilinear",
) -> Tensor:
    """:func:`resample` for training, which need not be exact to a fraction of a pixel, and mirrors some of the images.

    A box that is larger than the result is resized as by torchvision's RandomResizedCrop, where that is on a CPU: its
    sides and the values from 0 to 255 are whole numbers, and pixels beyond it do not count.

    ``flips`` ``[N]`` are the images to mirror; the other arguments are those of :func:`resample`.
    """
    images, parts = _empty(pixels, size), _groups(pixels, size)
    dtype = torch.float32 if pixels.device.type == "cpu" else COARSE
    if pixels.device.type == "cpu" and (shrinks := (boxes[:, 2:] >= size).all(1)).any():
        corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1).round().int()
        chosen = shrinks.nonzero().flatten()
        for i, sides, flip in zip(chosen.tolist(), corners[chosen].tolist(), flips[chosen].tolist(), strict=True):
            top, left, bottom, right = sides
            crop = pixels[i : i + 1, :, top:bottom, left:right]
            view = F.interpolate(crop, (size, size), mode=interpolation, antialias=True)[0]
            images[i] = view.flip(-1) if flip else view
        parts = _groups(pixels, size, (~shrinks).nonzero().flatten())
    _by_products(images, parts, pixels, sizes, boxes, flips, interpolation, dtype)
    return normalise(images, mean, std)


def _empty(pixels: Tensor, size: int) -> Tensor:
    shape = (len(pixels), pixels.shape[1], size, size)
    return torch.empty(shape, device=pixels.device, memory_format=torch.channels_last)


def _by_products(
    images: Tensor,
    parts: Iterator[slice | Tensor],
    pixels: Tensor,
    sizes: Tensor,
    boxes: Tensor,
    flips: Tensor | None,
    interpolation: str,
    dtype: torch.dtype,
) -> None:
    """Fill ``parts`` of ``images`` with their boxes, in values from 0 to 255, by products in ``dtype``."""
    size, device, rows_of_pixels = images.shape[-1], pixels.device, _rows_of_pixels(images)
    sizes, boxes = sizes.to(device), boxes.to(device)
    for part in parts:
        top, bottom = _span(boxes[part, 0], boxes[part, 2], pixels.shape[2], size, interpolation)
        left, right = _span(boxes[part, 1], boxes[part, 3], pixels.shape[3], size, interpolation)
        rows = _weights(boxes[part, 0], boxes[part, 2], sizes[part, 0], range(top, bottom), size, interpolation)
        columns = _weights(boxes[part, 1], boxes[part, 3], sizes[part, 1], range(left, right), size, interpolation)
        if flips is not None:
            columns = torch.where(flips[part].to(device)[:, None, None], columns.flip(1), columns)
        crops = pixels[part, :, top:bottom, left:right].to(dtype, memory_format=torch.contiguous_format)
        with torch.autocast(device.type, enabled=False):  # pixels stay exact where a caller computes in bf16
            narrow = torch.bmm(crops.flatten(1, 2), columns.mT.to(dtype)).unflatten(1, crops.shape[1:3])
            narrow = _rows_of_pixels(narrow)
            if isinstance(part, slice) and dtype == images.dtype:
                torch.bmm(rows, narrow, out=rows_of_pixels[part])
            else:
                rows_of_pixels[part] = torch.bmm(rows.to(dtype), narrow)
    if interpolation == "bicubic":
        images.clamp_(0, 255)  # some of its weights are below zero, so that it overshoots


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise values from 0 to 255 ``[N, 3, H, W]``, in place if they are channels last; see :func:`resample`."""
    scale, shift = _normalisation(tuple(mean), tuple(std), pixels.shape[-1], pixels.device)
    rows = _rows_of_pixels(pixels)
    torch.addcmul(shift, rows, scale, out=rows)
    return rows.unflatten(2, (pixels.shape[-1], pixels.shape[1])).permute(0, 3, 1, 2)


def _rows_of_pixels(images: Tensor) -> Tensor:
    """``[N, 3, H, W]`` as ``[N, H, W * 3]``: the same memory where it is channels last."""
    return images.permute(0, 2, 3, 1).flatten(2)


def _groups(pixels: Tensor, size: int, chosen: Tensor | None = None) -> Iterator[slice | Tensor]:
    """Parts of a batch, or of its ``chosen`` images, that take about as much as floats as a device wants at a time."""
    height, width = pixels.shape[-2:]
    group_mb = GROUP_MB if pixels.device.type == "cpu" else GROUP_MB_ON_GPU
    count = max(1, int(group_mb * 1e6) // (4 * pixels.shape[1] * height * max(width, size)))
    if chosen is None:
        yield from (slice(start, start + count) for start in range(0, len(pixels), count))
    elif len(chosen):
        yield from chosen.split(count)


def _span(start: Tensor, length: Tensor, source: int, target: int, interpolation: str) -> tuple[int, int]:
    """The range of an axis that boxes need, with what the weights reach beyond their ends."""
    if start.device.type != "cpu":  # to know it would mean to wait for the device
        return 0, source
    reach = (length / target).clamp(min=1) * REACH[interpolation]
    return max(0, math.floor((start - reach).min())), min(source, math.ceil((start + length + reach).max()))


@functools.cache
def _normalisation(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Factors and summands ``[width * 3]`` of a row of pixels from 0 to 255."""
    means, stds = torch.tensor(mean, device=device), torch.tensor(std, device=device)
    return (1 / (255 * stds)).repeat(width), (-means / stds).repeat(width)


def _weights(start: Tensor, length: Tensor, size: Tensor, source: range, target: int, interpolation: str) -> Tensor:
    """Resampling matrices ``[N, target, len(source)]`` of one axis; each row sums to 1."""
    step = length / target
    centre = start[:, None] + (torch.arange(target, device=start.device) + 0.5) * step[:, None]
    grid = step.clamp(min=1)[:, None, None]
    position = torch.arange(source.start, source.stop, device=start.device) + 0.5
    distance = (position - centre[:, :, None]).abs() / grid
    weights = (1 - distance).clamp(min=0) if interpolation == "bilinear" else _cubic(distance)
    weights = weights * (position < size[:, None])[:, None]
    return weights / weights.sum(2, keepdim=True)


def _cubic(distance: Tensor) -> Tensor:
    """Keys' cubic convolution kernel (1981) with a = -0.5, as Pillow has it."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
