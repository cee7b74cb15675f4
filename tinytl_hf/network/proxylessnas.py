"""ProxylessNAS-Mobile (Cai et al., ICLR 2019), the backbone of the TinyTL paper, which no package has.

The configuration is the published one: inverted residuals whose kernel size and expansion were searched for, with
ReLU6, made here of torchvision's layers. The authors' file of weights names the same layers otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.ops.misc import Conv2dNormActivation

NAME = "proxylessnas_mobile"
HEAD = "classifier"
NORM_EPS = 1e-3
INPUT_SIZE = 224  # px
STEM, FEATURES, CLASSES = 32, 1280, 1000
# Of each block: output channels, stride, expansion, kernel size.
BLOCKS = (
    (16, 1, 1, 3),
    *((32, 2, 3, 5), (32, 1, 3, 3)),
    *((40, 2, 3, 7), (40, 1, 3, 3), (40, 1, 3, 5), (40, 1, 3, 5)),
    *((80, 2, 6, 7), (80, 1, 3, 5), (80, 1, 3, 5), (80, 1, 3, 5)),
    *((96, 1, 6, 5), (96, 1, 3, 5), (96, 1, 3, 5), (96, 1, 3, 5)),
    *((192, 2, 6, 7), (192, 1, 6, 7), (192, 1, 3, 7), (192, 1, 3, 7)),
    (320, 1, 6, 7),
)
AUTHORS_LAYER = re.compile(
    r"(?:blocks\.(?P<block>\d+)\.(?:mobile_inverted_conv|conv)\.(?P<part>inverted_bottleneck|depth_conv|point_linear)"
    r"|(?P<end>first_conv|feature_mix_layer))\.(?P<layer>conv|bn)\.(?P<tensor>\w+)"
)
AUTHORS_HEAD = "classifier.linear."


class ProxylessNAS(nn.Module):
    """The network, with layers named as in torchvision's MobileNetV2."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_convolution(3, STEM, 3, stride=2)]
        channels = STEM
        for outputs, stride, expansion, kernel in BLOCKS:
            layers.append(_block(channels, outputs, stride, expansion, kernel))
            channels = outputs
        layers.append(_convolution(channels, FEATURES, 1))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(FEATURES, CLASSES)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out")
            elif isinstance(layer, nn.BatchNorm2d):
                layer.eps = NORM_EPS

    def forward(self, images: Tensor) -> Tensor:
        """``[N, 3, H, W]`` to ``[N, classes]``."""
        return self.classifier(self.flatten(self.pool(self.features(images))))


def build(name: str) -> nn.Module:
    """The network with random weights."""
    return ProxylessNAS()


def head_name(name: str, backbone: nn.Module) -> str:
    """Name of the classifier."""
    return HEAD


def from_authors(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors of the authors' file under our names; those of another file come back as they are.

    Their blocks are numbered with gaps, as some were searched away, and their norms follow their convolutions.
    """
    found = {name: match for name in tensors if (match := AUTHORS_LAYER.fullmatch(name))}
    if not found:
        return tensors
    numbers = sorted({int(match["block"]) for match in found.values() if match["block"]})
    place = {number: i + 1 for i, number in enumerate(numbers)}
    ours = {}
    for name, tensor in tensors.items():
        match = found.get(name)
        if match is not None:
            ours[_our_name(match, place, len(numbers))] = tensor
        else:
            ours[name.replace(AUTHORS_HEAD, f"{HEAD}.")] = tensor
    return ours


def _our_name(match: re.Match[str], place: Mapping[int, int], blocks: int) -> str:
    layer, tensor = int(match["layer"] == "bn"), match["tensor"]
    if match["end"]:
        return f"features.{0 if match['end'] == 'first_conv' else blocks + 1}.{layer}.{tensor}"
    block = place[int(match["block"])]
    shift = 0 if BLOCKS[block - 1][2] == 1 else 1  # whether an expansion comes first
    if match["part"] == "point_linear":
        return f"features.{block}.conv.{1 + shift + layer}.{tensor}"
    part = 0 if match["part"] == "inverted_bottleneck" else shift
    return f"features.{block}.conv.{part}.{layer}.{tensor}"


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> Conv2dNormActivation:
    return Conv2dNormActivation(inputs, outputs, kernel, stride, activation_layer=nn.ReLU6)


def _block(inputs: int, outputs: int, stride: int, expansion: int, kernel: int) -> InvertedResidual:
    """An inverted residual with a depthwise convolution of any size."""
    block = InvertedResidual(inputs, outputs, stride, expansion)
    depthwise = block.conv[-3]
    middle = depthwise[0].in_channels
    depthwise[0] = nn.Conv2d(middle, middle, kernel, stride, kernel // 2, groups=middle, bias=False)
    return block
