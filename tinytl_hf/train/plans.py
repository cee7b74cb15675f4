"""Ways to train that differ in what a step takes: what ``fit`` chooses among, and in which order it would."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from tinytl_hf.config.fit import FitConfig
from tinytl_hf.config.run import Config
from tinytl_hf.network.methods import METHODS, Role, possible_methods
from tinytl_hf.train.ranking import SHARES, SIZES, points
from tinytl_hf.words import counted

SHARE_OF_OTHERS = 6 / 17  # of the blocks, for methods other than TinyTL-L+B
BATCH_OF_STATISTICS = 8  # images that batch norms want at least


@dataclass(frozen=True)
class Plan:
    """A way to train: what differs from the run's config.

    Attributes:
        method: One of the seven.
        trained_blocks: How many of the last blocks, or all.
        share: The same as a share of all blocks.
        train_size: Side of the images in px.
        batch: Images a forward and backward pass; an optimizer step has as many as ever.
        int8: Whether frozen weights are stored in 8 bits.
        group_norm: Whether lite residuals have group norms.
        checkpointing: Whether blocks are computed a second time in the backward pass.
        bf16: Whether it computes in bf16.
    """

    method: str
    trained_blocks: int | Literal["all"]
    share: float
    train_size: int
    batch: int
    int8: bool = False
    group_norm: bool = False
    checkpointing: bool = False
    bf16: bool = False

    @property
    def points(self) -> float:
        """What the ranking gives for it: points of accuracy, next to the whole ``TinyTL-L+B`` at 128 px."""
        return points(self.method, self.share, self.train_size, self.int8, self.group_norm)

    @property
    def options(self) -> str:
        """In words, what it changes besides method, blocks, size and batch."""
        names = {
            "int8": self.int8,
            "group norm": self.group_norm,
            "checkpointing": self.checkpointing,
            "bf16": self.bf16,
        }
        return ", ".join(name for name, used in names.items() if used)

    @property
    def images_a_pass(self) -> str:
        """In words, how many images a forward and backward pass has."""
        return f"{counted(self.batch, 'image')} a pass"

    def __str__(self) -> str:
        """In words."""
        blocks = "" if self.trained_blocks == "all" else f" of the last {counted(self.trained_blocks, 'block')}"
        options = f", {self.options}" if self.options else ""
        return f"{self.method}{blocks}, {self.train_size} px, {self.images_a_pass}{options}"

    def of(self, config: Config) -> Config:
        """The run that trains so."""
        precision = "bf16" if self.bf16 else config.train.mixed_precision
        return replace(
            config,
            method=self.method,  # type: ignore[arg-type]
            trained_blocks=self.trained_blocks,
            lite=replace(config.lite, norm="group") if self.group_norm else config.lite,
            backbone=replace(config.backbone, frozen_weights="int8" if self.int8 else "fp32"),
            data=replace(config.data, train_size=self.train_size, start_size=None),
            train=replace(
                config.train,
                gradient_accumulation_steps=config.train.global_batch_size // self.batch,
                gradient_checkpointing=self.checkpointing,
                mixed_precision=precision,
                cache_features=False,
            ),
        )


def sizes_to_try(options: FitConfig, largest: int) -> list[int]:
    """Sides of the images in px, the largest first; at least one."""
    if options.train_sizes is not None:
        return sorted(set(options.train_sizes), reverse=True)
    return [size for size in SIZES if size <= largest] or [largest]


def families(config: Config, options: FitConfig, blocks: int, bf16: bool) -> Iterator[list[Plan]]:
    """For each method with a number of trained blocks: its plans, best first.

    Among plans of as many points those come first that change least: with batch norms in lite residuals, without
    checkpointing, in the run's precision, with smaller images, with more of them a pass.

    Args:
        config: The run.
        options: What may be tried.
        blocks: Residual blocks of the backbone.
        bf16: Whether bf16 may be tried.
    """
    sizes = sizes_to_try(options, config.data.train_size)
    for name in options.methods:
        if name not in possible_methods(blocks > 0):
            continue
        method = METHODS[name]
        is_frozen = Role.WEIGHT not in method.trains
        for count, share in _blocks_to_train(name, blocks):
            plans = [
                Plan(name, count, share, size, batch, int8, group_norm, checkpointing, half)
                for size, batch, int8, group_norm, checkpointing, half in product(
                    sizes,
                    passes_of(config),
                    _with_or_without(is_frozen or share < 1, config.backbone.frozen_weights == "int8"),
                    _with_or_without(method.lite_residual and config.lite.norm == "batch", False),
                    _with_or_without(_keeps_maps(name, config), config.train.gradient_checkpointing),
                    _with_or_without(bf16 and config.train.mixed_precision is None, False),
                )
            ]
            yield sorted((plan for plan in plans if _has_statistics(plan, config)), key=_order)


def _keeps_maps(method: str, config: Config) -> bool:
    """Whether much is kept for the backward pass, which checkpointing spares: the lean engine has no more to spare."""
    return METHODS[method].batch_statistics or (not config.memory.lean and method != "FT-Last")


def _blocks_to_train(method: str, blocks: int) -> list[tuple[int | Literal["all"], float]]:
    """How many of the last blocks train, also as a share of all: as the ranking knows them, of most methods one."""
    shares = {"FT-Last": [], "TinyTL-L+B": [share for share in SHARES if share < 1]}.get(method, [SHARE_OF_OTHERS])
    counts = {max(1, round(share * blocks)) for share in shares}
    return [("all", 1.0), *((count, count / blocks) for count in sorted(counts, reverse=True) if count < blocks)]


def _with_or_without(may: bool, always: bool) -> tuple[bool, ...]:
    if always:
        return (True,)
    return (False, True) if may else (False,)


def passes_of(config: Config) -> list[int]:
    """How many images a pass can have, most first: mixup and cutmix blend pairs."""
    whole, mixes = config.train.global_batch_size, config.train.mixup > 0 or config.train.cutmix > 0
    return [batch for batch in range(whole, 0, -1) if whole % batch == 0 and not (mixes and batch % 2)]


def _has_statistics(plan: Plan, config: Config) -> bool:
    """Whether batch norms see as many images a pass as they want; group norms are for passes of fewer."""
    method, enough = METHODS[plan.method], min(BATCH_OF_STATISTICS, config.train.global_batch_size)
    if method.batch_statistics:
        return plan.batch >= enough
    if method.lite_residual and config.lite.norm == "batch":
        return plan.group_norm == (plan.batch < enough)
    return True


def _order(plan: Plan) -> tuple[float, ...]:
    return (-plan.points, plan.group_norm, plan.checkpointing, plan.bf16, plan.train_size, -plan.batch)
