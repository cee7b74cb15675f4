"""Whether an exported model does what the model does: on real images, before anything is written."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader

from tinytl_hf.adapter.record import DataRecord
from tinytl_hf.config.data import DataConfig
from tinytl_hf.data import sets
from tinytl_hf.data.batches import make_loader, read_images
from tinytl_hf.data.find import is_same_place, is_there
from tinytl_hf.data.split import Split
from tinytl_hf.deploy.exported import Deployed
from tinytl_hf.errors import TinyTLError
from tinytl_hf.model import TinyTLModel
from tinytl_hf.words import counted

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4  # of a logit; where logits are beyond 1, of the largest one
BATCH_SIZE = 32
CROP = 0.6  # share of a photo's sides that a crop of it has


@dataclass(frozen=True)
class RealImages:
    """Evaluation views of real images, of which a batch exists at a time: a whole split of them can be gigabytes.

    Attributes:
        source: Where they come from, in words.
        count: How many they are.
        batches: Normalised images ``[N, 3, S, S]``; can be gone through again.
        labels: Class numbers ``[count]``, or None.
    """

    source: str
    count: int
    batches: Iterable[Tensor]
    labels: np.ndarray | None = None

    def first(self, count: int) -> Tensor:
        """The first images, or all of them if they are fewer, ``[N, 3, S, S]``."""
        return torch.cat(list(islice(self.one_by_one(), count)))

    def one_by_one(self) -> Iterator[Tensor]:
        """Each image, ``[1, 3, S, S]``."""
        for batch in self.batches:
            yield from batch.split(1)


@dataclass(frozen=True)
class Comparison:
    """A runtime beside PyTorch on the same images.

    Attributes:
        runtime: Its name.
        images: The images.
        difference: Largest absolute difference of a logit.
        scale: Largest absolute logit, or 1 if that is more.
        same_label: Images whose most likely label is the same.
        accuracy: Of PyTorch and of the runtime, where the labels are known.
        images_per_second: Of both, one image at a time: the median.
    """

    runtime: str
    images: RealImages
    difference: float
    scale: float
    same_label: int
    accuracy: tuple[float, float] | None
    images_per_second: tuple[float, float]

    def __str__(self) -> str:
        """The figures in words, one line for each kind."""
        count = self.images.count
        lines = [
            f"checked in {self.runtime} on {counted(count, 'image')} of {self.images.source}: largest difference of "
            f"a logit {self.difference:.1e}, same label for {self.same_label:,} of {count:,}"
        ]
        if self.accuracy is not None:
            ours, theirs = self.accuracy
            lines.append(f"accuracy there: PyTorch {ours:.2%}, {self.runtime} {theirs:.2%}")
        ours, theirs = self.images_per_second
        speeds = f"PyTorch {ours:.1f}, {self.runtime} {theirs:.1f}"
        return "\n".join([*lines, f"images/s, one at a time, {counted(torch.get_num_threads(), 'thread')}: {speeds}"])

    def check(self) -> None:
        """Raise unless the differences are those of rounding.

        Raises:
            TinyTLError: They are larger.
        """
        if not self.difference <= TOLERANCE * self.scale:  # not a number fails this, too
            raise TinyTLError(
                f"{self.runtime} gives logits that differ by up to {self.difference:.1e} from PyTorch's, and only "
                f"{TOLERANCE * self.scale:.1e} is rounding; nothing was written"
            )


def data_named(data: DataConfig, record: DataRecord | None) -> bool:
    """Whether ``data`` is more than an option that was left alone: named, or what the adapter was trained on."""
    return record is not None or data.dataset != DataConfig().dataset


def evaluation_images(model: TinyTLModel, data: DataConfig, count: int | None) -> RealImages:
    """Images to compare on: of ``data``, or crops of two photos where that is not at hand.

    Args:
        model: Whose classes and preprocessing they get.
        data: The data set that was named, or that of the adapter. The adapter's is used where it is on this disk and
            has its classes.
        count: How many; None: the whole evaluation split.

    Raises:
        TinyTLError: The data set that was named cannot be read, or has other classes.
    """
    record = model.config.data
    of_adapter = record is not None and is_same_place(data.dataset, record.dataset)
    at_hand = data.dataset == "digits" or is_there(data.dataset)
    if count is not None and (not data_named(data, record) or (of_adapter and not at_hand)):
        why = f"its data set {data.dataset} is not on this disk" if of_adapter else "the adapter names no data set"
        return _photos(model, count, why)
    if count is not None:
        data = replace(data, max_eval_samples=min(count, data.max_eval_samples or count))
    try:
        split = sets.with_label_names(sets.open_eval_split(data, whole=not of_adapter), model.label_names)
    except TinyTLError as error:
        if count is None or not of_adapter:
            raise
        # An adapter that was pulled says the name of a folder alone: the one here can be another.
        return _photos(model, count, f"{data.dataset} here is not the data set of the adapter ({error})")
    return _views(model, split, data)


def calibration_images(model: TinyTLModel, data: DataConfig, count: int) -> Tensor:
    """Training images in their evaluation view, ``[N, 3, S, S]``, to find the ranges of activations with.

    Raises:
        TinyTLError: No data set was named, or it cannot be read.
    """
    if not data_named(data, model.config.data):
        raise TinyTLError("quantize=int8: the adapter names no data set to calibrate on; name one with --data.dataset")
    train = sets.open_train_split(replace(data, max_train_samples=min(count, data.max_train_samples or count)))
    logger.info("the ranges of 8 bits are those of %s of %s", counted(len(train.labels), "image"), train.title)
    return _views(model, train, data).first(count)


def compare(
    runtime: str, model: TinyTLModel, deployed: Deployed, run: Callable[[np.ndarray], np.ndarray], images: RealImages
) -> Comparison:
    """Run both on each image.

    Args:
        runtime: Its name.
        model: In evaluation mode.
        deployed: What was exported.
        run: The runtime: a batch of one to logits ``[1, classes]``.
        images: The images.
    """
    logger.info("checking in %s on %s of %s", runtime, counted(images.count, "image"), images.source)
    ours, theirs, seconds = [], [], []
    with torch.inference_mode():
        for view in images.one_by_one():
            inputs = deployed.inputs_of(view)
            start = time.perf_counter()
            ours.append(model(deployed.normalised(inputs)).numpy())
            middle = time.perf_counter()
            theirs.append(run(inputs.numpy()))
            seconds.append((middle - start, time.perf_counter() - middle))
    one, other = np.concatenate(ours), np.concatenate(theirs)
    labels = images.labels
    accuracy = None
    if labels is not None:
        accuracy = float((one.argmax(1) == labels).mean()), float((other.argmax(1) == labels).mean())
    torch_speed, speed = 1 / np.median(np.array(seconds), axis=0)
    return Comparison(
        runtime=runtime,
        images=images,
        difference=float(np.abs(one - other).max()),
        scale=max(1.0, float(np.abs(one).max())),
        same_label=int((one.argmax(1) == other.argmax(1)).sum()),
        accuracy=accuracy,
        images_per_second=(float(torch_speed), float(speed)),
    )


@dataclass(frozen=True)
class _Views:
    """The batches of a loader, as a model normalises them."""

    model: TinyTLModel
    loader: DataLoader[Any]

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.loader:
            yield self.model.normalise(batch["pixels"], batch["sizes"]).contiguous()


def _views(model: TinyTLModel, split: Split, data: DataConfig) -> RealImages:
    images = read_images(split, data, model.config.preprocessing.eval_size)
    batches = _Views(model, make_loader(images, data, batch_size=BATCH_SIZE))
    return RealImages(f"{split.title} of {data.dataset}", len(images), batches, images.split.labels)


def _photos(model: TinyTLModel, count: int, why: str) -> RealImages:
    logger.info("%s: the check uses crops of scikit-learn's two photos; --data.dataset names others", why)
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    draws = np.random.default_rng(0).random((count, 2))
    crops = []
    for i, (x, y) in enumerate(draws):
        photo = photos[i % len(photos)]
        width, height = (int(CROP * side) for side in photo.size)
        left, top = int(x * (photo.width - width)), int(y * (photo.height - height))
        crops.append(photo.crop((left, top, left + width, top + height)))
    parts = [model.preprocess(crops[i : i + BATCH_SIZE]).contiguous() for i in range(0, count, BATCH_SIZE)]
    return RealImages("crops of scikit-learn's photos", count, parts)
