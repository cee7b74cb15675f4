"""The verbs other than ``train`` as frozen dataclasses, as :mod:`tinytl_hf.config.run` has them of a run."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from tinytl_hf.config.check import check, check_once, check_text, check_types, expand_paths
from tinytl_hf.config.network import MethodName


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate an adapter."""

    adapter: str
    """Folder of the adapter or of the run that made it, or its name on the Hub."""
    weights: str | None = None
    """Where to take the backbone's weights from; null: where the adapter says."""
    revision: str | None = None
    """On the Hub: a branch, a tag or a commit; null: main."""
    output: str | None = None
    """JSON file to write the figures to."""
    metrics: list[str] = field(default_factory=list)
    """More metrics: names of the Hub's evaluate modules, or paths of metric scripts."""
    batch_size: int = 128
    """Images a forward pass, over all processes."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """no, bf16 or fp16; null: what `accelerate launch` was told."""
    mirror: bool = False
    """Also average the logits of each image and its mirror image, and give the figures of that apart."""

    def __post_init__(self) -> None:
        expand_paths(self, "adapter", "weights", "output", "metrics")
        check_types(self)
        check(self.batch_size >= 1, "batch_size", self.batch_size, "use 1 or more")
        is_json = self.output is None or self.output.endswith(".json")
        check(is_json, "output", self.output, "name a .json file")


@dataclass(frozen=True)
class PredictConfig:
    """Label image files with an adapter."""

    adapter: str
    """Folder of the adapter or of the run that made it, or its name on the Hub; or a .onnx file of the verb
    `export`."""
    weights: str | None = None
    """Where to take the backbone's weights from; null: where the adapter says."""
    revision: str | None = None
    """On the Hub: a branch, a tag or a commit; null: main."""
    top_k: int = 3
    """Most likely labels to show for each image."""
    json: bool = False
    """Print a JSON object for each image instead of a line of text."""
    csv: str | None = None
    """CSV file that gets a line for each image as well: image, label and probability of the likeliest, label_2 and
    probability_2 and so on up to top_k (empty where there are fewer classes), and error if it could not be read."""
    max_megapixels: int | None = None
    """Read images of up to this many megapixels; null: what Pillow takes for safe, 178."""
    mirror: bool = False
    """Average the logits of each image and its mirror image, in twice the time."""

    def __post_init__(self) -> None:
        expand_paths(self, "adapter", "weights", "csv")
        check_types(self)
        check(self.top_k >= 1, "top_k", self.top_k, "use 1 or more")
        check(self.csv is None or self.csv.endswith(".csv"), "csv", self.csv, "name a .csv file")
        enough = self.max_megapixels is None or self.max_megapixels >= 1
        check(enough, "max_megapixels", self.max_megapixels, "use 1 or more")


@dataclass(frozen=True)
class MergeConfig:
    """Merge an adapter into its backbone."""

    adapter: str
    """Folder of the adapter or of the run that made it, or its name on the Hub."""
    output: str
    """The .safetensors file to write."""
    weights: str | None = None
    """Where to take the backbone's weights from; null: where the adapter says."""
    revision: str | None = None
    """On the Hub: a branch, a tag or a commit; null: main."""
    overwrite: bool = False
    """Replace a file that is there."""

    def __post_init__(self) -> None:
        expand_paths(self, "adapter", "weights", "output")
        check_types(self)
        check(self.output.endswith(".safetensors"), "output", self.output, "name a .safetensors file")
        check_text("output", self.output)


@dataclass(frozen=True)
class CompareConfig:
    """Compare finished runs."""

    output: str | None = None
    """Folder that gets the table as Markdown, CSV and JSON, and pictures; null: only print the table."""

    def __post_init__(self) -> None:
        expand_paths(self, "output")
        check_types(self)
        if self.output is not None:
            check_text("output", self.output)


@dataclass(frozen=True)
class ReportConfig:
    """Show one finished run."""

    html: bool = False
    """Write one HTML page that needs no network and no other file."""
    output: str | None = None
    """The page, which is then written with or without html; null: report.html in the run's folder."""

    def __post_init__(self) -> None:
        expand_paths(self, "output")
        check_types(self)
        if self.output is not None:
            check_text("output", self.output)


@dataclass(frozen=True)
class MemoryTableConfig:
    """Measure the training memory and speed of methods, lean and stock."""

    methods: list[MethodName] | None = None
    """Methods to measure; null: all."""
    batch_size: int = 8
    """Images a forward and backward pass; train.gradient_accumulation_steps of those make up a step."""
    photo_size: str | None = None
    """Height and width of the decoded photos that a step starts from, in px, such as 448x672; null: the largest of the
    data set with with_data, else those of a large photo of 3:2 (decoding reduces it to twice data.train_size)."""
    with_data: bool = False
    """Open the data set, and say what its decoded images keep in memory."""
    num_classes: int = 10
    """Outputs of the head."""
    repeats: int = 5
    """Steps whose median time counts."""
    json: bool = False
    """Print JSON, in bytes and with the conditions, instead of a table."""
    plot: str | None = None
    """Draw the measured peaks as bars into this PNG file."""

    def __post_init__(self) -> None:
        expand_paths(self, "plot")
        check_types(self)
        check(self.methods is None or bool(self.methods), "methods", self.methods, "name one or more, or null for all")
        check_once("methods", self.methods or [])
        for name in ("batch_size", "num_classes", "repeats"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "use 1 or more")
        is_size = self.photo_size is None or re.fullmatch(r"[1-9]\d*x[1-9]\d*", self.photo_size) is not None
        check(is_size, "photo_size", self.photo_size, "use height x width in px, such as 448x672")
        check(self.plot is None or self.plot.endswith(".png"), "plot", self.plot, "name a file that ends in .png")

    @property
    def height_and_width(self) -> tuple[int, int] | None:
        """``photo_size`` in px."""
        if self.photo_size is None:
            return None
        height, width = map(int, self.photo_size.split("x"))
        return height, width


@dataclass(frozen=True)
class BenchConfig:
    """Time training steps of lean and stock in alternation."""

    train_sizes: list[int] = field(default_factory=lambda: [96, 224])
    """Sides of the images in px."""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 32, 128])
    """Images a step."""
    repeats: int = 5
    """Steps of each contender, whose median counts."""
    json: bool = False
    """Print JSON with the conditions instead of a table."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("train_sizes", "batch_sizes"):
            values = getattr(self, name)
            check(bool(values) and min(values) >= 1, name, values, "use numbers of 1 or more")
            check_once(name, values)
        check(self.repeats >= 1, "repeats", self.repeats, "use 1 or more")


@dataclass(frozen=True)
class BackbonesConfig:
    """List what can be trained."""

    json: bool = False
    """Print JSON instead of a table."""
