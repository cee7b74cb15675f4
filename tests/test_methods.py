import copy

import pytest
import torch
from shared import BACKBONES, METHODS, slow
from torch import nn

from tinytl_hf import TinyTLError
from tinytl_hf.config.network import LiteConfig
from tinytl_hf.network import torchvision_nets
from tinytl_hf.network.lite_residual import LiteResidual, fit_kernel
from tinytl_hf.network.methods import METHODS as TABLE

# MobileNetV2 at 224 px with 10 classes: the head has 12,810 parameters, the norms 17,056 biases and as many
# scales, the lite residuals (k 5) 1,131,200, of which 1,504 are biases of their last norms.
MOBILENET_COUNTS = {
    "FT-Last": 12_810,
    "TinyTL-B": 12_810 + 17_056,
    "TinyTL-L": 12_810 + 1_131_200,
    "TinyTL-L+B": 12_810 + 1_131_200 - 1_504 + 17_056,
    "FT-Norm+Last": 12_810 + 2 * 17_056,
    "FT-Full": 2_236_682,
    "FT-Layerwise": 2_236_682,
}


def expected_trainable(model, method):
    """The methods table, told again from the modules."""
    backbone, expected = model.backbone, set()
    head = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)][-1]
    for name, _ in backbone.named_parameters():
        owner = backbone.get_submodule(name.rpartition(".")[0])
        in_lite, in_head = ".lite_residual." in name, name.rpartition(".")[0] == head
        is_norm = isinstance(owner, (nn.BatchNorm2d, nn.LayerNorm)) or name.endswith(".layer_scale")
        is_bias = name.endswith(".bias")
        wanted = {
            "FT-Last": in_head,
            "TinyTL-B": in_head or is_bias,
            "TinyTL-L": in_head or in_lite,
            "TinyTL-L+B": in_head or (in_lite and not name.endswith("norm2.bias")) or (is_bias and not in_lite),
            "FT-Norm+Last": in_head or is_norm,
            "FT-Full": True,
            "FT-Layerwise": True,
        }[method]
        if wanted:
            expected.add(name)
    return expected


def train_steps(model, steps=3, lr=1e-3):
    # Gradients of a network with random weights are tiny; with this epsilon Adam moves by them all the same.
    optimizer = torch.optim.Adam(model.parameter_groups(lr, 0.0), eps=1e-30)
    model.train()
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        images, labels = torch.randn(6, 3, 64, 64, generator=generator), torch.arange(6) % 4
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


@pytest.mark.parametrize("method", METHODS)
def test_mobilenet_trains_as_many_parameters_as_the_paper_counts(method, make_model):
    model = make_model(method, num_classes=10, train_size=224)
    assert sum(p.numel() for p in model.trainable_parameters()) == MOBILENET_COUNTS[method]


def all_of_mobilenet_and_one_of_others():
    """Pairs of methods and backbones; the slow tests have the rest."""
    for backbone in BACKBONES:
        for method in METHODS:
            quick = backbone == "mobilenet_v2" or method == "TinyTL-L+B"
            yield pytest.param(method, backbone, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("method", "backbone"), list(all_of_mobilenet_and_one_of_others()))
def test_each_method_trains_what_its_row_of_the_table_says(method, backbone, make_model):
    model = make_model(method, backbone)
    trainable = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert trainable == expected_trainable(model, method)


@pytest.mark.parametrize("method", METHODS)
def test_training_changes_the_adapter_and_nothing_else(method, make_model):
    model = make_model(method)
    before = copy.deepcopy(model.backbone.state_dict())
    train_steps(model)
    adapter = model.adapter_tensors()
    changed = {name for name, t in model.backbone.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == set(adapter), method
    lite = {name for name in adapter if ".lite_residual." in name}
    assert bool(lite) == TABLE[method].lite_residual
    statistics = {name for name in adapter if "running_" in name and name not in lite}
    assert bool(statistics) == TABLE[method].batch_statistics


def test_an_optimizer_gets_each_trained_parameter_once_and_no_decay_on_biases_and_norms(make_model):
    model = make_model("FT-Full")
    groups = model.parameter_groups(lr=1.0, weight_decay=0.1)
    parameters = [p for group in groups for p in group["params"]]
    assert len(parameters) == len({id(p) for p in parameters}) == len(list(model.trainable_parameters()))
    for group in groups:
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] == 0.1}
    assert {group["weight_decay"] for group in model.parameter_groups(1.0, 0.1, decay_all=True)} == {0.1}


def test_layer_scales_are_scales_of_norms_which_never_decay(make_model):
    model = make_model("FT-Norm+Last", "convnext_tiny")
    scales = [p for name, p in model.backbone.named_parameters() if name.endswith("layer_scale")]
    assert len(scales) == 18 and all(p.requires_grad and p.ndim == 3 for p in scales)
    (decays,) = (group for group in model.parameter_groups(1.0, 0.1) if group["weight_decay"])
    assert [tuple(p.shape) for p in decays["params"]] == [(4, 768)]
    assert not any(p.ndim == 3 and p.requires_grad for p in make_model("TinyTL-B", "convnext_tiny").parameters())


def test_layerwise_rates_are_1_and_06_and_04(make_model):
    model = make_model("FT-Layerwise")
    names = {id(p): name for name, p in model.backbone.named_parameters()}
    rates = {}
    for group in model.parameter_groups(lr=1.0, weight_decay=0.1):
        for parameter in group["params"]:
            part = names[id(parameter)].split(".")
            rates.setdefault(part[0] if part[0] == "classifier" else int(part[1]), set()).add(group["lr"])
    assert rates.pop("classifier") == {1.0}
    assert rates == {i: {0.6} if i >= 14 else {0.4} for i in range(19)}


@pytest.mark.parametrize("method", ["TinyTL-L", "TinyTL-L+B", "FT-Layerwise"])
def test_a_backbone_without_blocks_says_which_methods_it_supports(method, make_model):
    with pytest.raises(TinyTLError, match=r"supports FT-Last, TinyTL-B, FT-Norm\+Last and FT-Full"):
        make_model(method, "shufflenet_v2_x0_5")


@pytest.mark.parametrize(
    ("method", "backbone", "warns"),
    [
        ("FT-Norm+Last", "alexnet", True),  # which has no norms
        ("TinyTL-B", "alexnet", False),
        ("FT-Last", "alexnet", False),
        ("FT-Norm+Last", "shufflenet_v2_x0_5", False),
    ],
)
def test_a_method_that_finds_nothing_to_train_but_the_head_says_so(
    method, backbone, warns, make_model, monkeypatch, caplog
):
    def build(name):  # without the 54 million weights between its maps and its classifier
        network = get(name)
        if name == "alexnet":
            network.classifier = nn.Sequential(nn.Flatten(), nn.Linear(256 * 6 * 6, 7))
        return network

    get = torchvision_nets.build
    monkeypatch.setattr(torchvision_nets, "build", build)
    model = make_model(method, backbone, train_size=64 if backbone != "alexnet" else 96)
    more = {name for name, p in model.backbone.named_parameters() if p.requires_grad and "bias" in name}
    assert (len(more) == 1) == (warns or method == "FT-Last")
    assert ("the head alone, as by FT-Last" in caplog.text) == warns


@pytest.mark.slow
def test_a_backbone_without_blocks_trains_by_the_others(make_model):
    assert sum(p.numel() for p in make_model("FT-Last", "vgg11_bn").trainable_parameters()) == 4096 * 4 + 4


def test_a_parameter_of_unknown_role_is_refused(make_model):
    with pytest.raises(TinyTLError, match=r"class_token belongs to a VisionTransformer"):
        make_model("FT-Last", "vit_b_16", train_size=224)


@pytest.mark.parametrize("alias", ["finetune", "fintune", "norm+last", "deep", "bias", "low"])
def test_the_old_scripts_names_are_accepted(alias, make_model):
    expected = {"bias": "TinyTL-B", "norm+last": "FT-Norm+Last", "deep": "FT-Full", "low": "FT-Layerwise"}
    assert make_model(alias).config.method == expected.get(alias, "FT-Last")


def test_an_unknown_method_is_named(make_model):
    with pytest.raises(TinyTLError, match=r"method=TinyTL: use one of FT-Last"):
        make_model("TinyTL")


@pytest.mark.parametrize(
    ("method", "backbone"),
    [
        *(pytest.param(method, "mobilenet_v2", marks=pytest.mark.slow) for method in METHODS if method != "FT-Full"),
        *(("FT-Full", "mobilenet_v2"), ("TinyTL-L+B", "resnet18")),
    ],
)
def test_gradient_checkpointing_changes_no_gradient_and_no_statistic(method, backbone, make_model):
    results = []
    for checkpointing in (False, True):
        model = make_model(method, backbone, gradient_checkpointing=checkpointing, lean=False).double()
        if TABLE[method].lite_residual:  # so that the branch matters from the first step
            for module in model.modules():
                if isinstance(module, LiteResidual):
                    nn.init.ones_(module.norm2.weight)
        kept = 0

        def pack(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        images = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model.train()(images).square().mean()
        loss.backward()
        gradients = {name: p.grad for name, p in model.backbone.named_parameters() if p.requires_grad}
        results.append((gradients, model.adapter_tensors(), kept))
    (plain, plain_state, plain_kept), (recomputed, recomputed_state, recomputed_kept) = results
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-12, rtol=1e-9)
    for name, tensor in plain_state.items():
        assert torch.equal(recomputed_state[name], tensor), name
    assert recomputed_kept <= plain_kept * (1 if method == "FT-Last" else 0.6)


def test_kernels_shrink_to_the_pooled_map():
    sizes = [(112, 5, True), (10, 5, True), (9, 3, True), (6, 3, True), (5, 1, True), (4, 1, True)]
    sizes += [(3, 1, False), (2, 1, False), (1, 1, False)]
    for map_size, kernel, pools in sizes:
        assert fit_kernel(5, map_size) == (kernel, pools), map_size
    assert fit_kernel(3, 112) == (3, True)


@pytest.mark.parametrize("train_size", [32, 33, slow(64), 97, slow(224)])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_lite_residuals_fit_any_size(train_size, norm, make_model):
    model = make_model("TinyTL-L", train_size=train_size, lite=LiteConfig(norm=norm)).train()
    images = torch.randn(2, 3, train_size, train_size)
    model(images).sum().backward()
    gradients = [m.norm2.weight.grad for m in model.modules() if isinstance(m, LiteResidual)]
    assert len(gradients) == 17 and all(g is not None and g.abs().sum() > 0 for g in gradients)


def test_group_norm_trains_with_a_batch_of_one(make_model):
    model = make_model("TinyTL-L+B", lite=LiteConfig(norm="group")).train()
    norms = [m.norm1 for m in model.modules() if isinstance(m, LiteResidual)]
    assert all(norm.num_channels // norm.num_groups == 8 for norm in norms)
    for norm in [m.norm2 for m in model.modules() if isinstance(m, LiteResidual)]:
        nn.init.ones_(norm.weight)  # so that the whole branch gets a gradient
    model(torch.randn(1, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.trainable_parameters())


def test_an_impossible_number_of_groups_is_named(make_model):
    with pytest.raises(TinyTLError, match=r"lite.groups=3: must divide .*; use 1 or 2$"):
        make_model("TinyTL-L", lite=LiteConfig(groups=3))
