"""The verb ``export``: what leaves Python, and in which form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tinytl_hf.config.check import check, check_text, check_types, expand_paths

ExportFormat = Literal["onnx", "executorch", "timm"]
SUFFIXES: dict[str, str] = {"onnx": ".onnx", "executorch": ".pte", "timm": ""}
FILES = (".onnx", ".pte", ".safetensors")  # what nobody calls a folder


@dataclass(frozen=True)
class ExportConfig:
    """Export a model for use, or for training, outside of this package."""

    adapter: str
    """Folder of the adapter or of the run that made it, or its name on the Hub."""
    format: ExportFormat
    """onnx (one file), executorch (a .pte file and a .json file beside it), or timm (a folder that timm and
    transformers load; for methods without lite residuals)."""
    output: str
    """The .onnx file, the .pte file or the folder to write."""
    weights: str | None = None
    """Where to take the backbone's weights from; null: where the adapter says."""
    revision: str | None = None
    """On the Hub: a branch, a tag or a commit; null: main."""
    train: bool = False
    """Export a training step for a device: loss and gradients of what the method trains (format executorch)."""
    batch_size: int = 8
    """Images of that training step."""
    input: Literal["float", "uint8"] = "float"
    """What the exported model gets: normalised float32 images, or uint8 pixels from 0 to 255, which it normalises."""
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    """Order of the input's dimensions: batch, channels, height, width; or with the channels last."""
    quantize: Literal["int8"] | None = None
    """int8: 8-bit weights and activations, calibrated on training images of data.dataset (format onnx)."""
    check_images: int = 64
    """Images on which the result is compared with PyTorch before it is written; with quantize, all of the evaluation
    split are, and a training step has its own batch."""
    overwrite: bool = False
    """Replace an export that is there."""

    def __post_init__(self) -> None:
        expand_paths(self, "adapter", "weights", "output")
        check_types(self)
        check_text("output", self.output)
        suffix = SUFFIXES[self.format]
        fits = self.output.endswith(suffix) and (suffix != "" or not self.output.endswith(FILES))
        check(fits, "output", self.output, f"name a {suffix} file" if suffix else "name a folder")
        executorch, onnx = self.format == "executorch", self.format == "onnx"
        check(executorch or not self.train, "train", self.train, "a training step needs --format executorch")
        steps = self.train or self.batch_size == type(self).batch_size
        check(steps, "batch_size", self.batch_size, "it is that of a training step (--train true); leave it out")
        if self.train:
            own = self.check_images == type(self).check_images
            check(own, "check_images", self.check_images, "a training step is checked on its own batch; leave it out")
        check(onnx or self.quantize is None, "quantize", self.quantize, "it needs --format onnx")
        if self.quantize is not None:
            own = self.check_images == type(self).check_images
            fix = "8 bits are checked on the whole evaluation split, of which --data.max_eval_samples takes a part"
            check(own, "check_images", self.check_images, f"{fix}; leave it out")
        for name in ("input", "layout"):
            value = getattr(self, name)
            plain = value == getattr(type(self), name)
            check(plain or self.format != "timm", name, value, "a timm model gets normalised images, NCHW")
            check(plain or not self.train, name, value, "a training step gets normalised images, NCHW")
        for name in ("batch_size", "check_images"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "use 1 or more")
