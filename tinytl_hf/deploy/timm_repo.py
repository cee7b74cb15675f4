"""Format ``timm``: a folder that timm and transformers load, for methods without lite residuals."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from safetensors import SafetensorError
from torch import Tensor, nn

from tinytl_hf.adapter.format import CARD_FILE
from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.export import ExportConfig
from tinytl_hf.deploy.check import compare, evaluation_images
from tinytl_hf.deploy.exported import Deployed, check_output, no_room, require, write_files
from tinytl_hf.disk import check_ours
from tinytl_hf.errors import TinyTLError, quoted
from tinytl_hf.hub.card import BEGIN, END, has_our_part, read_card, update_card
from tinytl_hf.hub.card_words import UNKNOWN, escaped
from tinytl_hf.hub.transfer import TIMM_FILES
from tinytl_hf.model import TinyTLModel
from tinytl_hf.network.backbones import SAME_TENSORS
from tinytl_hf.network.methods import METHODS
from tinytl_hf.network.timm_nets import PREFIX, architecture

CARD = """---
{metadata}
---

{begin}
# {name}, fine-tuned with tinytl_hf

{method} on {backbone}: {count} classes ({labels}), {size} px.

Its weights hold those of the backbone, {licence}.

```python
import timm

model = timm.create_model("hf-hub:user/name", pretrained=True).eval()
```

transformers loads it as well: `pipeline("image-classification", model="user/name")`.
{end}
"""
SHOWN_LABELS = 20
# What the card of an export holds; another folder can have a file of its name, such as a project's own README.md.
MARK = "fine-tuned with tinytl_hf"


def export_timm(model: TinyTLModel, config: ExportConfig, data: DataConfig) -> str:
    """Write ``config.json``, ``model.safetensors`` and a card once timm's own network gives the model's logits.

    Returns:
        What was written, how to load it, and what was measured.

    Raises:
        TinyTLError: The method or the backbone does not fit, timm is missing, the logits differ, or the folder
            holds another's files or cannot be written.
    """
    name = _check_fits(model)
    timm = require("timm", "timm")
    path = check_output(config)
    _check_is_export(path)
    images = evaluation_images(model, data, config.check_images)
    deployed = Deployed(model)
    network = timm.create_model(name, pretrained=False, num_classes=len(model.label_names))
    _fill(network, deployed.backbone.state_dict(), model.config.backbone.name, name)
    with ExitStack() as held:
        try:
            folder = held.enter_context(tempfile.TemporaryDirectory(prefix="tinytl-timm-"))
            _save(timm, network, model, Path(folder))
        except (OSError, SafetensorError) as error:
            raise no_room(f"output={path}", error) from error
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        comparison = compare("timm", model, deployed, lambda inputs: loaded(torch.from_numpy(inputs)).numpy(), images)
        comparison.check()
        files = {file: (Path(folder) / file).read_bytes() for file in TIMM_FILES}
    if (card := read_card(path)) and has_our_part(card):  # with what a person wrote around it
        files[CARD_FILE] = update_card(card, files[CARD_FILE].decode()).encode()
    write_files(path, {path / file: content for file, content in files.items()})
    size = len(files["model.safetensors"]) / 1e6
    return (
        f"{path}: {size:.2f} MB, timm's {name}; load it with timm.create_model({quoted(f'local-dir:{path}')}, "
        f"pretrained=True), and push it with tinytl-hf push --adapter {shlex.quote(str(path))} --repo user/name\n"
        f"{comparison}"
    )


def _check_is_export(path: Path) -> None:
    """Raise if a folder holds files of these names that no export wrote, of which the card alone surely tells."""
    check_ours("output", path / CARD_FILE, MARK)
    others = [file for file in TIMM_FILES if os.path.lexists(path / file)]
    if others and CARD_FILE not in others:
        raise TinyTLError(
            f"output={path}: holds a {others[0]} without the {CARD_FILE} of an export, so it may be another's; name "
            "another folder"
        )


def _check_fits(model: TinyTLModel) -> str:
    """Timm's name of the network."""
    record, method = model.config.backbone, model.config.method
    if METHODS[method].lite_residual:
        raise TinyTLError(
            f"format=timm: {method} adds lite residuals, which timm's networks lack; use --format onnx, or tinytl-hf "
            "merge for one file of weights"
        )
    if record.name.startswith(PREFIX):
        return architecture(record.name).removeprefix(PREFIX)
    if record.name in SAME_TENSORS:
        return SAME_TENSORS[record.name].removeprefix(PREFIX)
    if record.name.startswith(("resnet", "wide_resnet", "resnext")):
        return record.name
    twins = ", ".join(sorted(name for name in SAME_TENSORS if not name.startswith(PREFIX)))
    raise TinyTLError(
        f"format=timm: timm has no network with the tensors of torchvision's {record.name}; use --format onnx, or "
        f"train {twins}, a ResNet or a timm/ backbone"
    )


def _fill(network: nn.Module, tensors: dict[str, Tensor], ours: str, theirs: str) -> None:
    """Copy the weights by name or, between the two libraries' twins, by position."""
    own = network.state_dict()
    if own.keys() != tensors.keys():
        same = [tensor.shape for tensor in own.values()] == [tensor.shape for tensor in tensors.values()]
        if not same:
            raise TinyTLError(
                f"format=timm: the tensors of {ours} are not those of timm's {theirs}; use --format onnx"
            )
        tensors = dict(zip(own, tensors.values(), strict=True))
    network.load_state_dict(tensors)


def _save(timm: Any, network: Any, model: TinyTLModel, folder: Path) -> None:
    options, labels = model.config.preprocessing, model.label_names
    licence = model.config.backbone.license  # of the weights, nearly all of which another trained
    about = {"label_names": labels, "pretrained_cfg": {} if licence is None else {"license": licence}}
    size = (3, options.eval_size, options.eval_size)
    view = {"input_size": size, "crop_pct": options.crop_pct, "interpolation": options.interpolation}
    view |= {"mean": options.mean, "std": options.std, "crop_mode": "center"}  # the network's own can be another
    network.pretrained_cfg = {
        key: value
        for key, value in network.pretrained_cfg.items()
        if not key.startswith(("test_", "tag", "origin", "license"))
    }
    timm.models.save_for_hf(network, str(folder), model_config=about, safe_serialization=True, data_config=view)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    written.pop("model_args", None)  # the number of classes again: transformers would pass it on twice
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    shown = ", ".join(map(escaped, labels[:SHOWN_LABELS])) + ", ..." * (len(labels) > SHOWN_LABELS)
    tags = ["image-classification", "timm", "tinytl", model.config.method]
    metadata = ModelCardData(
        library_name="timm", license=licence or UNKNOWN, pipeline_tag="image-classification", tags=tags
    )
    backbone = model.config.backbone.name
    text = CARD.format(
        metadata=metadata.to_yaml(),
        begin=BEGIN,
        end=END,
        name=written["architecture"],
        method=model.config.method,
        backbone=backbone,
        count=len(labels),
        labels=shown,
        size=options.eval_size,
        licence="whose licence is not known here: write it above in place of `unknown`"
        if licence is None
        else f"under {licence}",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
