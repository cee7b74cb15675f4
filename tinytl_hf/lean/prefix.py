"""The prefix, what stands before the first trained block: it runs by itself, forward only, some images at a time.

So of the whole batch only the maps at its end exist. Training can also start from such maps, computed earlier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinytl_hf.errors import TinyTLError
from tinytl_hf.lean.runs import LeanSequence
from tinytl_hf.lean.slices import Gathered, even_slices, slice_mb_on
from tinytl_hf.network.blocks import TinyTLBlock
from tinytl_hf.network.head import with_own_children
from tinytl_hf.network.trained_blocks import last_blocks, prefix_modules

SHARE_OF_CHAIN = 0.4  # of a chain's slices, for images: the maps between the parts are larger, and exist whole
TRIAL_SIZE = 64  # side in px of the image on which it is tried out


@dataclass(frozen=True)
class Prefix:
    """Parts of a backbone that run one after the other before the first trained block.

    Attributes:
        parts: The parts, in forward order; none of them trains.
        slice_mb: The engine's slices, in MB.
        channels: Those of the maps at its end.
    """

    parts: Sequence[nn.Module]
    slice_mb: float | None
    channels: int

    @torch.no_grad()
    def maps(self, images: Tensor) -> Tensor:
        """What the first trained block gets: ``[N, 3, H, W]`` to ``[N, C, h, w]``, channels last."""
        gathered = Gathered(len(images))
        slice_mb = SHARE_OF_CHAIN * slice_mb_on(images.device, self.slice_mb)
        for part in even_slices(len(images), images[:1].numel() * images.itemsize, slice_mb):
            maps = images[part]
            for layer in self.parts:
                maps = layer(maps)
            gathered.put(part, maps.contiguous(memory_format=torch.channels_last))
        assert gathered.whole is not None
        return gathered.whole

    def run(self, backbone: nn.Module, inputs: Tensor, lean: bool) -> Tensor:
        """The logits of images, or of their maps at the end of the prefix.

        Args:
            backbone: The network that this is the prefix of.
            inputs: Images ``[N, 3, H, W]`` or :meth:`maps` of them ``[N, C, h, w]``.
            lean: Whether images go through the prefix some at a time, without gradients; a graph that is compiled is
                not sliced, and images whose gradient is wanted get it.

        Raises:
            TinyTLError: The inputs are neither.
        """
        if inputs.shape[1] not in (3, self.channels):
            raise TinyTLError(
                f"images are of shape {list(inputs.shape)}: use [images, 3, height, width], or prefix.maps of them, "
                f"[images, {self.channels}, height, width]; model.preprocess makes RGB of images of any kind"
            )
        if inputs.shape[1] == self.channels:
            return self.rest_of(backbone)(inputs)
        if not lean or inputs.requires_grad or torch.compiler.is_compiling():
            return backbone(inputs)
        return self.rest_of(backbone)(self.maps(inputs))

    def rest_of(self, backbone: nn.Module) -> nn.Module:
        """The network without the prefix, from those maps to the logits; all that it has is ``backbone``'s."""
        return _without(backbone, {module for part in self.parts for module in part.modules()})


def find_prefix(
    backbone: nn.Module, blocks: dict[str, TinyTLBlock], trained_blocks: int | None, slice_mb: float | None
) -> Prefix | None:
    """The prefix of a backbone that trains its last blocks only, or None where it cannot run by itself.

    Whether it can is tried out on an image: a backbone can do something between its parts, such as adding the output
    of an earlier one.
    """
    if trained_blocks is None:
        return None
    first = next(iter(last_blocks(blocks, trained_blocks).values()))
    parts = prefix_modules(backbone, blocks, trained_blocks)
    found: list[Tensor] = []
    hook = first.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    weight = next(backbone.parameters())
    image = torch.linspace(-1, 1, 3 * TRIAL_SIZE**2, device=weight.device, dtype=weight.dtype)
    image = image.view(1, 3, TRIAL_SIZE, TRIAL_SIZE)
    modes = {module: module.training for module in backbone.modules()}
    try:
        with torch.no_grad():
            logits = backbone.eval()(image)
            prefix = Prefix(parts, slice_mb, channels=found[0].shape[1])
            maps = prefix.maps(image)
            same = torch.equal(maps, found[0]) and torch.equal(prefix.rest_of(backbone)(maps), logits)
    except (RuntimeError, TypeError):  # its parts do not fit one another as they stand
        same = False
    finally:
        hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return prefix if same else None


def _without(module: nn.Module, prefix: set[nn.Module]) -> nn.Module:
    """``module``, in which what is of the prefix passes on what it gets: a copy of what holds any, else itself."""
    if module in prefix:
        return nn.Identity()
    if not any(part in prefix for part in module.modules()):
        return module
    rest = with_own_children(module)
    rest._modules.update({name: _without(part, prefix) for name, part in module.named_children()})
    if isinstance(rest, LeanSequence):
        rest.passes = tuple(run for run in rest.passes if run not in prefix)
    return rest
