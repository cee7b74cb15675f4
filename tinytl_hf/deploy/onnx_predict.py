"""An exported .onnx file that labels photos: with onnxruntime, Pillow and NumPy, without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from tinytl_hf.data.view import centre_view, normalised
from tinytl_hf.disk import StrPath, expanded
from tinytl_hf.errors import TinyTLError, first_line


class OnnxClassifier:
    """Labels photos with a file that ``tinytl-hf export --format onnx`` wrote.

    Args:
        path: The file.

    Attributes:
        label_names: Names of the classes, in the order of the logits.
        eval_size: Side of the network's input in px.

    Raises:
        TinyTLError: onnxruntime is not installed, or the file is absent, damaged, or of another kind.
    """

    def __init__(self, path: StrPath) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise TinyTLError(
                f"{path}: the package onnxruntime is not installed; run pip install 'tinytl-hf[onnx]'"
            ) from error
        path = expanded(path)
        if not path.is_file():
            raise TinyTLError(f"{path}: no such file; write it with tinytl-hf export --format onnx")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # its errors are raised as well
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no class in common but this one
            raise TinyTLError(f"{path}: onnxruntime cannot load it ({first_line(error)})") from error
        about = self._session.get_modelmeta().custom_metadata_map
        if not {"labels", "preprocessing", "input"} <= about.keys():
            raise TinyTLError(f"{path}: was not written by tinytl-hf export: it does not say its labels")
        self.label_names: list[str] = json.loads(about["labels"])
        self._preprocessing = json.loads(about["preprocessing"])
        self._input = json.loads(about["input"])
        self.eval_size: int = self._preprocessing["eval_size"]

    def logits(self, photos: Sequence[np.ndarray]) -> np.ndarray:
        """Photos ``uint8`` ``[H, W, 3]`` of any sizes to logits ``[N, classes]``."""
        crop_pct = self._preprocessing["crop_pct"]
        interpolation = self._preprocessing.get("interpolation", "bilinear")  # older files have none
        views = np.stack([centre_view(photo, self.eval_size, crop_pct, interpolation) for photo in photos])
        if self._input["type"] == "uint8":
            images = views.round().clip(0, 255).astype(np.uint8)
        else:
            images = normalised(views, self._preprocessing)
        if self._input["layout"] == "NHWC":
            images = images.transpose(0, 2, 3, 1)
        return self._session.run(None, {self._input["name"]: np.ascontiguousarray(images)})[0]

    def probabilities(self, photos: Sequence[np.ndarray], mirror: bool = False) -> np.ndarray:
        """As :meth:`logits`, to probabilities ``[N, classes]``; ``mirror`` averages in the mirror images."""
        logits = self.logits(photos)
        if mirror:
            logits = (logits + self.logits([photo[:, ::-1] for photo in photos])) / 2
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return odds / odds.sum(1, keepdims=True)
