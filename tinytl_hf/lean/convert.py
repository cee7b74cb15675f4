"""Turn a backbone lean, in place: find what is frozen and choose how little it may keep.

Parameter and buffer names stay. A residual block whose layers are all known and frozen becomes a chain. Another is
computed again for the backward pass, if its images do not depend on one another. Else its convolutions with norm and
activation become lean, or its single layers. :func:`convert` has the steps in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor, nn
from torchvision.ops import Permute, StochasticDepth
from torchvision.ops.misc import Conv2dNormActivation

from tinytl_hf.config.engine import Engine
from tinytl_hf.lean.bypassed import bypassed
from tinytl_hf.lean.chain import Chain
from tinytl_hf.lean.fusing import fuse, join_norm, train_by
from tinytl_hf.lean.grouping import ACTIVATIONS, CONVOLUTIONS, NORMS, as_stages, chain_of, is_frozen_convolution
from tinytl_hf.lean.independence import (
    heavy_weights_are_frozen,
    independent_by_trial,
    independent_by_type,
    inputs_of,
    may_be_independent,
)
from tinytl_hf.lean.layers import LeanConv2d, LeanConvNormActivation, LeanReLU, LeanReLU6
from tinytl_hf.lean.lite_branch import Branch
from tinytl_hf.lean.max_pool import LeanMaxPool2d, is_plain
from tinytl_hf.lean.paths import LeanBlockPath, LeanPart, LeanResNetPath
from tinytl_hf.lean.recompute import Recomputed
from tinytl_hf.lean.runs import LeanSequence, join_recomputed, run_as
from tinytl_hf.lean.stage import UPPER, Stage
from tinytl_hf.lean.together import Together, done_by_another
from tinytl_hf.network.blocks import TinyTLBlock, is_layer, leaves, own_layers, own_modules, unknown_blocks
from tinytl_hf.network.head import Head, PointwiseHead
from tinytl_hf.network.kinds import class_name
from tinytl_hf.network.mixed import mixed
from tinytl_hf.network.norms import FrozenBatchNorm2d
from tinytl_hf.network.parts import remember_parts
from tinytl_hf.network.trained_blocks import modules_before

LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    **CONVOLUTIONS,
    **NORMS,
    nn.ReLU: LeanReLU,
    nn.ReLU6: LeanReLU6,
    nn.MaxPool2d: LeanMaxPool2d,
}
# Layers that add no full-size map to what is kept. (A stock ReLU saves its output, but the next layer saves the same
# tensor; dropout is off; linear layers see vectors only.)
KEEP_NOTHING = {
    nn.Identity,
    nn.Sequential,
    nn.Dropout,
    nn.Flatten,
    StochasticDepth,
    Permute,
    nn.Linear,
    Head,
    PointwiseHead,
    nn.ReLU,
    nn.ReLU6,
}
NAMES_THAT_KEEP_NOTHING = {
    "timm.layers.adaptive_avgmax_pool.FastAdaptiveAvgPool",
    "timm.layers.drop.DropPath",
    "timm.layers.linear.Linear",
}
STEM = "conv_stem"
# Convolutions beside a network's blocks, with the norm that each alone feeds; the stem's alone feeds the first block.
CONVOLUTIONS_WITH_NORM = {
    "timm.models.efficientnet.EfficientNet": ((STEM, "bn1"), ("conv_head", "bn2")),
    "timm.models.mobilenetv3.MobileNetV3": ((STEM, "bn1"),),
}


def convert(
    backbone: nn.Module,
    blocks: dict[str, TinyTLBlock],
    engine: Engine,
    train_size: int,
    trained_blocks: int | None = None,
) -> list[str]:
    """Make the training pass of ``backbone`` lean wherever its layers allow it.

    Args:
        backbone: A network that a method has been applied to.
        blocks: Its residual blocks by name.
        engine: Whether to, and its slices.
        train_size: Side of the training images in px, at which parts with layers of unknown types are tried out.
        trained_blocks: How many of the last blocks train; what stands before them is not joined with them.

    Returns:
        Names of the layers that stay stock and keep full-size tensors, each with its type.
    """
    if not engine.lean:
        return []
    prefix = modules_before(backbone, blocks, trained_blocks)
    conversion = _Conversion(backbone, engine, prefix, _independent_parts(backbone, blocks, train_size))
    conversion.set_block_paths(blocks)
    conversion.join_sequences()
    conversion.join_norms(blocks)
    conversion.convert_the_rest()
    fuse(backbone, conversion.again, conversion.read_again, engine)
    conversion.join_stems()
    not_called = bypassed(backbone)
    by_chains = [each for each in backbone.modules() if isinstance(each, LeanConv2d) or each in not_called]
    convolutions = [each for each in by_chains if isinstance(each, nn.Conv2d)]
    remember_parts(backbone, conversion.again, not_called, convolutions)
    return conversion.stock_layers()


@dataclass
class _Conversion:
    """One conversion of a backbone, step by step, and what has its training pass so far.

    Attributes:
        backbone: The network.
        engine: The slices, and who computes.
        prefix: Modules that run without gradients.
        independent: Parts that may be computed again, as their images do not depend on one another.
        done: Modules that keep masks or nothing, and lite residuals.
        again: Modules of what is computed again.
        read_again: Blocks among them whose output is read when they are.
    """

    backbone: nn.Module
    engine: Engine
    prefix: Collection[nn.Module]
    independent: Collection[nn.Module]
    done: set[nn.Module] = field(default_factory=set)
    again: set[nn.Module] = field(default_factory=set)
    read_again: set[nn.Module] = field(default_factory=set)

    def set_block_paths(self, blocks: dict[str, TinyTLBlock]) -> None:
        """Give each block its training pass: masks if they serve it, or computed again; lite residuals always."""
        slice_mb = self.engine.slice_mb
        for block in blocks.values():
            path: Callable[[Tensor], Tensor] | None = _block_path(block, self.engine)
            if path is None and block in self.independent:
                path = Recomputed(block, block.stock_forward, slice_mb)
                self.again.update(own_modules(block))
            if path is not None:
                self.done.update(block.modules())
            if block.lite_residual is not None:
                self.done.update(block.lite_residual.modules())
                branch = Branch(block.lite_residual, slice_mb, self.engine.backend)
                path = LeanBlockPath(block.stock_forward if path is None else path, branch)
            block.lean_path = path

    def join_sequences(self) -> None:
        """Let neighbours in a sequence train as one, where their layers allow it."""
        for module in self.backbone.modules():
            if type(module) is nn.Sequential and module not in self.done:
                joined, read = join_recomputed(module, self.engine.slice_mb, self.prefix)
                self.again.update(joined)
                self.read_again.update(read)
                if module not in self.again:
                    _join_layers(module, self.engine, self.prefix)

    def join_norms(self, blocks: dict[str, TinyTLBlock]) -> None:
        """Let timm's convolutions do the work of the norms after them, and the stem join the first block."""
        for name, (conv, norm) in _with_norms(self.backbone, self.engine).items():
            self.done.update((conv, *norm.modules()))
            if name == STEM and blocks:
                _join((conv, norm), next(iter(blocks.values())), self.prefix)

    def convert_the_rest(self) -> None:
        """Convolutions with norm and activation, parts of unknown kinds and layers that have no training pass yet."""
        if not any(isinstance(m, nn.Conv2d) and not m.weight.requires_grad for m in self.backbone.modules()):
            return  # everything trains
        for module in self.backbone.modules():
            if module in self.done or module in self.again:
                continue
            stage = _single_stage(module, module in self.independent)
            if stage is not None:
                chain = chain_of((stage,), self.engine)
                train_by(module, Recomputed(module, chain, self.engine.slice_mb) if chain.keeps_maps else chain)
                self.done.update(module.modules())
            elif module in self.independent and not isinstance(module, TinyTLBlock):
                _compute_again(module, self.engine)
                self.again.update(module.modules())
            elif _becomes_lean(module):
                _make_lean(module, self.engine)
                self.done.add(module)

    def join_stems(self) -> None:
        """Let stems that are one module, as torchvision's are, join the block that follows them."""
        for module in self.backbone.modules():
            if isinstance(module, nn.Sequential) and len(module) > 1:
                stem, following = module[0], module[1]
                if isinstance(stem, LeanConvNormActivation) and isinstance(following, TinyTLBlock):
                    _join((stem,), following, self.prefix)

    def stock_layers(self) -> list[str]:
        """Names, with their types, of layers that stay stock and can keep full-size tensors."""
        ours = self.done | self.again
        return [
            f"{name} ({type(module).__name__})"
            for name, module in self.backbone.named_modules()
            if module not in ours and is_layer(module) and may_keep_maps(module)
        ]


def _compute_again(part: nn.Module, engine: Engine) -> None:
    """Let a part of an unknown kind keep its input alone."""
    stock_forward = partial(type(part).forward, part)
    part.__class__ = mixed(type(part).__name__, LeanPart, type(part))
    part.path = Recomputed(part, stock_forward, engine.slice_mb)  # type: ignore[assignment]


def _make_lean(layer: nn.Module, engine: Engine) -> None:
    """Let a single layer keep less."""
    if isinstance(layer, nn.Conv2d):
        train_by(layer, chain_of((Stage(layer),), engine))
        return
    layer.__class__ = LAYERS[type(layer)]
    if isinstance(layer, LeanMaxPool2d):
        layer.slice_mb = engine.slice_mb


def parts_to_try(backbone: nn.Module, blocks: dict[str, TinyTLBlock]) -> set[nn.Module]:
    """Those with layers of unknown types, which are computed again if a trial shows that they may be."""
    return set(filter(_to_try, _parts_without_masks(backbone, blocks)))


def _to_try(part: nn.Module) -> bool:
    return not independent_by_type(part) and may_be_independent(part)


def _parts_without_masks(backbone: nn.Module, blocks: dict[str, TinyTLBlock]) -> set[nn.Module]:
    """Blocks and the like that are frozen, and that masks do not serve."""
    stems = [module for module in backbone.modules() if type(module) is Conv2dNormActivation]
    return {
        part
        for part in (*blocks.values(), *stems, *unknown_blocks(backbone, blocks).values())
        if heavy_weights_are_frozen(part) and not all(map(_keeps_little, own_layers(part)))
    }


def _independent_parts(backbone: nn.Module, blocks: dict[str, TinyTLBlock], train_size: int) -> set[nn.Module]:
    """Blocks and the like that masks do not serve, frozen, whose images do not depend on one another."""
    parts = _parts_without_masks(backbone, blocks)
    known, unknown = set(filter(independent_by_type, parts)), set(filter(_to_try, parts))
    if any(parameter.is_meta for parameter in backbone.parameters()):
        return known  # without values, nothing can be tried out
    inputs = inputs_of(backbone, unknown, train_size) if unknown else {}
    return known | {part for part, images in inputs.items() if independent_by_trial(part, images)}


def _single_stage(module: nn.Module, again: bool) -> Stage | None:
    """The one frozen convolution with norm and activation that torchvision's module of such layers is; or None."""
    stages = as_stages(leaves(module), again) if type(module) is Conv2dNormActivation else None
    return stages[0] if stages is not None and len(stages) == 1 else None


def _keeps_little(layer: nn.Module) -> bool:
    """Whether a layer keeps masks or nothing by itself, once it is lean."""
    return _becomes_lean(layer) or not may_keep_maps(layer)


def _join(stems: Sequence[nn.Module], block: TinyTLBlock, prefix: Collection[nn.Module]) -> None:
    """Let a stem and the block that follows it, if masks serve it, train as one chain, which the block runs.

    So the stem's maps, the largest of all, exist for a slice of the batch only.

    Args:
        stems: The stem, and the norm after it that it does the work of.
        block: The block.
        prefix: Modules that run without gradients.
    """
    stem = stems[0]
    assert isinstance(stem, (LeanConvNormActivation, LeanConv2d))
    path = block.lean_path
    main = path.main if isinstance(path, LeanBlockPath) else path
    apart = stem in prefix and block not in prefix  # the stem runs without gradients, and the block trains
    if path is None or not isinstance(main, Chain) or not isinstance(stem.chain, Chain):
        return
    if main.residual or block.gradient_checkpointing or apart:
        return
    joined = replace(main, stages=(*stem.chain.stages, *main.stages), branch=len(stem.chain.stages))
    members = (*stems, block)
    whole = replace(path, main=joined, apart=(stem.chain, main)) if isinstance(path, LeanBlockPath) else joined
    block.lean_path = Together(members, whole, path)
    stem.chain = Together(members, done_by_another, stem.chain)


def _join_layers(layers: nn.Sequential, engine: Engine, prefix: Collection[nn.Module]) -> None:
    """Let neighbours that are frozen convolutions with norms and activations train as one chain.

    So the maps between them exist for a part of the batch only.
    """
    passes: list[Callable[[Tensor], Tensor]] = []
    run: list[nn.Module] = []
    for part in layers.passes if isinstance(layers, LeanSequence) else layers:
        if isinstance(part, nn.Module) and part not in prefix and as_stages([*run, part]) is not None:
            run.append(part)
        else:
            passes += [*_as_one(run, engine), part]
            run = []
    passes += _as_one(run, engine)
    if any(isinstance(each, Chain) for each in passes):
        run_as(layers, passes)


def _as_one(run: list[nn.Module], engine: Engine) -> Iterable[Callable[[Tensor], Tensor]]:
    """The layers of a run as a chain; one layer stays as it is."""
    stages = as_stages(run)
    return run if len(run) < 2 or stages is None else [chain_of(stages, engine)]


def _with_norms(backbone: nn.Module, engine: Engine) -> dict[str, tuple[LeanConv2d, nn.Module]]:
    """Let a timm network's convolutions do the work of the norms after them; both by the convolution's name."""
    found: dict[str, tuple[LeanConv2d, nn.Module]] = {}
    for names in CONVOLUTIONS_WITH_NORM.get(class_name(type(backbone)), ()):
        conv, norm = (backbone.get_submodule(name) for name in names)
        if join_norm(conv, norm, engine):
            assert isinstance(conv, LeanConv2d)
            if not isinstance(conv.chain, Chain) or conv.chain.keeps_maps:
                conv.chain = Recomputed(nn.Sequential(conv, norm), conv.chain, engine.slice_mb)
            found[names[0]] = (conv, norm)
    return found


def _block_path(block: TinyTLBlock, engine: Engine) -> Chain | LeanResNetPath | None:
    """The block's training pass as chains, or None if one of its layers does not fit in."""
    main = as_stages(block.kind.layers(block))
    shortcut, last = block.kind.shortcut(block), block.kind.last(block)
    if main is None:
        return None
    if last is None:
        return chain_of(main, engine, block.kind.adds_input(block)) if shortcut is None else None
    projection = None if shortcut is None else as_stages(leaves(shortcut))
    upper = UPPER.get(ACTIVATIONS.get(type(last), ""))
    if upper is None or not block.kind.adds_input(block) or (shortcut is not None and projection is None):
        return None
    added = None if projection is None else chain_of(projection, engine)
    return LeanResNetPath(chain_of(main, engine), added, upper)


def _becomes_lean(layer: nn.Module) -> bool:
    if type(layer) in CONVOLUTIONS:
        return is_frozen_convolution(layer)
    if type(layer) is nn.MaxPool2d:
        return is_plain(layer)
    if isinstance(layer, FrozenBatchNorm2d) and (layer.weight is None or layer.weight.requires_grad):
        return False
    return type(layer) in LAYERS


def may_keep_maps(layer: nn.Module) -> bool:
    """Whether a stock layer can keep tensors of the size of its maps for the backward pass."""
    if type(layer) is nn.AdaptiveAvgPool2d:
        return layer.output_size not in (1, (1, 1))
    return type(layer) not in KEEP_NOTHING and class_name(type(layer)) not in NAMES_THAT_KEEP_NOTHING
