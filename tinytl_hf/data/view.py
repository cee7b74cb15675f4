"""The evaluation view of one photo with NumPy alone: what ``augment.py`` does with batches in torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def centre_view(pixels: np.ndarray, size: int, crop_pct: float, interpolation: str = "bilinear") -> np.ndarray:
    """Resize the centred square of a photo, with anti-aliasing.

    Args:
        pixels: ``uint8`` ``[H, W, 3]``.
        size: Side of the result in px.
        crop_pct: Side of the square as a share of the photo's shorter side.
        interpolation: ``bilinear`` or ``bicubic``.

    Returns:
        ``float32`` ``[3, size, size]`` from 0 to 255.
    """
    height, width = pixels.shape[:2]
    side = np.float32(min(height, width)) * np.float32(crop_pct)
    rows, top = _weights(height, side, size, interpolation)
    columns, left = _weights(width, side, size, interpolation)
    part = pixels[top : top + rows.shape[1], left : left + columns.shape[1]].astype(np.float32)
    view = rows @ part.transpose(2, 0, 1) @ columns.T
    return np.clip(view, 0, 255) if interpolation == "bicubic" else view


def normalised(views: np.ndarray, preprocessing: Mapping[str, Any]) -> np.ndarray:
    """Views ``[N, 3, S, S]`` from 0 to 255 with the mean and standard deviation that the network was trained with."""
    mean, std = (np.array(preprocessing[name], np.float32)[:, None, None] for name in ("mean", "std"))
    return (views / np.float32(255) - mean) / std


def _weights(length: int, side: np.floating, target: int, interpolation: str) -> tuple[np.ndarray, int]:
    """Resampling matrix ``[target, n]`` of one axis, and the first of the ``n`` pixels that it needs."""
    start, step = (length - float(side)) / 2, float(side) / target
    grid = max(step, 1.0)
    support = grid * (2 if interpolation == "bicubic" else 1)
    first, last = max(0, math.floor(start - support)), min(length, math.ceil(start + float(side) + support))
    centres = start + (np.arange(target) + 0.5) * step
    distances = np.abs(np.arange(first, last) + 0.5 - centres[:, None])
    weights = np.clip(1 - distances / grid, 0, None) if interpolation == "bilinear" else _cubic(distances / grid)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32), first


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel (1981) with a = -0.5, as Pillow has it."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
