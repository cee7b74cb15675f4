"""The forward pass of evaluation and use, in parts that suit a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CPU_PIXELS = 2 * 224 * 224  # maps of so many pixels stay below 32 MB in the usual networks


def forward_in_parts(model: nn.Module, inputs: Tensor) -> Tensor:
    """Logits of a batch; on a CPU, of a few images at a time.

    Without gradients larger batches gain nothing there, and maps of more than 32 MB cost time: glibc hands such blocks
    back to the system after each layer, and gets the next one page by page.

    Args:
        model: Gives logits, without gradients.
        inputs: Images ``[N, 3, H, W]`` or features ``[N, C]``.
    """
    if inputs.device.type != "cpu" or inputs.dim() == 2:
        return model(inputs)
    height, width = inputs.shape[-2:]
    return torch.cat([model(part) for part in inputs.split(max(1, CPU_PIXELS // (height * width)))])
