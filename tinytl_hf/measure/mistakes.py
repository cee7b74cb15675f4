"""A run's most confident mistakes, with small copies of the images, so that a report needs no data."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.special import softmax
from torch import Tensor

from tinytl_hf.data.batches import DecodedImages, StreamedImages
from tinytl_hf.disk import write_text, writing

SHOWN = 24
THUMBNAIL = 128  # longest side in px


def save_mistakes(path: Path, logits: np.ndarray, labels: np.ndarray, images: DecodedImages | StreamedImages) -> None:
    """Write the wrong answers that the model was surest of, as JSON.

    Args:
        path: The file.
        logits: ``[N, classes]``, in the order of ``images``.
        labels: ``[N]`` class numbers.
        images: The evaluation set.

    Raises:
        TinyTLError: The file cannot be written.
    """
    probabilities = softmax(logits.astype(np.float64), axis=1)
    answers = probabilities.argmax(1)
    wrong = np.flatnonzero(answers != labels)
    surest = wrong[np.argsort(-probabilities[wrong, answers[wrong]], kind="stable")][:SHOWN]
    shown: list[dict[str, Any]] = [
        {
            "index": int(i),
            "label": int(labels[i]),
            "answer": int(answers[i]),
            "probability": float(probabilities[i, answers[i]]),
            "probability_of_label": float(probabilities[i, labels[i]]),
            "png": _thumbnail(images.__getitems__([int(i)])),
        }
        for i in surest
    ]
    with writing(path, "the run is finished all the same"):
        write_text(path, json.dumps({"wrong": len(wrong), "n": len(labels), "shown": shown}) + "\n")


def _thumbnail(batch: dict[str, Tensor]) -> str:
    """A small PNG of a batch's only image, in base64."""
    height, width = batch["sizes"][0].tolist()
    image = Image.fromarray(batch["pixels"][0, :, :height, :width].permute(1, 2, 0).numpy())
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
