"""The seven train methods: which parameters train, and what each norm layer does.

``apply_method`` is the only place that sets ``requires_grad``. It gives every parameter one role and the
method says which roles train, so the optimizer, the adapter file and the counts all follow from it. The names of those
that train are kept with the network: a user can freeze some of them, and they are the adapter's still.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from numbers import Real
from typing import Any

from torch import Tensor, nn

from tinytl_hf.config.check import check
from tinytl_hf.config.network import METHOD_ALIASES, LiteConfig, MethodName
from tinytl_hf.config.train import LrFactors
from tinytl_hf.errors import TinyTLError
from tinytl_hf.network.blocks import TinyTLBlock, add_lite_residuals, name_unknown_blocks
from tinytl_hf.network.head import Head
from tinytl_hf.network.kinds import class_name
from tinytl_hf.network.lite_residual import LiteResidual
from tinytl_hf.network.norms import FrozenBatchNorm2d, GlobalBatchNorm2d, has_batch_statistics, replace_batch_norms
from tinytl_hf.network.parts import check_parts
from tinytl_hf.network.trained_blocks import last_blocks, prefix_modules

logger = logging.getLogger(__name__)


class Role(Enum):
    """What a parameter is, as far as the methods care.

    Layer scales (ConvNeXt's, say), a factor for each channel of what a block adds to its input, have the role of a
    norm's scale: in other networks the last norm of a block does their work.
    """

    HEAD = "head"
    LITE = "lite residual"
    LITE_LAST_SCALE = "scale of a lite residual's last norm"
    LITE_LAST_BIAS = "bias of a lite residual's last norm"
    NORM_SCALE = "norm scale"
    NORM_BIAS = "norm bias"
    BIAS = "bias"
    WEIGHT = "weight"


BACKBONE = {Role.NORM_SCALE, Role.NORM_BIAS, Role.BIAS, Role.WEIGHT}
LITE = {Role.LITE, Role.LITE_LAST_SCALE}


@dataclass(frozen=True)
class Method:
    """One row of the methods table.

    Attributes:
        trains: Roles of the parameters that train.
        batch_statistics: Whether the backbone's norms use batch statistics and update their running ones.
        lite_residual: Whether each block gets a lite residual.
    """

    trains: frozenset[Role]
    batch_statistics: bool = False
    lite_residual: bool = False


METHODS: dict[str, Method] = {
    "FT-Last": Method(frozenset({Role.HEAD})),
    "TinyTL-B": Method(frozenset({Role.HEAD, Role.BIAS, Role.NORM_BIAS})),
    "TinyTL-L": Method(frozenset({Role.HEAD, *LITE, Role.LITE_LAST_BIAS}), lite_residual=True),
    # The bias of the lite residual's last norm would duplicate the block's own, so it stays at zero.
    "TinyTL-L+B": Method(frozenset({Role.HEAD, *LITE, Role.BIAS, Role.NORM_BIAS}), lite_residual=True),
    "FT-Norm+Last": Method(frozenset({Role.HEAD, Role.NORM_SCALE, Role.NORM_BIAS}), batch_statistics=True),
    "FT-Full": Method(frozenset({Role.HEAD, *BACKBONE}), batch_statistics=True),
    "FT-Layerwise": Method(frozenset({Role.HEAD, *BACKBONE}), batch_statistics=True),
}


# What each of the learning rates by role is of.
FACTOR_ROLES: dict[str, frozenset[Role]] = {
    "head": frozenset({Role.HEAD}),
    "lite": frozenset({Role.LITE}),
    "lite_last_norm": frozenset({Role.LITE_LAST_SCALE, Role.LITE_LAST_BIAS}),
    "biases": frozenset({Role.NORM_BIAS, Role.BIAS}),
}

# The layer scale of classes that have one, by their full name.
LAYER_SCALES = {
    "torchvision.models.convnext.CNBlock": "layer_scale",
    "timm.models.convnext.ConvNeXtBlock": "gamma",
    "timm.models.mambaout.GatedConvBlock": "gamma",
    "timm.models.metaformer.Scale": "scale",
    "timm.models.fastvit.LayerScale2d": "gamma",
    "timm.models.inception_next.MetaNeXtBlock": "gamma",
    "timm.layers.layer_scale.LayerScale": "gamma",
    "timm.layers.layer_scale.LayerScale2d": "gamma",
}

# Norms that are no subclasses of PyTorch's, by their full name; none has statistics of the batch.
NORMS_OF_TIMM = {
    "timm.layers.grn.GlobalResponseNorm",
    "timm.layers.norm.RmsNorm2d",
    "timm.layers.norm.SimpleNorm2d",
}

LAYERWISE_LAST_BLOCKS = 5
LAYERWISE_LAST_SCALE = 0.6
LAYERWISE_REST_SCALE = 0.4


def by_name(name: str) -> MethodName:
    """The method of this name, or of this name of the old script.

    Raises:
        TinyTLError: There is none.
    """
    method = METHOD_ALIASES.get(name, name) if isinstance(name, str) else None
    if method not in METHODS:
        raise TinyTLError(f"method={name}: use one of {', '.join(METHODS)}")
    return method  # type: ignore[return-value]


def possible_methods(has_blocks: bool) -> list[str]:
    """Those that can train a backbone with residual blocks, or with none: then, not those that are about blocks."""
    return [name for name, plan in METHODS.items() if has_blocks or not (plan.lite_residual or name == "FT-Layerwise")]


def apply_method(
    backbone: nn.Module,
    blocks: dict[str, TinyTLBlock],
    method: MethodName,
    train_size: int,
    lite: LiteConfig,
    trained_blocks: int | None = None,
) -> None:
    """Make ``backbone`` train by ``method``, in place.

    Args:
        backbone: A network whose last layer is a :class:`~tinytl_hf.network.head.Head`.
        blocks: Its residual blocks.
        method: One of ``METHODS``.
        train_size: Side of the training images in px, to which the lite residuals are fitted.
        lite: Options of the lite residuals.
        trained_blocks: Only that many of the last blocks, and what follows them, train; None: all.

    Raises:
        TinyTLError: The backbone has no such blocks where the method needs them, or a parameter of unknown role.
    """
    plan = METHODS[method]
    if method not in (possible := possible_methods(bool(blocks))):
        raise TinyTLError(
            f"method={method}: this backbone has no residual blocks of a kind that is known here; it supports "
            f"{', '.join(possible[:-1])} and {possible[-1]}"
        )
    prefix = prefix_modules(backbone, blocks, trained_blocks)
    untrained = {parameter for part in prefix for parameter in part.parameters()}
    replace_batch_norms(backbone, GlobalBatchNorm2d if plan.batch_statistics else FrozenBatchNorm2d, prefix)
    if plan.lite_residual:
        add_lite_residuals(backbone, last_blocks(blocks, trained_blocks), train_size, lite)
    roles = parameter_roles(backbone)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(roles[name] in plan.trains and parameter not in untrained)
    _remember_trained(backbone, roles)


def _remember_trained(backbone: nn.Module, roles: Mapping[str, Role]) -> None:
    """Note what the method trains and what it freezes, for :func:`trained_names` and :func:`check_trained`."""
    trained = frozenset(name for name, parameter in backbone.named_parameters() if parameter.requires_grad)
    # Plain attributes, so that copies of the network have them. Frozen parameters are noted by the module and the name
    # there, as another tensor can be put in their place.
    vars(backbone)["trained_names"] = trained
    vars(backbone)["frozen_places"] = [
        (module, own_name, name)
        for prefix, module in backbone.named_modules()
        for own_name in module._parameters
        if (name := f"{prefix}.{own_name}".lstrip(".")) in roles and name not in trained
    ]


def name_what_stays(backbone: nn.Module, blocks: dict[str, TinyTLBlock], method: MethodName) -> None:
    """Warn of blocks without lite residuals, beside those that have them, and where nothing but the head trains.

    That is so by ``FT-Norm+Last`` without norms.
    """
    name_unknown_blocks(backbone, blocks)
    if METHODS[method].trains != {Role.HEAD} and not trained_names(backbone) - _of_head(backbone):
        logger.warning(
            "method=%s: what trains of this backbone is the head alone, as by FT-Last; the rest has nothing that it "
            "trains",
            method,
        )


def _of_head(backbone: nn.Module) -> set[str]:
    return {name for name, role in parameter_roles(backbone).items() if role is Role.HEAD}


def trained_names(backbone: nn.Module) -> frozenset[str]:
    """Names of the parameters that the method trains, whoever freezes some of them afterwards."""
    names: frozenset[str] = vars(backbone)["trained_names"]
    return names


def weights_of(backbone: nn.Module) -> list[Tensor]:
    """All that are parameters of a backbone, some of them buffers by now: frozen weights that are stored as int8."""
    frozen = (module._buffers.get(own_name) for module, own_name, _ in vars(backbone)["frozen_places"])
    return [*backbone.parameters(), *(weight for weight in frozen if weight is not None)]


def trained_share(backbone: nn.Module) -> str:
    """How many parameters train, of all that a backbone has, in the words of PEFT's models."""
    trained = sum(parameter.numel() for parameter in backbone.parameters() if parameter.requires_grad)
    total = sum(weight.numel() for weight in weights_of(backbone))
    return f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}"


def check_trained(backbone: nn.Module, method: str, whole: bool = True) -> None:
    """Raise if a parameter trains that the method does not train: an adapter has no place for it.

    Args:
        backbone: A network that :func:`apply_method` has made ready.
        method: The method, for the message.
        whole: Look at parameters that were added since then, and at its layers, too, which takes longer.

    Raises:
        TinyTLError: With its name; or as :func:`check_parts`.
    """
    if whole:
        check_parts(backbone)
    places = vars(backbone)["frozen_places"]  # a buffer if its weights are int8
    parameters = ((name, module._parameters.get(own_name)) for module, own_name, name in places)
    trained = trained_names(backbone)
    for name, parameter in backbone.named_parameters() if whole else parameters:
        if parameter is not None and parameter.requires_grad and name not in trained:
            raise TinyTLError(
                f"{name} requires a gradient, and {method} does not train it, so that no adapter would hold it; use a "
                "method or trained_blocks that do (FT-Full trains all), or requires_grad_(False)"
            )


def parameter_roles(backbone: nn.Module) -> dict[str, Role]:
    """The role of every parameter by name.

    Raises:
        TinyTLError: A parameter's role is unknown, so no method can say whether it trains.
    """
    roles: dict[str, Role] = {}
    for prefix, module in backbone.named_modules():
        for name, _ in module.named_parameters(prefix, recurse=False):
            # The layers of a lite residual follow it, and have their role already.
            roles.setdefault(name, _role(module, name))
        if isinstance(module, LiteResidual):
            roles.update({name: Role.LITE for name, _ in module.named_parameters(prefix)})
            roles[f"{prefix}.norm2.weight"] = Role.LITE_LAST_SCALE
            roles[f"{prefix}.norm2.bias"] = Role.LITE_LAST_BIAS
    return roles


def changing_buffers(backbone: nn.Module) -> set[str]:
    """Names of the buffers that training can change: those of norms with batch statistics."""
    return {
        name
        for prefix, module in backbone.named_modules()
        if isinstance(module, nn.BatchNorm2d) and has_batch_statistics(module)
        for name, _ in module.named_buffers(prefix, recurse=False)
    }


def parameter_groups(
    backbone: nn.Module,
    blocks: dict[str, TinyTLBlock],
    method: MethodName,
    lr: float,
    weight_decay: float,
    decay_all: bool = False,
    factors: LrFactors | None = None,
) -> list[dict[str, Any]]:
    """Optimizer groups of the parameters that train, with their learning rate and weight decay.

    Args:
        backbone: A network that :func:`apply_method` has made ready.
        blocks: Its residual blocks.
        method: The method; FT-Layerwise has rates by depth.
        lr: Learning rate.
        weight_decay: Of weights.
        decay_all: Whether biases and norm scales decay, too.
        factors: Multiples of the learning rate by role.

    Returns:
        Groups as PyTorch's optimizers take them. ``matrices`` of a group is 0 or, of convolutions of lite residuals,
        the groups of channels: each is a matrix.

    Raises:
        TinyTLError: An argument of a wrong type, or a negative one.
    """
    for option, value in (("lr", lr), ("weight_decay", weight_decay)):
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        check(is_number and 0 <= value < math.inf, option, value, "use a number, 0 or more")
    check(isinstance(decay_all, bool), "decay_all", decay_all, "use True or False")
    fits = factors is None or isinstance(factors, LrFactors)
    check(fits, "factors", factors, "use an LrFactors of tinytl_hf.config.train")
    roles, matrices = parameter_roles(backbone), _lite_matrices(backbone)
    scales = _layerwise_scales(roles, blocks) if method == "FT-Layerwise" else {}
    by_role = _factors_by_role(factors or LrFactors())
    groups: dict[tuple[float, float, int], list[nn.Parameter]] = {}
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            is_weight = parameter.ndim > 1 and roles[name] is not Role.NORM_SCALE  # layer scales have three dimensions
            decays = decay_all or is_weight
            rate = lr * scales.get(name, 1.0) * by_role.get(roles[name], 1.0)
            key = (rate, weight_decay if decays else 0.0, matrices.get(name, 0))
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr": group_lr, "weight_decay": group_decay, "matrices": count}
        for (group_lr, group_decay, count), parameters in groups.items()
    ]


def _factors_by_role(factors: LrFactors) -> dict[Role, float]:
    return {role: getattr(factors, name) for name, roles in FACTOR_ROLES.items() for role in roles}


def _lite_matrices(backbone: nn.Module) -> dict[str, int]:
    """Groups of channels of each convolution in a lite residual, by its weight's name."""
    return {
        f"{prefix}.{name}.weight": module.groups
        for prefix, lite in backbone.named_modules()
        if isinstance(lite, LiteResidual)
        for name, module in lite.named_children()
        if isinstance(module, nn.Conv2d)
    }


def _role(module: nn.Module, name: str) -> Role:
    own_name = name.rpartition(".")[2]
    is_bias = own_name == "bias"
    if isinstance(module, Head):
        return Role.HEAD
    if own_name in ("weight", "bias"):
        is_norm = isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm))
        if is_norm or class_name(type(module)) in NORMS_OF_TIMM:
            return Role.NORM_BIAS if is_bias else Role.NORM_SCALE
        if isinstance(module, (nn.Conv2d, nn.Conv1d, nn.Linear)):
            return Role.BIAS if is_bias else Role.WEIGHT
    if own_name in {LAYER_SCALES.get(class_name(kind)) for kind in type(module).__mro__}:
        return Role.NORM_SCALE
    raise TinyTLError(
        f"parameter {name} belongs to a {type(module).__name__}, which no method knows how to train; "
        "`tinytl-hf backbones` lists what can be trained"
    )


def _layerwise_scales(roles: Mapping[str, Role], blocks: dict[str, TinyTLBlock]) -> dict[str, float]:
    """Learning-rate factors of FT-Layerwise.

    The feature blocks are the stem, the residual blocks and what follows the last of them before the head
    (MobileNetV2: ``features.0`` to ``features.18``); the last five get 0.6, those before them 0.4.
    """
    block_of = {
        name: number
        for number, (path, block) in enumerate(blocks.items(), start=1)
        for name, _ in block.named_parameters(path)
    }
    unit_of: dict[str, int] = {}
    unit = 0  # the stem
    for name, role in roles.items():
        if role is Role.HEAD:
            continue
        if name in block_of:
            unit = block_of[name]
        elif unit == len(blocks):  # what follows the last block
            unit = len(blocks) + 1
        unit_of[name] = unit
    first_of_last = max(unit_of.values()) - LAYERWISE_LAST_BLOCKS + 1
    return {
        name: LAYERWISE_LAST_SCALE if unit >= first_of_last else LAYERWISE_REST_SCALE for name, unit in unit_of.items()
    }
