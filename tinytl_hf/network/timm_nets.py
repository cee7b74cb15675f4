"""The networks of timm by name, and what their weights were trained on; timm is an extra, imported when needed."""

from __future__ import annotations

import difflib
import json
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from tinytl_hf.errors import TinyTLError
from tinytl_hf.network.kinds import class_name
from tinytl_hf.network.same_padding import SameConv2d

PREFIX = "timm/"
LOCAL = "local-dir:"
# Of a saved model's arguments, those that say what it is built with anyway.
OF_NO_CONSEQUENCE = ("num_classes", "in_chans", "drop_rate", "drop_path_rate", "drop_block_rate")


def is_installed() -> bool:
    """Whether the package timm is there."""
    return find_spec("timm") is not None


def require_timm(name: str) -> ModuleType:
    """The package timm.

    Raises:
        TinyTLError: It is not installed.
    """
    if not is_installed():
        raise TinyTLError(f"backbone.name={name}: needs timm; run pip install 'tinytl-hf[timm]' (or pip install timm)")
    import timm

    return timm


def has(name: str) -> bool:
    """Whether timm is there and has a network of that name, with or without a tag."""
    return is_installed() and require_timm(name).is_model(name.partition(".")[0])


def names(asked: str, with_tags: bool = False) -> list[str]:
    """Networks of timm as ``timm/NAME``, or ``timm/NAME.TAG`` for all that it has weights of.

    Raises:
        TinyTLError: No timm; names what was asked for.
    """
    timm = require_timm(asked)
    return [PREFIX + name for name in (timm.list_pretrained() if with_tags else timm.list_models())]


def repos_of_weights(name: str) -> list[str]:
    """Repositories of the Hub with weights of ``timm/NAME``, the default ones first, or of ``timm/NAME.TAG``."""
    short = name.removeprefix(PREFIX)
    timm = require_timm(name)
    every = [short] if "." in short else [short, *timm.list_pretrained(f"{short}.*")]
    repos = [pretrained_cfg(PREFIX + each).hf_hub_id for each in every]
    return list(dict.fromkeys(repo for repo in repos if repo))


def describes(repo: str) -> bool:
    """Whether timm is there and has a description of the weights in a repository of the Hub."""
    return repo.startswith(PREFIX) and has(repo.removeprefix(PREFIX)) and repo in repos_of_weights(architecture(repo))


def architecture(name: str) -> str:
    """``timm/NAME.TAG`` without the tag of its weights, and other names as they are."""
    return name.partition(".")[0] if name.startswith(PREFIX) else name


def current_name(name: str) -> str:
    """``timm/NAME`` as timm calls it today, with a tag for what was in an old name; it describes no old ones.

    Raises:
        TinyTLError: No timm.
    """
    today = require_timm(name).models.get_deprecated_models().get(name.removeprefix(PREFIX))
    return f"{PREFIX}{today}" if today else name


def build(name: str) -> nn.Module:
    """The network ``timm/NAME`` with random weights and timm's own classifier; nothing in it draws random numbers.

    Raises:
        TinyTLError: No timm, or no such network.
    """
    pretrained_cfg(name)
    try:
        network = require_timm(name).create_model(architecture(name).removeprefix(PREFIX), pretrained=False)
    except (AssertionError, RuntimeError, TypeError, ValueError, NotImplementedError, ImportError) as error:
        raise TinyTLError(f"backbone.name={name}: timm cannot build it ({type(error).__name__}: {error})") from error
    for module in network.modules():
        if class_name(type(module)) == "timm.layers.conv2d_same.Conv2dSame":
            module.__class__ = SameConv2d
        elif class_name(type(module)) == "timm.layers.drop.DropPath":
            module.drop_prob = 0.0
        if isinstance(vars(module).get("drop_rate"), float):  # some networks call dropout as a function
            module.drop_rate = 0.0
    return network


def head_name(name: str, backbone: nn.Module) -> str:
    """Name of the classifier, which is a linear layer or a 1x1 convolution.

    Raises:
        TinyTLError: It is something else, which we cannot replace.
    """
    try:
        head = backbone.get_classifier()  # type: ignore[operator]
    except AttributeError as error:  # an encoder, of those that timm has besides classifiers
        raise TinyTLError(
            f"backbone.name={name}: is no classifier; `tinytl-hf backbones` lists what can be trained"
        ) from error
    found = [path for path, module in backbone.named_modules() if module is head]
    linear = type(head) is nn.Linear or class_name(type(head)) == "timm.layers.linear.Linear"
    pointwise = type(head) is nn.Conv2d and head.kernel_size == (1, 1) and head.groups == 1
    if not found or not (linear or pointwise):
        kind = type(head).__name__
        raise TinyTLError(
            f"backbone.name={name}: its classifier is a {kind}, and a linear layer or a 1x1 convolution can be "
            "replaced; `tinytl-hf backbones` lists what can be trained"
        )
    return found[0]


def pretrained_cfg(name: str) -> Any:
    """The description of the weights that ``timm/NAME`` or ``timm/NAME.TAG`` means.

    Raises:
        TinyTLError: No timm, no such network, or no such tag; with names that are close.
    """
    timm = require_timm(name)
    short = name.removeprefix(PREFIX)
    plain, _, tag = short.partition(".")
    if not timm.is_model(plain):
        close = difflib.get_close_matches(plain, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(PREFIX + each for each in close)}?" if close else ""
        raise TinyTLError(
            f"backbone.name={name}: timm has no such network; {hint or '`tinytl-hf backbones` lists them'}"
        )
    tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{plain}.*")]
    if tag and tag not in tags:
        hint = f"its tags are {', '.join(tags)}" if tags else f"it has none at all; use {PREFIX}{plain}"
        raise TinyTLError(f"backbone.name={name}: timm has no such weights of {plain}; {hint}")
    cfg = timm.get_pretrained_cfg(short)
    return cfg if cfg is not None else timm.models.PretrainedCfg(architecture=plain)


def read_model_config(path: Path, source: str) -> tuple[str, dict[str, Any]]:
    """What the ``config.json`` of a timm model says: the network's name, and the description of its weights.

    Raises:
        TinyTLError: No such file, or not a model that timm builds by its name alone.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TinyTLError(
            f"backbone.name={source}: {path.name} cannot be read ({error}); name a timm model"
        ) from error
    name = values.get("architecture") if isinstance(values, dict) else None
    if not isinstance(name, str) or not name.isidentifier():
        raise TinyTLError(f"backbone.name={source}: its {path.name} names no timm architecture; name a timm model")
    cfg, arguments = values.get("pretrained_cfg", values), values.get("model_args") or {}
    if not isinstance(cfg, dict) or not isinstance(arguments, dict):
        raise TinyTLError(f"backbone.name={source}: its {path.name} is damaged; name another model")
    if odd := sorted(arguments.keys() - set(OF_NO_CONSEQUENCE)):
        raise TinyTLError(
            f"backbone.name={source}: is {name} with {', '.join(odd)} of its own, and only networks that timm builds "
            f"by their name are supported; use {PREFIX}{name}"
        )
    return PREFIX + name, cfg
