"""ProxylessNAS-Mobile, the backbone of the TinyTL paper: counts, the authors' weights, memory by the paper's rule."""

import pytest
import torch
from shared import METHODS, slow
from torch import nn

from tinytl_hf import TinyTLError, TinyTLModel, load_merged
from tinytl_hf.config.verbs import MergeConfig
from tinytl_hf.deploy.merge import merge
from tinytl_hf.measure.paper_rule import paper_rule
from tinytl_hf.network import proxylessnas
from tinytl_hf.network.backbones import create_backbone

NAME = "proxylessnas_mobile"


def authors_names(network):
    """The tensors as the authors' file names them, with gaps where blocks were searched away."""
    names = {}
    for key in network.state_dict():
        kind, *path = key.split(".")
        if kind == "classifier":
            names[key] = f"classifier.linear.{path[0]}"
            continue
        number, tensor = int(path[0]), path[-1]
        if number in (0, len(network.features) - 1):
            names[key] = (
                f"{'feature_mix_layer' if number else 'first_conv'}.{'bn' if path[1] == '1' else 'conv'}.{tensor}"
            )
            continue
        block = network.features[number].conv
        parts = ["inverted_bottleneck", "depth_conv"][-(len(block) - 2) :]
        at = int(path[2])
        part, layer = (parts[at], path[3]) if at < len(parts) else ("point_linear", str(at - len(parts)))
        gap = number - 1 + (2 if number > 3 else 0)
        names[key] = f"blocks.{gap}.mobile_inverted_conv.{part}.{'bn' if layer == '1' else 'conv'}.{tensor}"
    return names


def test_parameters_and_operations_are_the_published_ones():
    network, operations = proxylessnas.build(NAME).eval(), []
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(
                lambda layer, _, maps: operations.append(maps[0, 0].numel() * layer.weight.numel())
            )
    with torch.no_grad():
        network(torch.zeros(1, 3, 224, 224))
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_080_512  # 4.1 M
    assert sum(operations) == 320_427_584  # multiplications and additions: 320 M


def test_the_authors_file_loads_under_its_own_names(tmp_path):
    torch.manual_seed(0)
    network = proxylessnas.build(NAME)
    theirs = {authors_names(network)[key]: tensor for key, tensor in network.state_dict().items()}
    assert len(theirs) == len(network.state_dict())
    torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in theirs.items()}}, tmp_path / "p.pth")
    ours = create_backbone(NAME, str(tmp_path / "p.pth"), 10).state_dict()
    for key, tensor in network.state_dict().items():
        assert key.startswith("classifier") or key.endswith("tracked") or torch.equal(ours[key], tensor), key
    del theirs["blocks.9.mobile_inverted_conv.depth_conv.conv.weight"]
    torch.save(theirs, tmp_path / "q.pth")
    with pytest.raises(TinyTLError, match="1 tensor is missing"):
        create_backbone(NAME, str(tmp_path / "q.pth"), 10)
    with pytest.raises(TinyTLError, match="name the authors' file"):
        TinyTLModel.from_backbone(NAME, num_classes=2)


@pytest.mark.parametrize("method", [m if m in ("TinyTL-L+B", "FT-Full") else slow(m) for m in METHODS])
def test_every_method_trains_it_and_lean_is_stock(method, make_model):
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for lean in (True, False):
        model = make_model(method, NAME, lean=lean).double().train()
        for key, parameter in model.backbone.named_parameters():
            if key.endswith("lite_residual.norm2.weight"):
                nn.init.constant_(parameter, 0.3)
        output = model(images)
        output.square().sum().backward()
        results.append((output, [parameter.grad for parameter in model.trainable_parameters()]))
        assert not lean or "FT" in method or set(model.training_paths.values()) == {"masks"}
    (ours, our_grads), (theirs, their_grads) = results
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    largest = max(gradient.abs().max() for gradient in their_grads)
    assert all((one - two).abs().max() <= 1e-9 * largest for one, two in zip(our_grads, their_grads, strict=True))


# Analytic, MB of 1e6 bytes: 100 classes, 224 px, batch 8; and table 2 of the paper, which is 5 to 7 % above ours.
PAPER = {"FT-Last": (29.0, 31), "TinyTL-B": (29.9, 32), "FT-Norm+Last": (183.0, 192), "FT-Full": (367.0, 391)}


def of_paper(method):
    return TinyTLModel.from_backbone(NAME, method=method, num_classes=100, weights="none", lean=False)


@pytest.mark.parametrize("method", PAPER)
def test_memory_by_the_papers_rule(method):
    ours, papers = PAPER[method]
    found = paper_rule(of_paper(method), 8) / 1e6
    assert found == pytest.approx(ours, abs=0.1)
    assert 0.93 < found / papers < 0.96


@pytest.mark.parametrize("method", ["TinyTL-L", "TinyTL-L+B"])
def test_without_a_lite_residual_on_the_first_block_memory_is_the_papers(method):
    """The authors' code gives none to the first block, whose maps are the largest; here each block has one."""
    model = of_paper(method)
    assert paper_rule(model, 8) / 1e6 == pytest.approx(48.5, abs=0.1)
    model.backbone.features[1].lite_residual = None
    assert paper_rule(model, 8) / 1e6 == pytest.approx(37.1, abs=0.1)  # of the paper: 37


def test_a_merged_file_names_the_way_to_load_it(make_model, tmp_path):
    model = make_model("TinyTL-B", NAME)
    model.save_pretrained(tmp_path / "adapter")
    told = merge(MergeConfig(str(tmp_path / "adapter"), str(tmp_path / "m.safetensors")))
    assert told.endswith(f'load it with tinytl_hf.load_merged("{tmp_path / "m.safetensors"}")')
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(load_merged(tmp_path / "m.safetensors").eval()(images), model.eval()(images))
