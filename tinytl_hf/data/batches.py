"""Splits to batches of pixels.

A batch is a dict of ``pixels`` (``uint8`` ``[N, 3, H, W]``, channels last, padded at the bottom right), ``sizes``
(``[N, 2]`` height and width), ``labels`` and ``index`` (``[N]``). Cropping, resizing and normalising
happen on the training device (``augment.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.found import SHOWN, named
from tinytl_hf.data.images import UnreadableImageError, decoded_photo_size, decoded_size
from tinytl_hf.data.sets import sample_rows
from tinytl_hf.data.shared import can_share, decode_in_shares
from tinytl_hf.data.split import READ_AT_ONCE, Split
from tinytl_hf.data.tensors import decode, pad_images
from tinytl_hf.errors import TinyTLError

logger = logging.getLogger(__name__)

STREAMS = "streams"  # in place of a number of bytes
MOST_HEADERS = 4096  # images of a split whose headers are read, spread evenly


@dataclass(frozen=True)
class Survey:
    """What the images of a split take once they are decoded, by some of them.

    Attributes:
        in_memory: About what all images take in bytes, or ``STREAMS``.
        photo_size: Greatest height and greatest width in px: what a batch is padded to at most.
    """

    in_memory: int | str
    photo_size: tuple[int, int]


def survey(split: Split, config: DataConfig, size: int) -> Survey:
    """Decode a sample of a split. Arguments and errors are those of :func:`read_images`."""
    sample = _decoded(split, sample_rows(split), config, size)
    return _survey_of([_size(image) for image in sample if image is not None], split, config, size)


def survey_headers(split: Split, config: DataConfig, size: int) -> Survey:
    """As :func:`survey`, of more images by their files' headers; those that cannot be read do not count."""
    count = len(split.labels)
    index = np.linspace(0, count - 1, min(MOST_HEADERS, count)).astype(int)
    sizes = [decoded_size(image, size) for image in split.images(index) if image is not None]
    return _survey_of([found for found in sizes if found is not None], split, config, size)


def _survey_of(sizes: Sequence[tuple[int, int]], split: Split, config: DataConfig, size: int) -> Survey:
    """What a split takes, by the heights and widths in px of some of its decoded images."""
    if not sizes:
        return Survey(0, decoded_photo_size(size))
    in_memory = round(np.mean([3 * height * width for height, width in sizes]) * len(split.labels))
    return Survey(STREAMS if in_memory > config.memory_limit_mb * 1e6 else in_memory, _largest(sizes))


def read_images(split: Split, config: DataConfig, size: int) -> DecodedImages | StreamedImages:
    """Decode a split into memory, or make it stream where that would exceed ``config.memory_limit_mb``.

    Args:
        split: The images.
        config: Whether to leave out corrupt images, and how much memory the decoded ones may take.
        size: Side of the network's input in px; much larger images are reduced.

    Raises:
        TinyTLError: An image cannot be read and ``config.skip_corrupt`` is false; names its index.
    """
    found = survey(split, config, size)
    if found.in_memory == STREAMS:
        if config.skip_corrupt:
            split = _drop_corrupt(split, _readable(split, config, size))
        return StreamedImages(split, config, size, found.photo_size)

    def as_decoded(index: np.ndarray) -> Iterator[Tensor | None]:  # [H, W, 3], as images lie in memory elsewhere
        return (_planes(image, (1, 2, 0)) for image in _decoded(split, index, config, size))

    count, shared = len(split.labels), can_share()
    if shared:
        decoded = [_planes(image, (2, 0, 1)) for image in decode_in_shares(count, as_decoded)]
    else:
        decoded = list(_decoded(split, np.arange(count), config, size))
    good = np.array([image is not None for image in decoded])
    images = [image for image in decoded if image is not None]
    return DecodedImages(images, _drop_corrupt(split, good), shared)


def _planes(image: Tensor | None, order: tuple[int, int, int]) -> Tensor | None:
    return None if image is None else image.permute(order)


def _size(image: Tensor) -> tuple[int, int]:
    height, width = image.shape[-2:]
    return height, width


def _largest(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    heights, widths = zip(*sizes, strict=True)
    return max(heights), max(widths)


class DecodedImages(Dataset):
    """Images decoded once, in memory.

    Args:
        images: ``uint8`` ``[3, H, W]``.
        split: Their split.
        shared: Whether the memory is that of other processes, too: then they stay where they are.

    Attributes:
        in_memory: What they take, in bytes.
        photo_size: Greatest height and greatest width in px: what a batch is padded to at most.
    """

    def __init__(self, images: list[Tensor], split: Split, shared: bool = False) -> None:
        self.split = split
        self.labels = torch.from_numpy(split.labels)
        self.in_memory = sum(image.numel() for image in images)
        self.photo_size = _largest([_size(image) for image in images])
        same_size = len({image.shape for image in images}) == 1
        self.images = pad_images(images)[0] if same_size and not shared else images

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, index: list[int]) -> dict[str, Tensor]:
        if isinstance(self.images, Tensor):
            pixels = self.images[index]
            sizes = torch.tensor(pixels.shape[-2:]).expand(len(index), 2)
        else:
            pixels, sizes = pad_images([self.images[i] for i in index])
        return {"pixels": pixels, "sizes": sizes, "labels": self.labels[index], "index": torch.tensor(index)}


class StreamedImages(Dataset):
    """Images that are decoded each time they are used, by the loader's worker processes.

    Attributes:
        in_memory: ``STREAMS``.
        photo_size: As of :class:`DecodedImages`, but of a sample.
    """

    in_memory = STREAMS

    def __init__(self, split: Split, config: DataConfig, size: int, photo_size: tuple[int, int]) -> None:
        self.split, self.config, self.size, self.photo_size = split, config, size, photo_size
        self.labels = torch.from_numpy(split.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, index: list[int]) -> dict[str, Tensor]:
        images = []
        decoded = _decoded(self.split, np.array(index), self.config, self.size)
        for i, image in zip(index, decoded, strict=True):
            if image is None:  # those that were unreadable at the start are not among the images
                raise TinyTLError(
                    f"image {_title(self.split, i, self.split.rows[i]['image'])} of split {self.split.name} could be "
                    "read at the start, and now it cannot; put it back and go on, or start again without it"
                )
            images.append(image)
        pixels, sizes = pad_images(images)
        return {"pixels": pixels, "sizes": sizes, "labels": self.labels[index], "index": torch.tensor(index)}


class ShuffledBatches(Sampler[list[int]]):
    """Batches of one size in an order that depends on the seed and the epoch alone.

    The last optimizer step is filled up with images from the start of the order, so an epoch shows each
    image at least once.

    Args:
        images: Number of images.
        global_batch_size: Images an optimizer step.
        accumulation_steps: Batches that make up one of those.
        seed: Seed of the run.
    """

    drop_last = False

    def __init__(self, images: int, global_batch_size: int, accumulation_steps: int, seed: int) -> None:
        self.images, self.seed = images, seed
        self.batch_size = global_batch_size // accumulation_steps
        self.optimizer_steps = -(-images // global_batch_size)
        self.batches = self.optimizer_steps * accumulation_steps
        self.epoch = 0  # set by the loop; Accelerate would count from 0 again after a resume

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.images)
        order = np.resize(order, self.batches * self.batch_size)
        yield from order.reshape(self.batches, self.batch_size).tolist()


def make_loader(images: Dataset, config: DataConfig, **batching: Any) -> DataLoader:
    """A loader of ``images``; ``batching`` is a ``batch_sampler`` or a ``batch_size``."""
    workers = config.workers if isinstance(images, StreamedImages) else 0
    return _loader(images, workers, **batching)


def _loader(images: Dataset, workers: int, **batching: Any) -> DataLoader:
    # A generator of its own, so that starting to read does not move the random state of the run.
    return DataLoader(images, collate_fn=_as_is, num_workers=workers, generator=torch.Generator(), **batching)


def _decoded(split: Split, index: np.ndarray, config: DataConfig, size: int) -> Iterator[Tensor | None]:
    """Images in turn; None for one that cannot be read, if those are to be skipped."""
    for i, encoded in zip(index.tolist(), split.images(index), strict=True):
        try:
            yield decode(encoded, size)
        except UnreadableImageError as error:
            if not config.skip_corrupt:
                raise TinyTLError(
                    f"image {_title(split, i, encoded)} of split {split.name} cannot be read ({error}); mend it, "
                    "or leave such images out with --data.skip_corrupt true"
                ) from error
            yield None


class _Readable(Dataset):
    """For each image, whether it can be read."""

    def __init__(self, split: Split, config: DataConfig, size: int) -> None:
        self.split, self.config, self.size = split, config, size

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitems__(self, index: list[int]) -> list[bool]:
        return [image is not None for image in _decoded(self.split, np.array(index), self.config, self.size)]


def _readable(split: Split, config: DataConfig, size: int) -> np.ndarray:
    loader = _loader(_Readable(split, config, size), config.workers, batch_size=READ_AT_ONCE)
    return np.concatenate([np.array(batch) for batch in loader])


def _drop_corrupt(split: Split, good: np.ndarray) -> Split:
    if good.all():
        return split
    bad = np.flatnonzero(~good)
    if not good.any():
        raise TinyTLError(f"none of the {len(good)} images of split {split.name} can be read")
    encoded = split.rows[bad[:SHOWN]]["image"]
    logger.warning(
        "split %s: left out %s unreadable: %s",
        split.name,
        f"{bad.size:,}",
        named([_title(split, i, image) for i, image in zip(bad.tolist(), encoded, strict=False)], bad.size),
    )
    left = split.select(np.flatnonzero(good))
    if empty := [name for name in split.occurring() if name not in left.occurring()]:
        logger.warning("split %s: no image of %s is left", split.name, named(empty))
    return left


def _title(split: Split, i: int, encoded: dict[str, Any] | None) -> str:
    """An image's file, or its row and what is known of its file."""
    path = (encoded or {}).get("path")
    if path and (encoded or {}).get("bytes") is None:
        return str(path)
    return f"{split.numbers[i]} ({path})" if path else str(split.numbers[i])


def _as_is(batch: Any) -> Any:
    return batch
