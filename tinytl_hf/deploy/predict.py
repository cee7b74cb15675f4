"""Label image files: the verb ``predict``, with an adapter or with an exported .onnx file, which needs no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from tinytl_hf.config.verbs import PredictConfig
from tinytl_hf.data.images import UnreadableImageError, allow_megapixels, decode_pixels
from tinytl_hf.deploy.sources import Source, find_images
from tinytl_hf.errors import TinyTLError

BATCH_SIZE = 32


class Classifier(Protocol):
    """What labels photos: an adapter in torch, or an exported file in its runtime.

    Attributes:
        label_names: Names of the classes.
        eval_size: Side of the network's input in px.
    """

    label_names: list[str]
    eval_size: int

    def probabilities(self, photos: Sequence[np.ndarray], mirror: bool = False) -> np.ndarray:
        """Photos ``uint8`` ``[H, W, 3]`` of any sizes to ``[N, classes]``; ``mirror`` averages in the mirrored."""


def predict(config: PredictConfig, names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Label images, folders of images, patterns and standard input.

    Yields:
        For each image ``{"image": path, "labels": [{"label": ..., "probability": ...}, ...]}``, most likely
        first, with ``"views": 2`` if they are of the image and its mirror image; or
        ``{"image": path, "error": reason}``.

    Raises:
        TinyTLError: The adapter cannot be loaded.
    """
    if config.max_megapixels is not None:
        allow_megapixels(config.max_megapixels)
    classifier = _load(config)
    sources = [source for name in names for source in find_images(name)]
    for start in range(0, len(sources), BATCH_SIZE):
        yield from _predict_batch(classifier, sources[start : start + BATCH_SIZE], config)


def _load(config: PredictConfig) -> Classifier:
    if not config.adapter.endswith(".onnx") or os.path.isdir(config.adapter):  # an adapter can be called so
        from tinytl_hf.deploy.adapter_classifier import AdapterClassifier

        return AdapterClassifier(config.adapter, config.weights, config.revision)
    for option in ("weights", "revision"):
        if (value := getattr(config, option)) is not None:
            raise TinyTLError(f"{option}={value}: {config.adapter} holds its own weights; leave the option out")
    from tinytl_hf.deploy.onnx_predict import OnnxClassifier

    return OnnxClassifier(config.adapter)


def _predict_batch(classifier: Classifier, sources: list[Source], config: PredictConfig) -> list[dict[str, Any]]:
    results: dict[int, dict[str, Any]] = {}
    inputs = []
    for number, source in enumerate(sources):
        try:
            if source.problem is not None:
                raise UnreadableImageError(source.problem)
            inputs.append((number, decode_pixels(source.encoded, classifier.eval_size)))
        except UnreadableImageError as error:
            results[number] = {"image": source.name, "error": str(error)}
    if inputs:
        probabilities = classifier.probabilities([photo for _, photo in inputs], config.mirror)
        views = {"views": 2} if config.mirror else {}
        for (number, _), values in zip(inputs, probabilities, strict=True):
            if not np.isfinite(values).all():
                reason = "the network gives no finite numbers for it; its weights or its preprocessing are damaged"
                results[number] = {"image": sources[number].name, "error": reason}
                continue
            best = np.argsort(-values, kind="stable")[: config.top_k]
            labels = [{"label": classifier.label_names[i], "probability": float(values[i])} for i in best]
            results[number] = {"image": sources[number].name, "labels": labels, **views}
    return [results[number] for number in range(len(sources))]
