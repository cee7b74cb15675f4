"""What a run reads: the images of its splits, or features of them that are computed once."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from tinytl_hf.config.run import Config
from tinytl_hf.data import batches
from tinytl_hf.data.batches import DecodedImages, StreamedImages
from tinytl_hf.data.sets import Opened
from tinytl_hf.device import seconds_since
from tinytl_hf.measure.memory import DataMemory
from tinytl_hf.model import TinyTLModel
from tinytl_hf.train.cached_features import CachedFeatures, compute_features


@dataclass
class Inputs:
    """What a run reads.

    Attributes:
        train_images: To train on.
        eval_images: To evaluate on after each epoch.
        test_images: To evaluate on at the end, if another split is for that.
        train_set: The training images, or their features.
        eval_set: The images of the evaluations, or their features.
        photo_size: Greatest height and width in px of the photos that a step sees, or would see without features.
        seconds: What the features took.
    """

    train_images: DecodedImages | StreamedImages
    eval_images: DecodedImages | StreamedImages
    test_images: DecodedImages | StreamedImages | None
    train_set: DecodedImages | StreamedImages | CachedFeatures
    eval_set: DecodedImages | StreamedImages | CachedFeatures
    photo_size: tuple[int, int]
    seconds: float = 0.0

    @property
    def memory(self) -> DataMemory:
        """What stays in memory during the run: where there are features, the training images go."""
        held = {"train": self.train_set.in_memory, "eval": self.eval_set.in_memory}
        if isinstance(self.train_set, CachedFeatures):
            held = {f"{name} features": size for name, size in held.items()} | {"eval": self.eval_images.in_memory}
        if self.test_images is not None:
            held["test"] = self.test_images.in_memory
        return DataMemory(held, self.photo_size)

    @property
    def streams(self) -> bool:
        """Whether the images of a split are decoded each time they are used."""
        images = (self.train_images, self.eval_images, self.test_images)
        return any(isinstance(each, StreamedImages) for each in images)

    def found(self, opened: Opened) -> dict[str, Any]:
        """What the data set holds, for the results, with the images among it that could not be read."""
        found = opened.found.to_json()
        pairs = [(opened.train, self.train_images), (opened.evaluation, self.eval_images)]
        if opened.test is not None and self.test_images is not None:
            pairs.append((opened.test, self.test_images))
        lost = {split.title: len(split.labels) - len(images) for split, images in pairs}
        if unreadable := {title: count for title, count in lost.items() if count}:
            found["left_out"]["unreadable"] = sum(unreadable.values())
            found["unreadable"] = unreadable
        found["trained_on"] = [opened.train.name, len(self.train_images)]
        return found


def read_inputs(accelerator: Accelerator, model: TinyTLModel, opened: Opened, config: Config) -> Inputs:
    """Decode the images, or prepare to stream them, and compute their features if the run caches them.

    Raises:
        TinyTLError: An image cannot be read, or the features do not fit anywhere.
    """
    eval_size = model.config.preprocessing.eval_size
    train_size, caches = config.data.train_size, config.train.cache_features
    # Features are those of the evaluation's view, for which photos may have to be larger than for random crops.
    train_images = batches.read_images(opened.train, config.data, eval_size if caches else train_size)
    eval_images = batches.read_images(opened.evaluation, config.data, eval_size)
    test_images = None if opened.test is None else batches.read_images(opened.test, config.data, eval_size)
    inputs = Inputs(train_images, eval_images, test_images, train_images, eval_images, train_images.photo_size)
    if caches and eval_size != train_size:
        inputs.photo_size = batches.survey_headers(opened.train, config.data, train_size).photo_size
    if caches:
        start = time.perf_counter()
        inputs.train_set = compute_features(accelerator, model, train_images, config, trains=True)
        inputs.eval_set = compute_features(accelerator, model, eval_images, config, trains=False)
        inputs.seconds = seconds_since(start, accelerator.device)
    return inputs
