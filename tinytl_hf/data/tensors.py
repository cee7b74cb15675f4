"""Images as tensors ``uint8`` ``[3, H, W]``, and batches of them; in memory they lie as decoded, ``[H, W, 3]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tinytl_hf.data.images import decode_pixels, to_pixels


def decode(encoded: dict[str, Any] | None, input_size: int) -> Tensor:
    """:func:`~tinytl_hf.data.images.decode_pixels` as a tensor ``[3, H, W]``."""
    return as_tensor(decode_pixels(encoded, input_size))


def to_rgb(image: Image.Image, input_size: int) -> Tensor:
    """:func:`~tinytl_hf.data.images.to_pixels` as a tensor ``[3, H, W]``."""
    return as_tensor(to_pixels(image, input_size))


def as_tensor(pixels: np.ndarray) -> Tensor:
    """``uint8`` ``[H, W, 3]`` as a tensor ``[3, H, W]``."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


def channels_last(images: Tensor) -> Tensor:
    """Images in the layout of a network's weights; as they are under ``torch.func.vmap``, which has no layouts."""
    try:
        return images.contiguous(memory_format=torch.channels_last)
    except RuntimeError:
        return images


def pad_images(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack images of any sizes, padded at the bottom right.

    Returns:
        Pixels ``[N, 3, H, W]``, channels last, and the true sizes ``[N, 2]`` (height, width).
    """
    sizes = torch.tensor([image.shape[-2:] for image in images])
    height, width = sizes.amax(0).tolist()
    pixels = torch.zeros(len(images), height, width, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    for row, image in zip(pixels, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return pixels, sizes
