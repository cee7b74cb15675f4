"""Where the images of a run come from, and how they become batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tinytl_hf.config.check import check, check_types, expand_paths

MAX_IMAGE_SIZE = 2048  # px
TOTAL_STRIDE = 32  # of the backbones, in px; at sizes in between, their maps have odd sides and shift


@dataclass(frozen=True)
class DataConfig:
    """Where images and labels come from, and how they become batches."""

    dataset: str = ""
    """What to train on: a local folder (of images, of tables in the Hub's layout, or a saved Dataset), a .parquet,
    .csv or .json file, its URL, a pattern of such files, a Hub id, or digits (scikit-learn's 1,797 handwritten
    digits). What is on this disk comes before what is on the Hub."""
    subset: str | None = None
    """Name of the data set's configuration, for data sets that have several."""
    image_column: str | None = None
    """Column that holds the images; null: the one column of images, else of bytes or paths of
    such."""
    label_column: str | None = None
    """Column that holds the labels; null: label, else the one ClassLabel column, else the one of
    strings. For a folder of images: a column of its metadata.csv."""
    train_split: str = "train"
    """Split to train on."""
    eval_split: str | None = None
    """Split to evaluate on after each epoch, by which the best is chosen; null: validation, else test, else a part
    held out of the train split, and with both validation and test the latter is evaluated on once, at the end;
    holdout: always that part."""
    eval_fraction: float = 0.1
    """Share of the train split that is held out (stratified by label) where no other split is used, or an image of
    each class where that is more."""
    split_seed: int = 0
    """Seed of the held-out part and of the subsets, apart from the run's seed so that runs can be compared."""
    max_train_samples: int | None = None
    """Train on a random subset of this many images; null: all."""
    max_eval_samples: int | None = None
    """Evaluate on a random subset of this many images; null: all."""
    train_size: int = 224
    """Side of the training images, in px."""
    start_size: int | None = None
    """Side in the first epoch, from which it grows by epoch, in multiples of 32 px, to data.train_size in the last:
    smaller images train faster, and early epochs can do with them (Tan and Le 2021, section 4); null:
    data.train_size."""
    eval_size: int | None = None
    """Side of the images at evaluation and in use, in px; null: data.train_size. Random crops enlarge what they
    show, so a network that trained on them sees things at their usual size in somewhat larger images (Touvron et
    al. 2019)."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Training: least and greatest share of an image's area in the random resized crop, of a shape from 3:4 to 4:3.
    What of it does not fit into an image is cut off: of square images, [1, 1] shows 0.87 to 1."""
    flip: bool = True
    """Training: mirror half of the images."""
    auto_augment: Literal["none", "trivial"] = "none"
    """Training: trivial changes each crop by one operation at random strength (TrivialAugment, Mueller and Hutter
    2021). Not in the last fifth of the epochs, which see images as they are (in all of one or two epochs)."""
    crop_pct: float | None = None
    """Evaluation: side of the centre crop as a share of the image's shorter side; null: as the backbone's weights have
    it (0.875 for torchvision's)."""
    skip_corrupt: bool = False
    """Leave out images that cannot be read and report how many (true), or stop at the first (false)."""
    max_megapixels: int | None = None
    """Largest image that is read, in megapixels: what is larger is taken for an attack; null: 178, as in Pillow."""
    memory_limit_mb: int = 2048
    """Decoded images of a split stay in memory up to this many MB, once for all processes of a machine; larger ones
    stream through workers."""
    workers: int = 2
    """Worker processes that decode the images of a set that streams; 0: the training process does."""

    def __post_init__(self) -> None:
        expand_paths(self, "dataset")
        check_types(self, "data.")
        for name in ("train_size", "start_size", "eval_size"):
            size = getattr(self, name)
            check(size is None or size >= 1, f"data.{name}", size, "use a size in px, such as 224")
        start, end = self.start_size, self.train_size
        check(start is None or start <= end, "data.start_size", start, f"use at most data.train_size={end}")
        steps = start is None or start % TOTAL_STRIDE == 0
        check(steps, "data.start_size", start, f"use a multiple of {TOTAL_STRIDE}")
        check(0 < self.eval_fraction < 1, "data.eval_fraction", self.eval_fraction, "use a share above 0 and below 1")
        low, high = self.crop_scale
        fix = "use two shares with 0 < least <= greatest <= 1"
        check(0 < low <= high <= 1, "data.crop_scale", [low, high], fix)
        is_share = self.crop_pct is None or 0 < self.crop_pct <= 1
        check(is_share, "data.crop_pct", self.crop_pct, "use a share above 0, at most 1")
        check(0 <= self.split_seed < 2**32, "data.split_seed", self.split_seed, "use 0 or more, below 2**32")
        check(self.workers >= 0, "data.workers", self.workers, "use 0 or more")
        for name in ("max_megapixels", "max_train_samples", "max_eval_samples"):
            count = getattr(self, name)
            check(count is None or count >= 1, f"data.{name}", count, "use 1 or more, or null for the default")
