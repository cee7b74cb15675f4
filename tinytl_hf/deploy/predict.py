"""Label image files: the verb ``predict``."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tinytl_hf.config.verbs import PredictConfig
from tinytl_hf.data.images import UnreadableImageError, decode, pad_images
from tinytl_hf.device import forward_in_parts, set_threads
from tinytl_hf.model import TinyTLModel

IMAGE_SUFFIXES = frozenset(Image.registered_extensions())
BATCH_SIZE = 32


def predict(config: PredictConfig, names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Label images, folders of images and patterns.

    Yields:
        For each image ``{"image": path, "labels": [{"label": ..., "probability": ...}, ...]}``, most likely
        first, or ``{"image": path, "error": reason}``.

    Raises:
        TinyTLError: The adapter cannot be loaded.
    """
    set_threads(None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = TinyTLModel.from_pretrained(config.adapter, weights=config.weights).eval().to(device)
    paths = [path for name in names for path in find_images(name)]
    for start in range(0, len(paths), BATCH_SIZE):
        yield from _predict_batch(model, paths[start : start + BATCH_SIZE], config.top_k)


def find_images(name: str) -> list[Path]:
    """The image files that a path, folder or pattern stands for; the path itself if it is none of these."""
    path = Path(name).expanduser()
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
    elif path.exists():
        return [path]
    else:
        found = [Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file()]
    return sorted(found) or [path]


def _predict_batch(model: TinyTLModel, paths: list[Path], top_k: int) -> list[dict[str, Any]]:
    results: dict[Path, dict[str, Any]] = {}
    inputs = []
    eval_size = model.config.preprocessing.eval_size
    for path in paths:
        try:
            inputs.append((path, decode({"bytes": None, "path": str(path)}, eval_size)))
        except UnreadableImageError as error:
            reason = "no image in this folder" if path.is_dir() else str(error)
            results[path] = {"image": str(path), "error": reason}
    if inputs:
        with torch.inference_mode():
            pixels, sizes = pad_images([image for _, image in inputs])
            probabilities = forward_in_parts(model, model.normalise(pixels, sizes)).softmax(1).cpu()
        best = probabilities.topk(min(top_k, probabilities.shape[1]))
        for (path, _), values, indices in zip(inputs, best.values, best.indices, strict=True):
            labels = [
                {"label": model.label_names[index], "probability": value}
                for value, index in zip(values.tolist(), indices.tolist(), strict=True)
            ]
            results[path] = {"image": str(path), "labels": labels}
    return [results[path] for path in paths]
