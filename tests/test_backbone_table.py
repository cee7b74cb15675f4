"""The verb that lists what can be trained."""

import json

import pytest
import torch
from safetensors.torch import save
from shared import run_cli

from tinytl_hf import TinyTLError, TinyTLModel
from tinytl_hf.config.verbs import BackbonesConfig
from tinytl_hf.measure import backbone_table
from tinytl_hf.measure.backbone_table import TO_TRY, backbones, describe, matching
from tinytl_hf.network import hub_weights, timm_nets
from tinytl_hf.network.methods import METHODS

WITHOUT_BLOCKS = ["FT-Last", "TinyTL-B", "FT-Norm+Last", "FT-Full"]
REPO = "timm/test_efficientnet.r160_in1k"


def test_a_network_is_described():
    row = describe("mobilenet_v2")
    assert (row.parameters, row.input_size, row.blocks) == (3_504_872, 224, 17)
    assert row.methods == list(METHODS) and row.lean == {"masks": 19} and row.can_download
    assert describe("shufflenet_v2_x0_5").methods == WITHOUT_BLOCKS
    assert describe("efficientnet_b1").input_size == 240
    assert describe("proxylessnas_mobile").can_download is False


def test_a_network_that_is_refused_says_why():
    assert "belongs to a VisionTransformer" in describe("vit_b_16").refused
    pytest.importorskip("timm")
    assert describe("timm/levit_128s").refused.startswith("its classifier is a tuple")


def test_what_is_no_classifier_ends_no_list():
    timm = pytest.importorskip("timm")
    if not timm.is_model("deepseek_vit_412m_enc"):
        pytest.skip("this timm has no such encoder")
    assert describe("timm/deepseek_vit_412m_enc").refused.startswith("is no classifier")


def test_a_network_whose_blocks_are_too_odd_for_lite_residuals_says_what_to_use():
    pytest.importorskip("timm")
    row = describe("timm/efficientnet_b1_pruned")
    assert row.refused is None and "lite.groups=2: must divide" in row.no_lite
    assert row.no_lite.endswith("use 1")  # two do not divide 35 channels
    assert row.methods == [*WITHOUT_BLOCKS, "FT-Layerwise"] and row.blocks == 0 and row.lean


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet18", "timm/ghostnet_050", "timm/test_byobnet"])
def test_how_lean_a_network_is_without_memory_is_how_lean_it_is(name):
    pytest.importorskip("timm")
    row = describe(name)
    method = "TinyTL-L+B" if row.blocks else "TinyTL-B"
    model = TinyTLModel.from_backbone(name, method=method, num_classes=2, weights="none", train_size=64)
    paths = list(model.training_paths.values())
    tried = row.lean.get(TO_TRY, 0)
    assert tried > 0 if "timm" in name else tried == 0
    assert row.lean["masks"] == paths.count("masks") and row.lean.get("stock", 0) == paths.count("stock")
    assert row.lean.get("recompute", 0) + tried == paths.count("recompute")  # each trial of these passes


def test_weights_that_are_here_are_named(server, tmp_path, monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert describe("mnasnet1_0").weights == [] == describe("timm/test_efficientnet").weights
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "mnasnet1.0_top1_73.512-f206786ef8.pth").touch()
    server.add_repo(REPO, {"model.safetensors": save({"x": torch.zeros(1)})})
    hub_weights.fetch(f"hf-hub:{REPO}")
    assert describe("mnasnet1_0").weights == ["torch cache IMAGENET1K_V1"]
    assert describe("timm/test_efficientnet").weights == describe(REPO).weights == [f"Hub cache {REPO}"]


def test_a_folder_with_a_timm_model_is_described(tmp_path):
    timm = pytest.importorskip("timm")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_resnet", "num_classes": 1000}))
    (tmp_path / "model.safetensors").write_bytes(save(timm.create_model("test_resnet").state_dict()))
    row = describe(f"local-dir:{tmp_path}")
    assert row.blocks == 4 and row.weights == [str(tmp_path / "model.safetensors")]


def test_a_pattern_matches_names_with_tags_or_without():
    pytest.importorskip("timm")
    assert matching("mobilenet_v*") == ["mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small"]
    found = matching("timm/mobilenet*")
    assert "timm/mobilenetv2_100" in found and "timm/mobilenetv2_100.ra_in1k" not in found
    assert matching("timm/mobilenetv2_100.*") == ["timm/mobilenetv2_100.ra_in1k"]
    with pytest.raises(TinyTLError, match=r"timm/mobilnetv2_100: no .*; did you mean timm/mobilenetv2_100"):
        matching("timm/mobilnetv2_100")
    with pytest.raises(TinyTLError, match=r"^inception_v3: no backbone matches; did you mean timm/inception_v3\?$"):
        matching("inception_v3")  # which backbone.name takes


def test_without_timm_the_rest_is_listed_and_the_extra_named(monkeypatch):
    monkeypatch.setattr(timm_nets, "find_spec", lambda _: None)
    monkeypatch.setattr(backbone_table, "matching", lambda pattern: ["shufflenet_v2_x0_5", "vit_b_16"])
    *_, shufflenet, vit, last = backbones(BackbonesConfig(), None)
    assert shufflenet.split()[:5] == ["shufflenet_v2_x0_5", "1.4", "M", "224", "-"] and "vit_b_16" in vit
    assert "pip install 'tinytl-hf[timm]'" in last
    monkeypatch.undo()
    monkeypatch.setattr(timm_nets, "find_spec", lambda _: None)
    with pytest.raises(TinyTLError, match=r"pip install 'tinytl-hf\[timm\]'"):
        matching("timm/mobilenet*")


def test_the_verb_prints_a_table_or_json():
    done = run_cli("backbones", "mobilenet_v3_small")
    assert done.stdout.splitlines()[-1].split()[:5] == ["mobilenet_v3_small", "2.5", "M", "224", "11"], done.stderr
    (row,) = json.loads(run_cli("backbones", "resnet18", "--json").stdout)
    assert (row["parameters"], row["blocks"], row["lean"], row["refused"]) == (11_689_512, 8, {"masks": 12}, None)
