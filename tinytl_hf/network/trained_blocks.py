"""Training the last blocks of a backbone only: which those are, and what stands before them, the prefix.

The prefix runs forward without gradients, so nothing of it is kept, and its statistics never change.
"""

from __future__ import annotations

from torch import nn

from tinytl_hf.errors import TinyTLError
from tinytl_hf.network.blocks import TinyTLBlock
from tinytl_hf.words import counted


def last_blocks(blocks: dict[str, TinyTLBlock], count: int | None) -> dict[str, TinyTLBlock]:
    """The last ``count`` of ``blocks``; all of them for None.

    Raises:
        TinyTLError: There are fewer.
    """
    if count is None:
        return blocks
    if not 1 <= count <= len(blocks):
        most = f"use 1 to {len(blocks)}, or all" if blocks else "use all"
        raise TinyTLError(
            f"trained_blocks={count}: this backbone has {counted(len(blocks), 'residual block')}; {most}"
        )
    return dict(list(blocks.items())[-count:])


def prefix_modules(backbone: nn.Module, blocks: dict[str, TinyTLBlock], count: int | None) -> list[nn.Module]:
    """What runs before the last ``count`` blocks, each part as large as it can be; nothing for None.

    The order is that in which a backbone makes its parts, which in networks of one path is that in which they run.
    """
    if count is None:
        return []
    return _before(backbone, next(iter(last_blocks(blocks, count).values())))


def modules_before(backbone: nn.Module, blocks: dict[str, TinyTLBlock], count: int | None) -> set[nn.Module]:
    """All modules of :func:`prefix_modules`, down to single layers."""
    return {module for part in prefix_modules(backbone, blocks, count) for module in part.modules()}


def _before(module: nn.Module, block: nn.Module) -> list[nn.Module]:
    parts: list[nn.Module] = []
    for child in module.children():
        if child is block:
            break
        if any(part is block for part in child.modules()):
            return [*parts, *_before(child, block)]
        parts.append(child)
    return parts
