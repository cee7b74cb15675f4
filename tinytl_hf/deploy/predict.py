"""Label image files: the verb ``predict``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from tinytl_hf.config.verbs import PredictConfig
from tinytl_hf.data.images import UnreadableImageError, allow_megapixels, decode, pad_images
from tinytl_hf.deploy.sources import Source, find_images
from tinytl_hf.device import forward_in_parts, set_threads
from tinytl_hf.model import TinyTLModel

BATCH_SIZE = 32


def predict(config: PredictConfig, names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Label images, folders of images, patterns and standard input.

    Yields:
        For each image ``{"image": path, "labels": [{"label": ..., "probability": ...}, ...]}``, most likely
        first, or ``{"image": path, "error": reason}``.

    Raises:
        TinyTLError: The adapter cannot be loaded.
    """
    set_threads(None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.max_megapixels is not None:
        allow_megapixels(config.max_megapixels)
    model = TinyTLModel.from_pretrained(config.adapter, weights=config.weights, revision=config.revision)
    model = model.eval().to(device)
    sources = [source for name in names for source in find_images(name)]
    for start in range(0, len(sources), BATCH_SIZE):
        yield from _predict_batch(model, sources[start : start + BATCH_SIZE], config.top_k)


def _predict_batch(model: TinyTLModel, sources: list[Source], top_k: int) -> list[dict[str, Any]]:
    results: dict[int, dict[str, Any]] = {}
    inputs = []
    eval_size = model.config.preprocessing.eval_size
    for number, source in enumerate(sources):
        try:
            if source.problem is not None:
                raise UnreadableImageError(source.problem)
            inputs.append((number, decode(source.encoded, eval_size)))
        except UnreadableImageError as error:
            results[number] = {"image": source.name, "error": str(error)}
    if inputs:
        with torch.inference_mode():
            pixels, sizes = pad_images([image for _, image in inputs])
            probabilities = forward_in_parts(model, model.normalise(pixels, sizes)).softmax(1).cpu()
        best = probabilities.topk(min(top_k, probabilities.shape[1]))
        for (number, _), values, indices in zip(inputs, best.values, best.indices, strict=True):
            labels = [
                {"label": model.label_names[index], "probability": value}
                for value, index in zip(values.tolist(), indices.tolist(), strict=True)
            ]
            results[number] = {"image": sources[number].name, "labels": labels}
    return [results[number] for number in range(len(sources))]
