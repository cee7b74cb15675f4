"""Training the last blocks only: what trains, what it keeps, and that nothing else differs."""

import json

import pytest
import torch
import torch.nn.functional as F
from shared import run_cli, slow, small_run
from started_runs import metrics

from tinytl_hf import TinyTLModel
from tinytl_hf.errors import TinyTLError
from tinytl_hf.measure.ledger import kept_by_layer
from tinytl_hf.measure.measured_step import random_batch
from tinytl_hf.measure.paper_rule import paper_rule

NETS = {"mobilenet_v2": 17, "mnasnet1_0": 16, "resnet18": 8, "efficientnet_b0": 16, "convnext_tiny": 18}


def gradients(model, images, labels):
    F.cross_entropy(model.train()(images), labels).backward()
    return {name: p.grad for name, p in model.backbone.named_parameters() if p.requires_grad}


def waken(model):
    """Let lite residuals add something, so that gradients flow through all of their layers."""
    for name, parameter in model.backbone.named_parameters():
        if name.endswith("lite_residual.norm2.weight"):
            torch.nn.init.constant_(parameter, 0.5)


@pytest.mark.parametrize(
    ("backbone", "count", "method", "lean"),
    [
        *(slow("mobilenet_v2", 4, "TinyTL-B", True), slow("mobilenet_v2", 4, "TinyTL-L", False)),
        *(("mobilenet_v2", 4, "TinyTL-L+B", lean) for lean in (True, False)),
        *(("resnet18", 3, "TinyTL-L+B", True), ("efficientnet_b0", 3, "TinyTL-L+B", True)),
    ],
)
def test_gradients_are_those_of_the_whole_network(make_model, backbone, count, method, lean):
    part = make_model(method, backbone, trained_blocks=count, train_size=32, lean=lean).double()
    whole = make_model(method, backbone, train_size=32, lean=False).double()
    waken(part)
    missing, unexpected = whole.load_state_dict(part.state_dict(), strict=False)
    assert not unexpected and all("lite_residual" in name for name in missing)
    images, labels = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.arange(4)
    wanted = gradients(whole, images, labels)
    found = gradients(part, images, labels)
    assert 0 < len(found) < len(wanted)
    for name, grad in found.items():
        assert (grad - wanted[name]).abs().max() <= 1e-9 * (1 + wanted[name].abs().max()), name


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "resnet18", "mobilenet_v3_small", "convnext_tiny"])
def test_images_whose_gradient_is_wanted_get_it(backbone, make_model):
    found = []
    for lean in (True, False):
        model = make_model("TinyTL-B", backbone, trained_blocks=2, train_size=32, lean=lean).double()
        images = torch.linspace(-1, 1, 4 * 3 * 32 * 32, dtype=torch.float64).view(4, 3, 32, 32).requires_grad_()
        found.append([*gradients(model, images, torch.arange(4)).values(), images.grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["TinyTL-L+B", "FT-Full", "FT-Norm+Last", "FT-Layerwise"])
def test_what_stands_before_stays_as_it_is_its_statistics_too(make_model, method):
    model = make_model(method, trained_blocks=5, train_size=32)
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1)
    gradients(model, torch.randn(4, 3, 32, 32), torch.arange(4))
    optimizer.step()
    changed = {name for name, tensor in model.backbone.state_dict().items() if not torch.equal(tensor, before[name])}
    first = min(int(name.split(".")[1]) for name in changed if name.startswith("features."))
    assert first == 13  # of features.0 to features.18, of which 1 to 17 are blocks
    assert changed <= model.adapter_tensors().keys() | {n for n in before if n.endswith("num_batches_tracked")}


@pytest.mark.parametrize("method", [slow("TinyTL-B"), "TinyTL-L+B"])
@pytest.mark.parametrize("backbone", NETS)
def test_it_starts_as_the_backbone_and_goes_on_from_the_maps_of_the_prefix(make_model, backbone, method):
    images = torch.randn(3, 3, 64, 64)
    plain = make_model("FT-Last", backbone).eval()
    for lean in (True, False):
        model = make_model(method, backbone, trained_blocks=2, lean=lean).eval()
        model._head.load_state_dict(plain._head.state_dict())
        with torch.no_grad():
            assert torch.equal(model(images), plain(images))
            maps = model.prefix.maps(images)
            assert maps.ndim == 4 and maps.shape[1] > 3
            assert torch.equal(model(maps), plain(images))


@pytest.mark.parametrize(("backbone", "count"), NETS.items())
def test_counts_that_do_not_fit_are_refused(make_model, backbone, count):
    make_model(backbone=backbone, trained_blocks=count)
    for wrong in (0, -1, count + 1):
        with pytest.raises(TinyTLError, match=f"trained_blocks={wrong}: .* {count} residual blocks; use 1 to {count}"):
            make_model(backbone=backbone, trained_blocks=wrong)


@pytest.mark.parametrize("lean", [True, False])
def test_the_prefix_keeps_nothing_for_the_backward_pass(make_model, lean):
    whole, part = (make_model(trained_blocks=count, lean=lean).train() for count in (None, 6))
    pixels, labels = random_batch(whole, 4)
    images = pixels.float()
    kept = [kept_by_layer(model, images, labels) for model in (whole, part)]
    assert all(int(name.split(".")[1]) >= 12 for name in kept[1] if name.startswith("features."))
    assert sum(kept[1].values()) < 0.25 * sum(kept[0].values())
    assert paper_rule(part, 4) < paper_rule(whole, 4)


@pytest.mark.slow
def test_a_run_of_the_last_blocks_is_resumed_evaluated_switched_merged_and_says_so(colour_folder, tmp_path):
    options = ["--trained_blocks", "3", "--train.schedule", "constant"]
    whole = run_cli(*small_run(colour_folder, tmp_path / "whole", *options))
    first = run_cli(*small_run(colour_folder, tmp_path / "parts", *options, "--train.epochs", "1"))
    second = run_cli(*small_run(colour_folder, tmp_path / "parts", *options, "--train.resume", "auto"))
    assert [done.returncode for done in (whole, first, second)] == [0, 0, 0], second.stderr
    assert metrics(tmp_path / "whole")[-1]["eval"] == metrics(tmp_path / "parts")[-1]["eval"]
    adapter = tmp_path / "whole" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["trained_blocks"] == 3
    results = json.loads((tmp_path / "whole" / "eval_results.json").read_text())
    assert results["trained_blocks"] == 3
    assert "only the last 3 blocks" in (adapter / "README.md").read_text()
    model = TinyTLModel.from_pretrained(adapter)
    assert {name.split(".")[1] for name in model.adapter_tensors() if "lite_residual" in name} == {"15", "16", "17"}
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = model.eval()(images)
        other = TinyTLModel.from_backbone("mobilenet_v2", num_classes=2, weights="none", train_size=64).eval()
        other.load_adapter(adapter, "last")
        with other.using("last"):
            assert torch.equal(other(images), logits)
            assert torch.equal(other(other.prefix.maps(images)), logits)
    merged = tmp_path / "merged.safetensors"
    assert run_cli("merge", "--adapter", adapter, "--output", merged).returncode == 0
    again = tmp_path / "again.json"
    assert run_cli("eval", "--adapter", adapter, "--output", again, "--batch_size", "8").returncode == 0
    assert json.loads(again.read_text())["loss"] == results["loss"]


def test_the_last_blocks_of_the_head_alone_make_no_sense(colour_folder, tmp_path):
    done = run_cli(*small_run(colour_folder, tmp_path / "run", "--method", "FT-Last", "--trained_blocks", "3"))
    assert done.returncode == 1 and "trained_blocks=3: FT-Last trains no block" in done.stderr


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("lean", [True, False])
def test_what_is_neither_an_image_nor_a_map_of_the_prefix_is_named(lean, channels, make_model):
    model = make_model("TinyTL-B", trained_blocks=2, lean=lean)
    for mode in (True, False):
        with pytest.raises(TinyTLError, match=rf"shape \[2, {channels}, 64, 64\]: use \[images, 3, .*\[images, 160, "):
            model.train(mode)(torch.zeros(2, channels, 64, 64))
