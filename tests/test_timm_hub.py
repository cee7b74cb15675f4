"""Backbones of timm on the Hub: their weights, their adapters, and what is no model of timm."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hub_server import READER, File
from safetensors.torch import save, save_file
from shared import ROOT, run_cli
from test_timm import error_of

from tinytl_hf import TinyTLError, TinyTLModel
from tinytl_hf.network import timm_nets, torchvision_nets
from tinytl_hf.network.backbones import IMAGENET_MEAN, find_backbone

timm = pytest.importorskip("timm")
CONFIG = {"architecture": "test_efficientnet", "num_classes": 1000}
PRETRAINED = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "crop_pct": 0.95, "interpolation": "bilinear"}
REPO = "timm/test_efficientnet.r160_in1k"


def random_weights(name, seed=3):
    torch.manual_seed(seed)
    return timm.create_model(name).state_dict()


@pytest.fixture
def hub(server):
    """The test server with a repository of a timm model, made as timm makes them."""
    config = {**CONFIG, "pretrained_cfg": {**PRETRAINED, "license": "mit"}}
    files = {
        "model.safetensors": save(random_weights("test_efficientnet")),
        "config.json": json.dumps(config).encode(),
    }
    server.add_repo(REPO, files)
    return server


def test_weights_of_the_hub_are_pinned_to_their_commit_and_load_later_and_offline(hub, tmp_path, monkeypatch):
    model = TinyTLModel.from_backbone(f"{REPO}", method="TinyTL-B", num_classes=3, train_size=64)
    commit = hub.repos[REPO].refs["main"]
    record = model.config.backbone
    assert record.name == REPO and record.weights == f"hf-hub:{REPO}@{commit}"
    model.save_pretrained(tmp_path / "adapter")
    hub.repos[REPO].commit("main", "other weights", {})
    images = torch.randn(2, 3, 64, 64)
    again = TinyTLModel.from_pretrained(tmp_path / "adapter")
    assert torch.equal(again.eval()(images), model.eval()(images))
    asked = len(hub.requests)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    TinyTLModel.from_pretrained(tmp_path / "adapter")
    assert len(hub.requests) == asked
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(
        TinyTLError, match=r"model.safetensors is not in the cache .*`hf download timm/test_eff"
    ) as error:
        TinyTLModel.from_pretrained(tmp_path / "adapter")
    assert "\n" not in str(error.value) and f"--revision {commit}" in str(error.value)


def test_weights_of_another_tag_than_the_default_one_bring_their_own_preprocessing(server):
    repo = "timm/mobilenetv3_large_100.miil_in21k_ft_in1k"
    server.add_repo(repo, {"model.safetensors": b"not read"})
    for name in ("timm/mobilenetv3_large_100", repo):
        found = find_backbone(name, f"hf-hub:{repo}")
        assert found.name == repo and (found.mean, found.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        assert found.weights == f"hf-hub:{repo}@{server.repos[repo].refs['main']}"
    assert find_backbone("timm/mobilenetv3_large_100", "none").mean == IMAGENET_MEAN


@pytest.mark.parametrize(
    ("name", "weights", "found_name"),
    [
        ("resnet34", "timm/resnet34.ra4_e3600_r224_in1k", "resnet34"),
        ("efficientnet_b0", "timm/efficientnet_b0.ra4_e3600_r224_in1k", "efficientnet_b0"),
        ("timm/resnet34.a1_in1k", "timm/resnet34.ra4_e3600_r224_in1k", "timm/resnet34.ra4_e3600_r224_in1k"),
    ],
)
def test_weights_bring_their_preprocessing_to_a_name_of_torchvision_and_to_another_tag(
    name, weights, found_name, server, caplog
):
    """They were normalised as the network's default weights want it, and so gave other features."""
    server.add_repo(weights, {"model.safetensors": b"not read"})
    found = find_backbone(name, f"hf-hub:{weights}@main")
    cfg = timm.get_pretrained_cfg(weights.removeprefix("timm/"))
    assert (found.mean, found.std) == ((0.5,) * 3, (0.5,) * 3) == (cfg.mean, cfg.std)
    assert (found.crop_pct, found.interpolation, found.license) == (cfg.crop_pct, cfg.interpolation, cfg.license)
    assert found.name == found_name and found.weights.startswith(f"hf-hub:{weights}@")
    assert find_backbone(name, "none").mean == IMAGENET_MEAN and caplog.text == ""


@pytest.mark.parametrize(
    ("name", "weights", "said"),
    [
        (
            "efficientnet_b0",
            "timm/tf_efficientnet_b0.in1k",
            "are weights of timm/tf_efficientnet_b0, and the network is",
        ),
        ("timm/efficientnet_b0", "timm/tf_efficientnet_b0.in1k", "and the network is timm/efficientnet_b0"),
        ("resnet34", "me/resnet", "normalised, cropped and resized as for resnet34; of a timm model"),
        ("timm/resnet34", "me/resnet", "backbone.name=hf-hub:me/resnet takes what its config says"),
    ],
)
def test_weights_of_another_network_and_of_no_description_are_named(name, weights, said, server, caplog):
    caplog.set_level("INFO")
    server.add_repo(weights, {"model.safetensors": b"not read"})
    found = find_backbone(name, f"hf-hub:{weights}")
    assert said in caplog.text and found.name.partition(".")[0] == name


@pytest.fixture
def pushed(hub, tmp_path, monkeypatch):
    """An adapter on the Hub whose base is there, too; the cache that follows is empty."""
    model = TinyTLModel.from_backbone(REPO, method="TinyTL-B", num_classes=3, train_size=64)
    model.push_to_hub("me/flowers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    return model


def downloads(hub):
    """How often the base's weights were fetched."""
    return sum(verb == "GET" and REPO in path and "model.safetensors" in path for verb, path in hub.requests)


def test_the_options_of_a_download_hold_for_an_adapter_and_its_base(pushed, hub, tmp_path):
    images, cache, before = torch.randn(2, 3, 64, 64), tmp_path / "own", downloads(hub)
    with pytest.raises(TinyTLError, match="loading it from the Hub failed"):
        TinyTLModel.from_pretrained("me/flowers", cache_dir=cache, local_files_only=True)
    TinyTLModel.from_pretrained("me/flowers", cache_dir=cache)
    assert {path.name for path in cache.glob("models--*")} == {
        "models--me--flowers",
        f"models--{REPO}".replace("/", "--"),
    }
    assert downloads(hub) == before + 1 and not (tmp_path / "empty").exists()
    asked = len(hub.requests)
    model = TinyTLModel.from_pretrained("me/flowers", cache_dir=cache, local_files_only=True)
    model.load_adapter("me/flowers", "again", cache_dir=cache, local_files_only=True)
    assert len(hub.requests) == asked and torch.equal(model.eval()(images), pushed.eval()(images))
    TinyTLModel.from_pretrained("me/flowers", cache_dir=cache, force_download=True)
    assert downloads(hub) == before + 2


def test_a_token_is_for_the_adapter_and_for_its_base(pushed, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    hub.repos[REPO].private = True
    with pytest.raises(TinyTLError, match=f"{REPO}@.*: model.safetensors cannot be had from the Hub"):
        TinyTLModel.from_pretrained("me/flowers")
    model = TinyTLModel.from_pretrained("me/flowers", token=READER)
    model.load_adapter("me/flowers", "again", token=READER, force_download=True)


@pytest.mark.slow
def test_what_one_process_trains_and_pushes_another_one_loads_by_name_though_the_base_has_changed(
    hub, colour_folder, tmp_path
):
    options = ["--backbone.name", REPO, "--data.dataset", colour_folder, "--output_dir", tmp_path / "run"]
    options += ["--data.train_size", "64", "--train.epochs", "1", "--train.global_batch_size", "8"]
    options += ["--train.threads", "1", "--memory.report", "false", "--hub.push", "--hub.repo", "me/colours"]
    done = run_cli("train", *options)
    assert done.returncode == 0, done.stderr
    commit = hub.repos[REPO].refs["main"]
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = TinyTLModel.from_pretrained(tmp_path / "run").eval()(images)
    other = {"model.safetensors": File(save(random_weights("test_efficientnet", seed=4)), large=True)}
    hub.stored[other["model.safetensors"].oid] = other["model.safetensors"].content
    hub.repos[REPO].commit("main", "other weights", other)
    code = (
        "import sys, torch; from tinytl_hf import TinyTLModel\n"
        "images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))\n"
        "model = TinyTLModel.from_pretrained('me/colours').eval()\n"
        "with torch.no_grad(): torch.save((model(images), model.config.backbone.weights), sys.argv[1])"
    )
    fresh = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    fresh |= {"HF_HUB_DISABLE_XET": "1"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "found.pt"], check=True, cwd=ROOT, env=os.environ | fresh)
    logits, source = torch.load(tmp_path / "found.pt")
    assert torch.equal(logits, expected) and source == f"hf-hub:{REPO}@{commit}"
    card = hub.repos["me/colours"].files()["README.md"].content.decode()
    assert f"base_model: {REPO}" in card and "base_model_relation: adapter" in card


def test_a_model_of_the_hub_is_taken_apart_into_network_weights_and_preprocessing(hub, tmp_path):
    model = TinyTLModel.from_backbone(f"hf-hub:{REPO}@main", method="FT-Last", num_classes=2, train_size=64)
    options, record = model.config.preprocessing, model.config.backbone
    assert record.name == "timm/test_efficientnet" and record.weights.startswith(f"hf-hub:{REPO}@")
    assert (options.mean, options.std) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)) and record.license == "mit"
    assert (options.crop_pct, options.interpolation) == (0.95, "bilinear")
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "pretrained_cfg": PRETRAINED}))
    save_file(random_weights("test_efficientnet"), tmp_path / "model.safetensors")
    local = TinyTLModel.from_backbone(f"local-dir:{tmp_path}", method="FT-Last", num_classes=2, train_size=64)
    assert local.config.backbone.weights == str(tmp_path / "model.safetensors")
    assert local.config.backbone.sha256 == record.sha256
    images = torch.randn(2, 3, 64, 64)
    stock = timm.create_model("test_efficientnet").eval()
    stock.load_state_dict(random_weights("test_efficientnet"))
    with torch.no_grad():
        features = stock.forward_head(stock.forward_features(images), pre_logits=True)
    torch.testing.assert_close(local.eval().features(images), features, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"pytorch_model.bin": b"pickle"}, "the repository has no model.safetensors"),
        ({"config.json": b"[]"}, "names no timm architecture"),
        ({"config.json": b'{"architecture": "resnet18", "model_args": {"block": "x"}}'}, "with block of its own"),
    ],
)
def test_a_repository_that_is_no_plain_timm_model_is_refused_and_no_pickle_is_read(files, message, server):
    config = {"config.json": json.dumps(CONFIG).encode()}
    server.add_repo("someone/model", {**config, **files})
    assert message in error_of("hf-hub:someone/model", "imagenet")


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"mean": [123.675, 116.28, 103.53]}, r"has \{'mean': \(123.675, .* a scale of 0 to 1; mend its config.json"),
        ({"std": [58.395, 57.12, 57.375]}, r"has \{'std': "),
        ({"mean": [0.5], "std": [0.5]}, "is not for RGB images"),
        ({"mean": 0.5}, "its description is damaged"),
    ],
)
def test_a_description_for_other_pixels_is_named(described, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "pretrained_cfg": {**PRETRAINED, **described}}))
    with pytest.raises(TinyTLError, match=message):
        find_backbone(f"local-dir:{tmp_path}", "none")


@pytest.mark.parametrize(("share", "said"), [(1.15, True), (1.0, False), (0.95, False)])
def test_a_crop_that_is_larger_than_the_image_is_said(share, said, tmp_path, caplog):
    caplog.set_level("INFO")
    config = {**CONFIG, "pretrained_cfg": {**PRETRAINED, "crop_pct": share, "mean": [0, 0, 0], "std": [1, 1, 1]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert find_backbone(f"local-dir:{tmp_path}", "none").crop_pct == min(share, 1)
    assert ("crop_pct 1.15, so with a border; 1 is taken here" in caplog.text) == said


def test_an_adapter_of_torchvisions_network_loads_over_the_hubs_weights_if_the_hashes_agree(server, tmp_path):
    torch.manual_seed(0)
    stock = torchvision_nets.build("mobilenet_v2")
    save_file(stock.state_dict(), tmp_path / "tv.safetensors")
    model = TinyTLModel.from_backbone(
        "mobilenet_v2", method="FT-Last", num_classes=2, weights=str(tmp_path / "tv.safetensors"), train_size=64
    )
    model.save_pretrained(tmp_path / "adapter")
    twin = timm_nets.build("timm/mobilenetv2_100")
    for theirs, ours in zip(twin.state_dict().values(), stock.state_dict().values(), strict=True):
        theirs.copy_(ours)
    server.add_repo("timm/mobilenetv2_100.tv", {"model.safetensors": save(twin.state_dict())})
    twin.conv_stem.weight.data += 1e-3
    server.add_repo("timm/mobilenetv2_100.other", {"model.safetensors": save(twin.state_dict())})
    again = TinyTLModel.from_pretrained(tmp_path / "adapter", weights="hf-hub:timm/mobilenetv2_100.tv")
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(again.eval()(images), model.eval()(images))
    with pytest.raises(TinyTLError, match="other weights of mobilenet_v2"):
        TinyTLModel.from_pretrained(tmp_path / "adapter", weights="hf-hub:timm/mobilenetv2_100.other")


def test_an_adapter_of_timms_network_loads_over_torchvisions_weights_if_the_hashes_agree(hub, tmp_path):
    torch.manual_seed(0)
    stock = torchvision_nets.build("mobilenet_v2")
    save_file(stock.state_dict(), tmp_path / "tv.safetensors")
    twin = timm_nets.build("timm/mobilenetv2_100")
    for theirs, ours in zip(twin.state_dict().values(), stock.state_dict().values(), strict=True):
        theirs.copy_(ours)
    stock.features[0][0].weight.data += 1e-3
    save_file(stock.state_dict(), tmp_path / "other.safetensors")
    hub.add_repo("timm/mobilenetv2_100.ra_in1k", {"model.safetensors": save(twin.state_dict())})
    options = {"method": "TinyTL-B", "num_classes": 2, "train_size": 64}
    model = TinyTLModel.from_backbone("timm/mobilenetv2_100", **options)
    assert model.config.backbone.weights.startswith("hf-hub:timm/mobilenetv2_100.ra_in1k@")
    model.save_pretrained(tmp_path / "adapter")
    again = TinyTLModel.from_pretrained(tmp_path / "adapter", weights=str(tmp_path / "tv.safetensors"))
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(again.eval()(images), model.eval()(images))
    with pytest.raises(TinyTLError, match="other weights of timm/mobilenetv2_100"):
        TinyTLModel.from_pretrained(tmp_path / "adapter", weights=str(tmp_path / "other.safetensors"))
