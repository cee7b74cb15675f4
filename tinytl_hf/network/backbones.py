"""Backbones: a name and a source of weights become a network with a new head, its preprocessing and its provenance.

A name says the architecture, a source says where the tensors come from. torchvision's names are plain; timm's are
``timm/NAME`` or ``timm/NAME.TAG``, where the tag names weights. ``hf-hub:user/repo`` and ``local-dir:PATH`` stand for
both at once, and are taken apart.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from tinytl_hf.config.data import MAX_IMAGE_SIZE, TOTAL_STRIDE
from tinytl_hf.disk import expanded
from tinytl_hf.errors import TinyTLError
from tinytl_hf.network import hub_weights, proxylessnas, timm_nets, torchvision_nets
from tinytl_hf.network.head import Head, PointwiseHead
from tinytl_hf.network.hub_weights import HUB
from tinytl_hf.network.no_values import NoRandomValues
from tinytl_hf.network.timm_nets import LOCAL, PREFIX
from tinytl_hf.network.weights import (
    WHEELS,
    copy_weights,
    is_weights_file,
    read_file,
    read_wheel,
    renamed,
    tensor_names,
)

logger = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Interpolation = Literal["bilinear", "bicubic"]

# Networks that the two libraries have with the same tensors in the same order, under other names, and which give the
# same outputs. (Those of ResNet and ConvNeXt have the same names as well.)
SAME_TENSORS = {
    "mobilenet_v2": "timm/mobilenetv2_100",
    "efficientnet_b0": "timm/efficientnet_b0",
    "mnasnet1_0": "timm/mnasnet_100",
}
SAME_TENSORS |= {theirs: ours for ours, theirs in SAME_TENSORS.items()}

_taken: set[tuple[str, int]] = set()  # names of networks, and sizes of images that ran through them


@dataclass(frozen=True)
class Backbone:
    """A network, where its weights come from, and what images they were trained on.

    Attributes:
        name: torchvision's name, or ``timm/NAME`` with the tag of its weights, if any.
        weights: Source of the weights, such that a later load gets the same ones.
        mean: Mean of each RGB channel, on a scale of 0 to 1.
        std: Standard deviation of each RGB channel, on the same scale.
        crop_pct: Side of the centre crop as a share of the image's shorter side.
        interpolation: How images are resized.
        license: Licence of the weights as their author names it; None where it is not known.
    """

    name: str
    weights: str
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    crop_pct: float = 0.875
    interpolation: Interpolation = "bilinear"
    license: str | None = None


def find_backbone(name: str, weights: str, **download: Any) -> Backbone:
    """Say what a name and a source stand for; weights on the Hub are downloaded, which pins them to their commit.

    Args:
        name: See :class:`~tinytl_hf.config.network.BackboneConfig`.
        weights: See there.
        **download: Options of a download, see :data:`~tinytl_hf.network.hub_weights.OPTIONS`.

    Raises:
        TinyTLError: An unknown network, or a source that cannot be had.
    """
    if name.startswith(HUB) or name.startswith(LOCAL):
        return _of_saved_model(name, weights, download)
    if name == proxylessnas.NAME:
        return Backbone(name, pin_weights(name, weights, **download))
    if not name.startswith(PREFIX) and not torchvision_nets.has(name) and timm_nets.has(name):
        logger.info("backbone.name=%s: torchvision has no such network; timm's is taken", name)
        name = PREFIX + name
    if not name.startswith(PREFIX):
        torchvision_nets.check(name)
        source = pin_weights(name, weights, **download)
        found = Backbone(name, source, **torchvision_nets.mean_and_std(name, source))
        repo = _timms_repo(name, weights)
        return found if repo is None else _described(found, vars(timm_nets.pretrained_cfg(repo)))
    if (today := timm_nets.current_name(name)) != name:
        logger.info("backbone.name=%s: timm calls it %s today, which is taken", name, today)
        name = today
    cfg = timm_nets.pretrained_cfg(name)
    if (repo := _timms_repo(name, weights)) is not None:
        cfg = timm_nets.pretrained_cfg(repo)  # these weights' own, not that of the default ones or of another tag
        name = repo if same_network(repo, name) else name
    if weights == "imagenet" and "." not in name and cfg.tag and cfg.hf_hub_id:
        name = f"{name}.{cfg.tag}"
    return _described(Backbone(name, pin_weights(name, weights, **download)), vars(cfg))


def _timms_repo(name: str, weights: str) -> str | None:
    """The repository on the Hub that a source of weights names, if timm has a description of what is in it.

    Of a repository without one, and of one with the weights of another network, this is logged.
    """
    if not weights.startswith(HUB):
        return None
    repo = weights.removeprefix(HUB).partition("@")[0]
    if not timm_nets.describes(repo):
        logger.info(
            "backbone.weights=%s: images are normalised, cropped and resized as for %s; of a timm model, "
            "backbone.name=%s takes what its config says",
            *(weights, name, weights),
        )
        return None
    architecture = timm_nets.architecture(repo)
    if architecture not in (timm_nets.architecture(name), f"{PREFIX}{name}", SAME_TENSORS.get(name)):
        logger.warning("backbone.weights=%s: are weights of %s, and the network is %s", weights, architecture, name)
    return repo


def pin_weights(name: str, weights: str, **download: Any) -> str:
    """A source of weights such that a later load gets the same ones.

    ``imagenet`` becomes the name of torchvision's best weights today or, of a timm network, ``hf-hub:timm/NAME.TAG``,
    and what is on the Hub gets its commit.

    Raises:
        TinyTLError: There are no such weights, or they cannot be had.
    """
    return locate_weights(name, weights, **download)[0]


def locate_weights(name: str, weights: str, **download: Any) -> tuple[str, str]:
    """A source as of :func:`pin_weights`, and where it is: of weights on the Hub, the file in the client's cache."""
    source = _of_library(name) if weights == "imagenet" else weights
    if is_weights_file(source) and expanded(source).is_file():
        # Absolute, so that it is found from another folder; not resolved, as the target of a link has another name.
        source = str(expanded(source).absolute())
    if not source.startswith(HUB):
        return source, source
    path = hub_weights.fetch(source, **download)
    return hub_weights.pinned(source, path), str(path)


def _of_library(name: str) -> str:
    """The source that ``imagenet`` stands for."""
    if name == proxylessnas.NAME:
        raise TinyTLError(
            f"backbone.weights=imagenet: nobody serves weights of {name} as safetensors; name the authors' file "
            "(proxyless_mobile of mit-han-lab/proxylessnas), or use none"
        )
    if not name.startswith(PREFIX):
        return torchvision_nets.best_weights(name)
    repo = timm_nets.pretrained_cfg(name).hf_hub_id
    if not repo:
        raise TinyTLError(f"backbone.weights=imagenet: the Hub has no weights of {name}; name a file, or use none")
    return f"{HUB}{repo}"


def create_backbone(name: str, weights: str, num_classes: int, dropout: float = 0.0) -> nn.Module:
    """Build a classifier with pretrained weights and a new head.

    The network's own dropout and stochastic depth are switched off: what regularises is an option of ours.

    Args:
        name: torchvision's name of the network, or timm's as ``timm/NAME`` or ``timm/NAME.TAG``.
        weights: Source of the weights, see :class:`~tinytl_hf.config.network.BackboneConfig`.
        num_classes: Outputs of the new head.
        dropout: Dropout of the new head.

    Raises:
        TinyTLError: Unknown network or source, or weights that do not fit the network.
    """
    library = _library(name)
    with torch.random.fork_rng(devices=[]), nullcontext() if weights == "none" else NoRandomValues():
        # Weights "none" are the same each time, so that their adapters load. Other devices keep their states.
        torch.default_generator.manual_seed(0)
        backbone = library.build(name)
    for module in backbone.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d, StochasticDepth)):
            module.p = 0.0
    head_name = library.head_name(name, backbone)
    if weights != "none":
        copy_weights(backbone, _read_weights(name, weights, backbone, head_name), head_name, source=weights)
    old_head = backbone.get_submodule(head_name)
    if isinstance(old_head, nn.Conv2d):
        backbone.set_submodule(head_name, PointwiseHead(old_head.in_channels, num_classes, dropout))
    else:
        assert isinstance(old_head, nn.Linear)
        backbone.set_submodule(head_name, Head(old_head.in_features, num_classes, dropout))
    if library is timm_nets:
        backbone.num_classes = num_classes  # where timm's networks say it
    return backbone


def same_network(one: str, other: str) -> bool:
    """Whether two names stand for one architecture."""
    return timm_nets.architecture(one) == timm_nets.architecture(other)


def check_size(name: str, option: str, size: int) -> None:
    """Raise unless images of ``size`` px leave at least one pixel of the last map, and are not too large.

    Args:
        name: The network's name.
        option: The option that has the size.
        size: Side of the images in px.

    Raises:
        TinyTLError: They do not, or are.
    """
    if size < TOTAL_STRIDE:
        raise TinyTLError(f"{option}={size}: {name} reduces an image {TOTAL_STRIDE} times; use {TOTAL_STRIDE} or more")
    if size > MAX_IMAGE_SIZE:
        raise TinyTLError(f"{option}={size}: use {MAX_IMAGE_SIZE} or less")


def check_takes(name: str, backbone: nn.Module, option: str, size: int) -> None:
    """Raise unless an image of ``size`` px runs through a network, whatever is in place of its head.

    Some networks want larger images than their stride, or multiples of it, or those of one size.

    Args:
        name: Its name, of which one that ran is remembered, with the size.
        backbone: The network; it stays as it was.
        option: The option that has the size.
        size: Side of the images in px.

    Raises:
        TinyTLError: It does not, with the next size that does.
    """
    if not takes(name, backbone, size):
        end = input_size(name)
        steps = range(TOTAL_STRIDE * (size // TOTAL_STRIDE + 1), end, TOTAL_STRIDE)
        works = next((step for step in steps if takes(name, backbone, step)), end)
        raise TinyTLError(f"{option}={size}: {name} takes no images of that size; use {works}")


def input_size(name: str) -> int:
    """Side of the images that the weights of a network were made for, in px."""
    if name.startswith(PREFIX):
        return int(timm_nets.pretrained_cfg(name).input_size[-1])
    return torchvision_nets.input_size(name) if torchvision_nets.has(name) else proxylessnas.INPUT_SIZE


def takes(name: str, backbone: nn.Module, size: int) -> bool:
    """Whether an image of ``size`` px runs through a network, as :func:`check_takes` tries it."""
    if size == input_size(name) or (name, size) in _taken:
        return True
    like, was_training = next(backbone.parameters()), backbone.training
    try:
        with torch.no_grad():
            backbone.eval()(torch.zeros(1, 3, size, size).to(like))
    except (RuntimeError, AssertionError, ValueError):  # of a kernel, of a network that checks, and of its arithmetic
        return False
    finally:
        backbone.train(was_training)
    _taken.add((name, size))
    return True


def sha256(tensors: Mapping[str, Tensor]) -> str | None:
    """Hash names, types, shapes and bytes of ``tensors``; None where there are none."""
    if not tensors:
        return None
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _of_saved_model(name: str, weights: str, download: Mapping[str, Any]) -> Backbone:
    """A timm model in a folder or a repository, taken apart into architecture and weights."""
    if name.startswith(HUB):
        path = hub_weights.fetch(name, hub_weights.CONFIG_FILE, **download)
        own = hub_weights.pinned(name, path)
    else:
        path = expanded(name.removeprefix(LOCAL)).resolve() / hub_weights.CONFIG_FILE
        own = str(path.with_name(hub_weights.WEIGHTS_FILE))
    architecture, cfg = timm_nets.read_model_config(path, name)
    timm_nets.pretrained_cfg(architecture)
    source = own if weights == "imagenet" else weights
    found = Backbone(architecture, pin_weights(architecture, source, **download))
    return _described(found, cfg)


def _described(backbone: Backbone, cfg: Mapping[str, Any]) -> Backbone:
    """With the preprocessing and the licence of timm's description of the weights."""
    values = {key: cfg[key] for key in ("mean", "std") if cfg.get(key) is not None}
    try:
        found = {key: tuple(map(float, value)) for key, value in values.items()}
        crop_pct = float(cfg.get("crop_pct") or backbone.crop_pct)
    except (TypeError, ValueError) as error:
        raise TinyTLError(f"backbone.name={backbone.name}: its description is damaged ({error})") from error
    if any(len(value) != 3 for value in found.values()) or not math.isfinite(crop_pct):
        raise TinyTLError(f"backbone.name={backbone.name}: is not for RGB images; use another")
    if large := {key: value for key, value in found.items() if max(value) > 1}:
        raise TinyTLError(
            f"backbone.name={backbone.name}: its description has {large}, and pixels are on a scale of 0 to 1; mend "
            "its config.json (numbers for pixels up to 255, divided by 255)"
        )
    if crop_pct > 1:
        logger.info("%s was evaluated with crop_pct %g, so with a border; 1 is taken here", backbone.name, crop_pct)
    if (mode := cfg.get("crop_mode") or "center") != "center":
        logger.info("%s was evaluated with crop_mode %s; a centre crop is taken here", backbone.name, mode)
    resized = cfg.get("interpolation") or "bicubic"
    if resized not in ("bilinear", "bicubic"):
        logger.info("%s was evaluated with %s resizing; bicubic is taken here", backbone.name, resized)
    named = cfg.get("license")
    return replace(
        backbone,
        **found,  # type: ignore[arg-type]
        crop_pct=min(crop_pct, 1.0),
        interpolation="bilinear" if resized == "bilinear" else "bicubic",
        license=named if isinstance(named, str) else None,
    )


def _read_weights(name: str, weights: str, backbone: nn.Module, head: str) -> Mapping[str, Tensor]:
    """Tensors under the names of ``backbone``, if they are those of this network or of its twin."""
    architecture = timm_nets.architecture(name)
    if weights in WHEELS:
        return read_wheel(weights, architecture, backbone, head)
    source, path = locate_weights(name, weights)
    if is_weights_file(source) or source.startswith(HUB):
        tensors = read_file(expanded(path))
        if name == proxylessnas.NAME:
            return proxylessnas.from_authors(tensors)
        return _translated(tensors, architecture, backbone)
    # Else a name of torchvision's weights, which serve timm's twin of the network too.
    network = architecture
    if network.startswith(PREFIX):
        network = SAME_TENSORS.get(network, network.removeprefix(PREFIX))
    names = torchvision_nets.weights_names(network) if torchvision_nets.has(network) else []
    if source not in names:
        own_wheels = [wheel for wheel, known in WHEELS.items() if architecture in known.networks]
        of_hub = "hf-hub:user/repo"
        raise TinyTLError(
            f"backbone.weights={weights}: use {', '.join(['imagenet', *names, *own_wheels, 'none', of_hub])}, or the "
            "path of a .safetensors, .pth, .pt or .bin file"
        )
    return _translated(torchvision_nets.download(network, source), architecture, backbone)


def _translated(tensors: Mapping[str, Tensor], architecture: str, backbone: nn.Module) -> Mapping[str, Tensor]:
    """``tensors`` under our names, if they are those of the network's twin in the other library."""
    tensors = torchvision_nets.as_named_today(tensors)
    twin = SAME_TENSORS.get(architecture)
    if twin is None or set(tensor_names(backbone)) & tensors.keys() or not _can_build(twin):
        return tensors
    with torch.device("meta"):
        theirs = _library(twin).build(twin)
    return renamed(tensors, theirs, backbone) if set(tensor_names(theirs)) & tensors.keys() else tensors


def _library(name: str) -> ModuleType:
    """The module that builds a network of that name."""
    if name == proxylessnas.NAME:
        return proxylessnas
    return timm_nets if name.startswith(PREFIX) else torchvision_nets


def _can_build(name: str) -> bool:
    return timm_nets.has(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else torchvision_nets.has(name)
