"""The convolutions of a training step, and nothing else: what the step takes at least with PyTorch's kernels.

Left out are norms, activations, pooling, linear layers, the loss, the optimizer, and what memory costs between layers.
The share of this speed that a step reaches says how much an engine has left to win.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from tinytl_hf.device import seconds_since, wait_for_device
from tinytl_hf.lean.int8 import weight_of
from tinytl_hf.measure.measured_step import MeasuredStep
from tinytl_hf.network.same_padding import SameConv2d, same_padding

LAYOUTS = (torch.contiguous_format, torch.channels_last)
TRIALS = 3  # of each pass in each layout

Pass = Callable[[], object]


class Convolutions:
    """The convolutions of a step, forward and back, on maps of noise; each in the layout of maps that is quicker.

    Args:
        step: The step of a stock model, in training mode.
    """

    def __init__(self, step: MeasuredStep) -> None:
        self.images, self.device = step.images, step.labels.device
        seen: list[tuple[nn.Conv2d, Tensor, Tensor, bool]] = []  # maps without their values

        def note(conv: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
            seen.append((conv, inputs[0].detach().to("meta"), output.detach().to("meta"), inputs[0].requires_grad))

        hooks = [m.register_forward_hook(note) for m in step.model.modules() if isinstance(m, nn.Conv2d)]
        step.model(step.view())
        for hook in hooks:
            hook.remove()
        largest = max(math.prod(shape) for conv, x, y, _ in seen for shape in (_padded(conv, x.shape)[0], y.shape))
        noise = torch.rand(largest, dtype=seen[0][2].dtype, device=self.device)
        self.passes: list[Pass] = []
        for each in seen:
            in_layouts = [list(_passes(*each, noise, layout)) for layout in LAYOUTS]
            for same in zip(*in_layouts, strict=True):
                self.passes.append(min(same, key=lambda run: _seconds(run, self.device)))
        self.passes *= step.options.gradient_accumulation_steps

    def __call__(self) -> None:
        """Take all passes once, and wait for the device."""
        for run in self.passes:
            run()
        wait_for_device(self.device)


def _passes(
    conv: nn.Conv2d, x: Tensor, output: Tensor, to_input: bool, noise: Tensor, layout: torch.memory_format
) -> Iterator[Pass]:
    """Forward; and back to the input and to the weight, where a gradient is wanted."""
    weight = weight_of(conv).detach().to(output.dtype).contiguous(memory_format=layout)
    shape, padding = _padded(conv, x.shape)
    options = (list(conv.stride), padding, list(conv.dilation), False, [0, 0], conv.groups)
    maps, grad = _maps(noise, shape, layout), _maps(noise, output.shape, layout)
    yield lambda: torch.ops.aten.convolution(maps, weight, None, *options)
    for mask in ([to_input, False, False], [False, conv.weight.requires_grad, False]):
        if any(mask):
            yield lambda mask=mask: torch.ops.aten.convolution_backward(grad, maps, weight, None, *options, mask)  # type: ignore[misc]


def _padded(conv: nn.Conv2d, shape: torch.Size) -> tuple[torch.Size, list[int]]:
    """The shape of maps with the zeros of SAME padding, and the padding that is left for the kernel to add."""
    if isinstance(conv, SameConv2d) or conv.padding == "same":
        left, right, top, bottom = same_padding(conv, *shape[2:])
        return torch.Size((*shape[:2], shape[2] + top + bottom, shape[3] + left + right)), [0, 0]
    return shape, [0, 0] if isinstance(conv.padding, str) else list(conv.padding)


def _maps(noise: Tensor, shape: torch.Size, layout: torch.memory_format) -> Tensor:
    """The noise as maps ``[N, C, H, W]`` in a layout."""
    images, channels, height, width = shape
    flat = noise[: math.prod(shape)]
    if layout is torch.channels_last:
        return flat.view(images, height, width, channels).permute(0, 3, 1, 2)
    return flat.view(shape)


def _seconds(run: Pass, device: torch.device) -> float:
    """The shortest of some trials."""
    found = []
    for _ in range(TRIALS):
        start = time.perf_counter()
        run()
        found.append(seconds_since(start, device))
    return min(found)
