"""What a push makes of the card that a repository has already, and of that of an adapter that was loaded."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from shared import run_cli

from tinytl_hf import TinyTLModel
from tinytl_hf.adapter.record import DataRecord
from tinytl_hf.hub.card import text_around


@pytest.fixture
def adapter(make_model, tmp_path):
    make_model("FT-Last").save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def push_over(server, folder, card):
    """Push to a repository that has this card; what is there then, and what the command said."""
    server.add_repo("me/flowers", {"README.md": card.encode()})
    done = run_cli("push", "--adapter", folder, "--repo", "me/flowers")
    assert done.returncode == 0, done.stderr
    return server.repos["me/flowers"].files()["README.md"].content.decode(), done.stderr


@pytest.mark.parametrize("text_here", ["", "Written here."])
def test_a_licence_that_was_chosen_where_the_repository_was_made_stays_in_the_card(text_here, server, adapter):
    local = adapter / "README.md"
    local.write_text(local.read_text() + text_here)
    card, said = push_over(server, adapter, "---\nlicense: mit\n---\n")
    data = ModelCard(card).data
    assert data.license == "mit" and data.library_name == "tinytl-hf" and text_around(card) == text_here
    assert 'from_pretrained("me/flowers")' in card and "README.md" not in said


def test_a_card_of_mine_stays_and_the_push_says_so(server, adapter):
    mine = "All mine."
    card, said = push_over(server, adapter, mine)
    assert card == mine and "README.md on the Hub stays as it is" in said


def test_an_adapter_that_was_loaded_by_a_short_path_keeps_its_figures_from_another_folder(
    server, adapter, make_model, monkeypatch
):
    make_model("FT-Last").save_pretrained(adapter, metrics={"accuracy": 0.4321})
    monkeypatch.chdir(adapter.parent)
    model = TinyTLModel.from_pretrained("adapter")
    monkeypatch.chdir("/")
    model.push_to_hub("me/flowers")
    assert "0.4321" in server.repos["me/flowers"].files()["README.md"].content.decode()


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_model_that_was_saved_with_figures_is_pushed_with_them_and_without_once_it_changed(
    dtype, server, make_model, tmp_path
):
    model, data = make_model("FT-Last"), DataRecord("me/photos", source="hub")
    model.save_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "saved", dtype=dtype, metrics={"accuracy": 0.4321}, data=data)
    card = tmp_path / "saved" / "README.md"
    card.write_text(f"{card.read_text()}Mine.\n")
    model.push_to_hub("me/flowers")
    pushed = server.repos["me/flowers"].files()
    assert "0.4321" in pushed["README.md"].content.decode() and "Mine." in pushed["README.md"].content.decode()
    assert json.loads(pushed["adapter_config.json"].content)["data"]["dataset"] == "me/photos"
    with torch.no_grad():
        model.backbone.classifier[1].bias.add_(1)
    model.push_to_hub("me/others")
    assert "0.4321" not in server.repos["me/others"].files()["README.md"].content.decode()
    assert model.folder == tmp_path / "saved"


@pytest.mark.parametrize("damaged", ["adapter_config.json", "adapter_model.safetensors", ""])
def test_an_adapter_whose_folder_was_changed_since_it_was_loaded_is_pushed_from_memory(damaged, server, adapter):
    model = TinyTLModel.from_pretrained(adapter)
    if damaged:
        (adapter / damaged).write_text("{")
    else:
        shutil.rmtree(adapter)
    model.push_to_hub("me/flowers")
    assert TinyTLModel.from_pretrained("me/flowers").label_names == model.label_names


def test_a_link_that_leads_nowhere_is_not_replaced_by_a_pull(server, adapter, tmp_path):
    TinyTLModel.from_pretrained(adapter).push_to_hub("me/flowers")
    link = tmp_path / "mine" / "README.md"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "away")
    done = run_cli("pull", "--repo", "me/flowers", "--output", link.parent)
    assert done.returncode == 1 and "holds another README.md already" in done.stderr
    assert link.is_symlink() and len(list(link.parent.iterdir())) == 1
    assert run_cli("pull", "--repo", "me/flowers", "--output", link.parent, "--overwrite").returncode == 0
