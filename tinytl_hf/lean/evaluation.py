"""Evaluation by the kernels that train: a chain of frozen layers computes the same in both modes, and quicker.

It is for a whole pass over a set of images, in which nobody looks at single layers and no gradient is wanted. A model
that is called in evaluation mode by itself runs stock layers, whose hooks fire.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tinytl_hf.device import CPU_PIXELS
from tinytl_hf.lean import backend
from tinytl_hf.lean.chain import Chain
from tinytl_hf.lean.layers import LeanConvNormActivation
from tinytl_hf.lean.paths import LeanBlockPath
from tinytl_hf.lean.together import Together
from tinytl_hf.network.blocks import TinyTLBlock

CHAIN_PIXELS = 8 * CPU_PIXELS  # of which the maps between chains are as large as those of CPU_PIXELS within them


@contextmanager
def evaluated_by_chains(network: nn.Module) -> Iterator[int]:
    """Within it, a network in evaluation mode runs its chains, in any thread; gives how many pixels suit it at a time.

    What is in a chain is frozen, norms too, so its mode changes nothing. Lite residuals and all other layers stay in
    evaluation mode. It is for the native back-end: stock layers are as good elsewhere.
    """
    device = next(network.parameters()).device
    chains = {module: chain for module in network.modules() if (chain := _chain_of(module)) is not None}
    switched = [
        module
        for module, chain in chains.items()
        if not module.training and _has_norm(chain) and backend.chosen(chain.backend, device) == "native"
    ]
    for module in switched:
        module.training = True
    try:
        yield CHAIN_PIXELS if switched else CPU_PIXELS
    finally:
        for module in switched:
            module.training = False


def _chain_of(module: nn.Module) -> Chain | None:
    """The chain that a block or a convolution trains by, if it is one."""
    if isinstance(module, TinyTLBlock):
        path = module.lean_path
    elif isinstance(module, LeanConvNormActivation):
        path = module.chain
    else:
        return None
    if isinstance(path, Together):  # as long as all of its members train: they are switched together
        path = path.alone
    if isinstance(path, LeanBlockPath):
        path = path.main
    return path if isinstance(path, Chain) else None


def _has_norm(chain: Chain) -> bool:
    """Whether its kernels spare passes over maps; a convolution by itself is as quick in stock PyTorch."""
    return any(stage.norm is not None for stage in chain.stages)
