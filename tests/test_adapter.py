import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from shared import slow
from started_runs import CONTEXT, HANG
from test_methods import train_steps

from tinytl_hf import TinyTLError, TinyTLModel
from tinytl_hf.adapter.format import CONFIG_FILE, TENSORS_FILE

IMAGES = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained TinyTL-L+B adapter and where it was saved."""
    torch.manual_seed(0)
    model = TinyTLModel.from_backbone("mobilenet_v2", num_classes=4, weights="none", train_size=64)
    train_steps(model)
    path = tmp_path_factory.mktemp("trained") / "adapter"
    model.save_pretrained(path)
    return model.eval(), path


@pytest.fixture
def saved(trained, tmp_path):
    """A copy of it that a test can change."""
    model, path = trained
    return copy.deepcopy(model), Path(shutil.copytree(path, tmp_path / "adapter"))


@pytest.mark.parametrize(
    "method",
    ["TinyTL-L+B", "FT-Norm+Last", "FT-Full", *map(slow, ("FT-Last", "TinyTL-B", "TinyTL-L", "FT-Layerwise"))],
)
def test_a_loaded_adapter_gives_the_same_logits_bit_for_bit(method, make_model, tmp_path):
    model = make_model(method)
    train_steps(model)
    model.save_pretrained(tmp_path)
    loaded = TinyTLModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), model.eval()(IMAGES))
    on_disk = load_file(tmp_path / TENSORS_FILE)
    trained = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    buffers = {n for n in on_disk if n.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert on_disk.keys() - buffers == trained
    assert bool(buffers) == (method in {"TinyTL-L", "TinyTL-L+B", "FT-Norm+Last", "FT-Full", "FT-Layerwise"})


def write_logits(path, output):
    with torch.no_grad():
        torch.save(TinyTLModel.from_pretrained(path).eval()(IMAGES), output)


@pytest.mark.slow
def test_another_process_computes_the_same_bits(saved):
    model, path = saved
    process = CONTEXT.Process(target=write_logits, args=(path, path / "logits.pt"))
    process.start()
    process.join(HANG)
    assert process.exitcode == 0
    with torch.no_grad():
        assert torch.equal(torch.load(path / "logits.pt"), model(IMAGES))


@pytest.mark.parametrize(
    ("method", "megabytes"), [("FT-Last", 0.052), ("TinyTL-B", 0.125), ("TinyTL-L", 4.7), ("TinyTL-L+B", 4.7)]
)
def test_adapters_are_small(method, megabytes, make_model, tmp_path):
    make_model(method, num_classes=10, train_size=224).save_pretrained(tmp_path)
    assert megabytes * 0.9 < (tmp_path / TENSORS_FILE).stat().st_size / 1e6 < megabytes


def test_fp16_halves_the_file_and_loads_what_it_holds(saved, tmp_path):
    model, path = saved
    model.save_pretrained(tmp_path / "half", dtype="fp16")
    ratio = (tmp_path / "half" / TENSORS_FILE).stat().st_size / (path / TENSORS_FILE).stat().st_size
    assert 0.49 < ratio < 0.54
    loaded = TinyTLModel.from_pretrained(tmp_path / "half")
    for name, tensor in loaded.adapter_tensors().items():
        own = model.adapter_tensors()[name]
        exact = own.half().float() if own.is_floating_point() and "running_" not in name else own
        assert torch.equal(tensor, exact)
    loaded.save_pretrained(tmp_path / "again")  # stays half, and loses nothing more
    first, second = (load_file(tmp_path / folder / TENSORS_FILE) for folder in ("half", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first.keys() | second.keys())


def test_a_value_beyond_fp16_is_refused_and_leaves_the_old_file(saved):
    model, path = saved
    before = (path / TENSORS_FILE).read_bytes()
    with torch.no_grad():
        model.backbone.classifier[1].weight[0, 0] = 1e6
    with pytest.raises(TinyTLError, match=r"fp16: classifier.1.weight"):
        model.save_pretrained(path, dtype="fp16")
    assert (path / TENSORS_FILE).read_bytes() == before


def test_the_config_describes_the_adapter_and_survives_odd_label_names(make_model, tmp_path):
    names = ["no", "1", "null", "a: b", "été"]
    model = make_model("bias", num_classes=None, label_names=names)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert list(config) == sorted(config)
    assert config["format_version"] == 2 and config["method"] == "TinyTL-B" and len(config["backbone"]["sha256"]) == 64
    assert TinyTLModel.from_pretrained(tmp_path).label_names == names


def edit_config(path, **changes):
    config = json.loads((path / CONFIG_FILE).read_text())
    config.update(changes)
    (path / CONFIG_FILE).write_text(json.dumps(config))


def edit_tensors(path, change):
    tensors = load_file(path / TENSORS_FILE)
    change(tensors)
    save_file(tensors, path / TENSORS_FILE)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / CONFIG_FILE).unlink(), "is no adapter: it has no adapter_config.json"),
        (lambda p: (p / TENSORS_FILE).unlink(), "has no adapter_model.safetensors"),
        (lambda p: (p / CONFIG_FILE).write_text("{"), "not valid JSON"),
        (lambda p: (p / CONFIG_FILE).write_text("[]"), "not a tinytl_hf adapter"),
        (lambda p: (p / CONFIG_FILE).write_text('{"peft_type": "LORA"}'), "not a tinytl_hf adapter"),
        (lambda p: edit_config(p, format_version=3), "pip install --upgrade tinytl-hf"),
        (lambda p: edit_config(p, method="LoRA"), "method.*LoRA"),
        (lambda p: edit_config(p, surprise=1), "surprise"),
        (lambda p: edit_config(p, label_names=3), "label_names"),
        (lambda p: edit_config(p, method="TinyTL-L"), "unlike|missing|other weights"),
        (lambda p: (p / TENSORS_FILE).write_bytes((p / TENSORS_FILE).read_bytes()[:-5]), "truncated"),
        (lambda p: (p / TENSORS_FILE).write_bytes(b"PK\x03\x04 something else"), "truncated or not a safetensors"),
        (lambda p: edit_tensors(p, lambda t: t.pop("classifier.1.bias")), "missing, such as classifier.1.bias"),
        (lambda p: edit_tensors(p, lambda t: t.update(more=torch.zeros(1))), "unexpected, such as more"),
        (
            lambda p: edit_tensors(p, lambda t: t.update({"classifier.1.bias": torch.zeros(5)})),
            "of another shape, such as classifier.1.bias",
        ),
        (
            lambda p: edit_tensors(p, lambda t: t["classifier.1.bias"].fill_(float("nan"))),
            "not finite, such as classifier.1.bias",
        ),
    ],
)
def test_a_damaged_or_foreign_folder_is_refused_with_its_name(saved, damage, message):
    _, path = saved
    damage(path)
    with pytest.raises(TinyTLError, match=message):
        TinyTLModel.from_pretrained(path)


def test_other_weights_of_the_same_backbone_are_refused_by_their_hash(saved, tmp_path):
    _, path = saved
    torch.manual_seed(77)
    import torchvision

    torch.save(torchvision.models.mobilenet_v2().state_dict(), tmp_path / "other.pth")
    with pytest.raises(TinyTLError, match=r"trained on other weights of mobilenet_v2 than .*other.pth"):
        TinyTLModel.from_pretrained(path, weights=str(tmp_path / "other.pth"))


def test_the_same_weights_from_another_place_are_accepted(saved, tmp_path):
    model, path = saved
    with torch.random.fork_rng():
        torch.manual_seed(0)  # what weights="none" are
        torch.save(torchvision.models.mobilenet_v2().state_dict(), tmp_path / "same.pth")
    loaded = TinyTLModel.from_pretrained(path, weights=str(tmp_path / "same.pth")).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert loaded.config == model.config  # which others can load, where they do not have this file
    loaded.load_adapter(path, "again")
    with loaded.using("again"), torch.no_grad():
        assert torch.equal(loaded(IMAGES), model(IMAGES))


def test_a_file_of_weights_is_found_from_another_folder(make_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(torchvision.models.mobilenet_v2().state_dict(), "w.pth")
    model = make_model("TinyTL-B", weights="w.pth").eval()
    model.save_pretrained("adapter")
    monkeypatch.chdir("/")
    loaded = TinyTLModel.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), model(IMAGES))


def test_a_method_that_trains_everything_needs_no_backbone_weights(make_model, tmp_path):
    model = make_model("FT-Full")
    train_steps(model)
    model.save_pretrained(tmp_path)
    loaded = TinyTLModel.from_pretrained(tmp_path, weights="nowhere.pth").eval()
    assert torch.equal(loaded(IMAGES), model.eval()(IMAGES))


def test_a_failed_write_leaves_the_adapter_that_was_there(saved, monkeypatch):
    model, path = saved
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with torch.no_grad():
        model.backbone.classifier[1].bias.add_(1)
    with pytest.raises(TinyTLError, match="No space left on device"):
        model.save_pretrained(path)
    assert {name: (path / name).read_bytes() for name in before} == before


def test_saving_keeps_other_files_and_what_a_person_wrote_in_the_card(saved):
    model, path = saved
    (path / "notes.txt").write_text("mine")
    card = path / "README.md"
    card.write_text(card.read_text() + "\nWritten by hand.\n")
    model.save_pretrained(path, metrics={"accuracy": 0.4321})
    assert (path / "notes.txt").read_text() == "mine"
    assert "Written by hand." in card.read_text() and "0.4321" in card.read_text()
    card.write_text("All mine.")
    model.save_pretrained(path)
    assert card.read_text() == "All mine."


def test_preprocess_takes_any_image_and_gives_the_evaluation_view(saved):
    model, _ = saved
    images = [Image.new("L", (300, 200), 128), Image.new("RGBA", (70, 90), (255, 0, 0, 255))]
    batch = model.preprocess(images)
    assert batch.shape == (2, 3, 64, 64)
    grey = (128 / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(batch[0].mean((1, 2)), grey, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.preprocess(images[0]), batch[:1], atol=1e-5, rtol=0)
    assert model(batch).shape == (2, 4)


@pytest.mark.parametrize("part", ["", "classifier", "features"])
def test_what_is_frozen_after_training_is_saved_all_the_same(part, saved, tmp_path):
    model, before = saved
    model.backbone.get_submodule(part).requires_grad_(False)
    model.save_pretrained(tmp_path / "frozen")
    assert (tmp_path / "frozen" / TENSORS_FILE).read_bytes() == (before / TENSORS_FILE).read_bytes()


@pytest.mark.parametrize("lean", [True, False])
def test_a_parameter_that_the_method_does_not_train_is_named_before_it_would_be_lost(lean, make_model):
    model = make_model("TinyTL-B", lean=lean).train()
    weight = model.backbone.features[18][0].weight.requires_grad_(True)
    with pytest.raises(TinyTLError, match=r"features.18.0.weight requires a gradient, and TinyTL-B does not train it"):
        model(IMAGES)
    assert model.eval()(IMAGES).requires_grad
    weight.requires_grad_(False)
    model.train()(IMAGES).sum().backward()


def test_arguments_that_loading_does_not_take_are_named(saved):
    for options, near in (
        ({"leen": False}, "did you mean lean"),
        ({"torch_dtype": torch.float16}, "use weights, lean"),
    ):
        (name,) = options
        with pytest.raises(TinyTLError, match=rf"{name}=.*: loading an adapter has no such argument; {near}"):
            TinyTLModel.from_pretrained(saved[1], **options)
    model = TinyTLModel.from_pretrained(saved[1], cache_dir="x", local_files_only=True)
    with pytest.raises(TinyTLError, match="is_trainable=True: loading an adapter has no such argument"):
        model.load_adapter(saved[1], "again", is_trainable=True)


def test_a_pointer_in_place_of_the_tensors_is_called_so(saved):
    path = saved[1] / "adapter_model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(TinyTLError, match=r"safetensors: is not the file, but a pointer to it; git lfs pull"):
        TinyTLModel.from_pretrained(saved[1])


def test_complex_numbers_are_no_adapter(saved):
    path = saved[1] / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "classifier.1.bias": tensors["classifier.1.bias"].to(torch.complex64)}, path)
    with pytest.raises(TinyTLError, match=r"1 tensor is of another type, such as classifier\.1\.bias"):
        TinyTLModel.from_pretrained(saved[1])
