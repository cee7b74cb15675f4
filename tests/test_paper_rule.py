import copy

import pytest
from shared import METHODS, assert_left_as_found, state_of
from torch import nn
from torchvision.models._api import BUILTIN_MODELS
from torchvision.models.convnext import LayerNorm2d

from tinytl_hf.measure.paper_rule import paper_rule
from tinytl_hf.network.backbones import SAME_TENSORS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def two_convolutions(monkeypatch):
    """The name under which torchvision then knows :class:`TwoConvolutions`, as one of its own."""

    def make(weights=None):
        return TwoConvolutions()

    make.__module__ = "torchvision.models.two_convolutions"
    monkeypatch.setitem(BUILTIN_MODELS, "two_convolutions", make)
    return "two_convolutions"


def test_paper_rule_gives_the_papers_figure_of_full_fine_tuning(make_model):
    # Figure 4 of the paper: MobileNetV2, 100 classes, 224 px, batch 8.
    assert paper_rule(make_model("FT-Full", num_classes=100, train_size=224), 8) / 1e6 == pytest.approx(447.8, abs=0.2)


def test_training_biases_takes_little_more_than_training_the_head_by_the_papers_rule(make_model):
    # Section 3.1: biases need no activations, only a bit for each value of a ReLU.
    mb = {m: paper_rule(make_model(m, num_classes=10, train_size=224), 8) / 1e6 for m in METHODS}
    assert mb["FT-Last"] < mb["TinyTL-B"] < 1.03 * mb["FT-Last"]
    assert mb["TinyTL-B"] < mb["TinyTL-L"] <= mb["TinyTL-L+B"] < mb["FT-Norm+Last"] < mb["FT-Full"]
    assert mb["FT-Full"] > 6.5 * mb["TinyTL-L+B"]  # "up to 6.5x", abstract
    assert mb["FT-Layerwise"] == mb["FT-Full"]


PIXELS = 32 * 32


class TwoConvolutions(nn.Module):
    """3 -> 4 -> 8 channels on maps of one size, two classes."""

    def __init__(self):
        super().__init__()
        first = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        second = nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.features = nn.Sequential(*first, *second)
        self.classifier = nn.Linear(8, 1000)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("method", "kept_and_run", "trained"),
    [
        # Nothing is kept; the second convolution takes its input and output, 4 and 8 maps.
        ("FT-Last", 4 * PIXELS * (4 + 8), 18),
        # As much, and a bit for each value of the first ReLU.
        ("TinyTL-B", 4 * PIXELS * (4 + 8) + 4 * PIXELS // 8, 18 + 4 + 8),
        # Inputs of both convolutions and both norms, the first ReLU's bits, and what the second ReLU reads.
        ("FT-Full", 4 * PIXELS * (3 + 4 + 4 + 8 + 8) + 4 * PIXELS // 8, 182),
    ],
)
def test_paper_rule_of_two_convolutions_by_hand(method, kept_and_run, trained, make_model, two_convolutions):
    # 182 parameters: 4 * 3 * 9 and 4 * 8 weights, 2 * 4 and 2 * 8 of the norms, 8 * 2 + 2 of the head.
    model = make_model(method, two_convolutions, num_classes=2, train_size=32)
    assert paper_rule(model, 5) == 5 * kept_and_run + 4 * trained + (182 - trained)  # frozen ones in 8 bits


@pytest.mark.parametrize("name", ["convnext_tiny", "efficientnet_b0", "mobilenet_v2", "resnet18"])
def test_paper_rule_of_a_network_is_the_same_in_both_libraries(name, make_model):
    pytest.importorskip("timm", reason="the extra timm is not installed")
    twin = SAME_TENSORS.get(name, f"timm/{name}")
    ours, theirs = (paper_rule(make_model("TinyTL-B", each, num_classes=10), 8) for each in (name, twin))
    assert theirs == pytest.approx(ours, rel=0.01)  # ConvNeXt's last norm is a part of the head in one of them


class Normed(nn.Module):
    """Four maps through a norm between convolutions of one pixel."""

    def __init__(self, norm):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Conv2d(4, 4, 1, bias=False))
        self.classifier = nn.Linear(4, 1000)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


@pytest.mark.parametrize(("norm", "is_kept"), [(nn.BatchNorm2d(4), 0), (nn.GroupNorm(2, 4), 1), (LayerNorm2d(4), 1)])
def test_a_frozen_norm_with_statistics_of_its_own_keeps_its_input_by_the_papers_rule(
    norm, is_kept, make_model, monkeypatch
):
    def make(weights=None):
        return Normed(copy.deepcopy(norm))

    make.__module__ = "torchvision.models.normed"
    monkeypatch.setitem(BUILTIN_MODELS, "normed", make)
    model = make_model("TinyTL-B", "normed", num_classes=2, train_size=32)
    weights = sum(p.numel() * (4 if p.requires_grad else 1) for p in model.parameters())
    run = 4 * PIXELS * (4 + 4)  # the second convolution's input and output
    assert paper_rule(model, 5) == 5 * (run + is_kept * 4 * PIXELS * 4) + weights


def test_paper_rule_does_not_depend_on_the_engine_and_leaves_the_model_alone(make_model):
    lean, stock = make_model(), make_model(lean=False)
    before = state_of(lean)
    lean.backbone.features[0].eval()
    assert paper_rule(lean, 2) == paper_rule(stock, 2)
    assert lean.training and not lean.backbone.features[0].training
    assert_left_as_found(lean, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lean.modules())


def test_paper_rule_by_hand_where_the_widest_layer_decides(make_model):
    model = make_model("FT-Last", train_size=32)
    # features.2's expansion reads 16 and writes 96 channels of 16x16 px; nothing is kept before it.
    expected = 4 * 16 * 16 * (16 + 96)
    trained = 1281 * 4
    frozen = sum(p.numel() for p in model.parameters()) - trained
    assert paper_rule(model, 3) == 3 * expected + 4 * trained + frozen
    assert paper_rule(model, 3, frozen_bits=32) == 3 * expected + 4 * (trained + frozen)


@pytest.mark.parametrize("backbone", ["mobilenet_v3_small", "efficientnet_b0", "mnasnet1_0", "resnet18"])
def test_paper_rule_ranks_the_methods_on_other_backbones(make_model, backbone):
    figures = [
        paper_rule(make_model(method, backbone=backbone), 8)
        for method in ("FT-Last", "TinyTL-B", "TinyTL-L+B", "FT-Full")
    ]
    assert figures == sorted(figures)
