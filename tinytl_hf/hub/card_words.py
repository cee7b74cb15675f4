"""What a model card says of an adapter's weights and data, in words that can be public."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlparse

from tinytl_hf.adapter.record import AdapterConfig, DataRecord, InitRecord
from tinytl_hf.data.roles import HOLDOUT
from tinytl_hf.errors import one_line
from tinytl_hf.network.hub_weights import SOURCE
from tinytl_hf.network.weights import is_weights_file
from tinytl_hf.words import counted

LICENCE, UNKNOWN = "apache-2.0", "unknown"  # of an adapter, and of weights; until a person names another
AUTHORS = "Their author's licence:"
HUB_DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)  # an adapter of somebody else's can say anything


def weights_in_words(config: AdapterConfig) -> str:
    """Where the weights come from that an adapter does not hold."""
    name, weights = config.backbone.name, config.backbone.weights
    if config.backbone.sha256 is None:
        return f"That is all of the network, so no other weights are needed.{_beginning_in_words(config)}"
    if is_weights_file(weights):
        source = f"a file, {as_code(Path(weights).name)}, which is not part of this repository"
    elif weights == "none":
        source = "a random generator with a fixed seed"
    elif on_hub := SOURCE.fullmatch(weights):
        repo, revision = on_hub["repo"], on_hub["revision"]
        at = f" at commit {as_code(revision)}" if revision else ""
        source = f"[{repo}](https://huggingface.co/{repo}) on the Hub{at}"
    elif weights.startswith("IMAGENET"):
        source = f"torchvision ({as_code(weights)}, downloaded once)"
    else:
        source = f"the Python package {as_code(weights)}"
    of_file = f" (sha256 of the frozen tensors {as_code(config.backbone.sha256)})" if is_weights_file(weights) else ""
    words = f"The frozen weights of {name} come from {source}, and are checked by their hash{of_file}."
    licence = config.backbone.license
    return words if licence is None else f"{words} {AUTHORS} {escaped(licence)}."


def licence_of(config: AdapterConfig) -> str:
    """The licence in a card's head: ours of what was trained, else that of the weights that an adapter holds whole."""
    ours = config.backbone.sha256 is not None or config.backbone.weights == "none"
    return LICENCE if ours else config.backbone.license or UNKNOWN


def _beginning_in_words(config: AdapterConfig) -> str:
    """Whose weights became those of an adapter that holds the whole network, and under which licence."""
    weights, licence = config.backbone.weights, config.backbone.license
    if weights == "none":
        return " Training began with random ones."
    began = f" Training began with {as_code(Path(weights).name if is_weights_file(weights) else weights)}."
    if licence is None:
        return f"{began} The licence of those weights is not known here: write it in place of `{UNKNOWN}` in the head."
    return f"{began} {AUTHORS} {escaped(licence)}."


def init_in_words(init: InitRecord) -> str:
    """The adapter that training began with."""
    name = as_code(init.source) if init.source else "another adapter"
    return f"{name} ({init.method}, {counted(len(init.label_names), 'class', 'classes')})"


def hub_dataset(data: DataRecord | None) -> str | None:
    """The name of the data set if it was taken from the Hub; old adapters do not say that, and have no link."""
    is_on_hub = data is not None and data.source == "hub" and HUB_DATASET.fullmatch(data.dataset)
    return data.dataset if data is not None and is_on_hub else None


def dataset_name(data: DataRecord | None) -> str:
    """The data set's name, without the path to it, as what is pushed is public."""
    if data is None:
        return "unknown"
    path = urlparse(data.dataset).path if data.source == "url" else data.dataset  # what follows ? can be a secret
    return hub_dataset(data) or Path(path).name or "local data"


def dataset_in_words(data: DataRecord) -> str:
    """The data set, linked where the Hub has it, and without the path to a local one."""
    if on_hub := hub_dataset(data):
        return f"[{on_hub}](https://huggingface.co/datasets/{on_hub})"
    if data.dataset == "digits" and data.source in ("digits", None):
        return "scikit-learn's digits"
    return f"{'data at a URL' if data.source == 'url' else 'local data'}, {as_code(dataset_name(data))}"


def eval_data_in_words(data: DataRecord, count: int) -> str:
    """What it was evaluated on: so many images, or 0 where no run says how many."""
    asked = data.max_eval_samples
    drawn = "" if not asked else "a random image" if asked == 1 else f"a random {asked:,} images"
    subset = f", {drawn} of it" if drawn and count in (0, asked) else ""
    if data.eval_split in (None, HOLDOUT):
        part = f"{100 * data.eval_fraction:g}% of that, or an image of each class, held out"
        split = part if data.eval_split else f"its test or validation split (without one, {part})"
    else:
        split = f"split {as_code(data.eval_split)}"
    return f"evaluated on {split}{subset}"


def escaped(text: object) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#~$&])", r"\\\1", one_line(text)) or "(no name)"


def as_code(text: object) -> str:
    """Text as code within a line of Markdown."""
    return f"`{one_line(text).replace('`', chr(39))}`"
