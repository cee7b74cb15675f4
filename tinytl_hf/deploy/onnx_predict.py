"""An exported .onnx file that labels photos: with onnxruntime, Pillow and NumPy, without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from tinytl_hf.config.data import MAX_IMAGE_SIZE
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
        try:
            self.label_names: list[str] = json.loads(about["labels"])
            self._preprocessing = json.loads(about["preprocessing"])
            self._input = json.loads(about["input"])
            self.eval_size: int = self._preprocessing["eval_size"]
            self._check()
        except Exception as error:  # a file of somebody else's can say anything, at which onnxruntime has its own
            reason = first_line(error)
            raise TinyTLError(f"{path}: is not what it says of itself ({reason}); export it again") from error

    def _check(self) -> None:
        """Raise unless a photo gives a logit for each label, before any of a person's is labelled."""
        if type(self.eval_size) is not int or not 1 <= self.eval_size <= MAX_IMAGE_SIZE:
            raise ValueError("its eval_size is no side of an image")
        if not isinstance(self.label_names, list) or not all(isinstance(name, str) for name in self.label_names):
            raise ValueError("its labels are no list of names")
        shape = self.logits([np.zeros((1, 1, 3), np.uint8)]).shape
        if shape != (1, len(self.label_names)):
            raise ValueError(f"it has {len(self.label_names)} labels, and gives {list(shape)}")

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
