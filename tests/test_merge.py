import json

import pytest
import safetensors.torch
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shared import run_cli, slow
from test_methods import train_steps
from torch import nn

import tinytl_hf
from tinytl_hf import TinyTLError, TinyTLModel
from tinytl_hf.config.export import ExportConfig
from tinytl_hf.deploy.exported import check_output
from tinytl_hf.deploy.merge import load_merged

IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(3))
IMAGES = IMAGES.contiguous(memory_format=torch.channels_last)
PLAIN = ("FT-Last", "TinyTL-B", "FT-Norm+Last", "FT-Full", "FT-Layerwise")


@pytest.fixture
def merged(make_model, tmp_path):
    """Train, save and merge: the model, the file and what the command printed."""

    def run(method, backbone="mobilenet_v2", **options):
        model = make_model(method, backbone, **options)
        train_steps(model, steps=1)
        model.save_pretrained(tmp_path / "adapter")
        done = run_cli("merge", "--adapter", tmp_path / "adapter", "--output", tmp_path / "new" / "m.safetensors")
        assert done.returncode == 0, done.stderr
        return model.eval(), tmp_path / "new" / "m.safetensors", done.stdout

    return run


@torch.no_grad()
def same_logits(one, other):
    return torch.equal(one(IMAGES), other(IMAGES))


@pytest.mark.parametrize(
    ("method", "backbone"),
    [
        *((method, "mobilenet_v2") for method in PLAIN[:3]),
        *(slow(method, "mobilenet_v2") for method in PLAIN[3:]),
        ("TinyTL-B", "resnet18"),
        ("FT-Norm+Last", "efficientnet_b0"),
    ],
)
def test_the_file_is_torchvisions_own_network_with_the_same_logits(method, backbone, merged):
    model, path, printed = merged(method, backbone)
    network = torchvision.models.get_model(backbone, num_classes=4)
    network.load_state_dict(load_file(path), strict=True)
    network.eval().to(memory_format=torch.channels_last)
    assert same_logits(network, model)
    assert f"torchvision's {backbone} with 4 classes; load it with torchvision.models.get_model" in printed


@pytest.mark.parametrize("method", ["TinyTL-B", "TinyTL-L"])
def test_an_mnasnet_loads_by_itself_and_as_the_command_says(method, merged, monkeypatch):
    model, path, printed = merged(method, "mnasnet0_5")
    assert same_logits(load_merged(path).eval(), model)
    if method == "TinyTL-B":
        known = {"torchvision": torchvision, "safetensors": safetensors}
        monkeypatch.chdir(path.parent)
        exec(printed.strip().partition("load it with ")[2], known)
        assert same_logits(known["network"].eval().to(memory_format=torch.channels_last), model)


def test_a_file_that_lacks_a_tensor_is_refused(merged):
    _, path, _ = merged("FT-Last")
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), load_file(path)
    del tensors["classifier.1.bias"]
    save_file(tensors, path, metadata)
    with pytest.raises(TinyTLError, match=r"does not fit.*it lacks classifier\.1\.bias"):
        load_merged(path)


@pytest.mark.parametrize("method", [slow("TinyTL-L"), "TinyTL-L+B", slow("FT-Norm+Last")])
def test_the_file_needs_nothing_else(method, merged, tmp_path):
    model, path, printed = merged(method)
    loaded = load_merged(path).eval()
    assert same_logits(loaded, model)
    assert loaded.config == model.config
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    if method.startswith("TinyTL-L"):
        assert "with lite residuals" in printed and "not a torchvision model" in printed
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        assert metadata["load_with"] == 'tinytl_hf.load_merged("m.safetensors")'
        assert f'tinytl_hf.load_merged("{path}")' in printed  # which can be pasted
        assert json.loads(metadata["adapter_config"])["label_names"] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("method", ["TinyTL-B", slow("TinyTL-L")])
def test_int8_weights_come_out_as_the_values_that_they_stand_for(method, merged):
    model, path, _ = merged(method, frozen_weights="int8")
    assert same_logits(load_merged(path).eval(), model)
    load_merged(path).save_pretrained(path.parent / "again")
    again = TinyTLModel.from_pretrained(path.parent / "again")
    assert same_logits(again.eval(), model) and again.config.backbone.weights == str(path)
    if method == "TinyTL-B":
        network = torchvision.models.get_model("mobilenet_v2", num_classes=4)
        network.load_state_dict(load_file(path), strict=True)
        assert same_logits(network.eval().to(memory_format=torch.channels_last), model)


def test_a_file_of_int8_weights_that_was_renamed_is_named_by_adapters_that_are_saved_of_it(
    merged, tmp_path, monkeypatch
):
    model, path, _ = merged("TinyTL-B", frozen_weights="int8")
    path.rename(tmp_path / "renamed.safetensors")
    monkeypatch.chdir(tmp_path)
    load_merged("renamed.safetensors").save_pretrained("again")
    monkeypatch.chdir("/")
    assert same_logits(TinyTLModel.from_pretrained(tmp_path / "again").eval(), model)


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_an_adapter_of_the_same_backbone_loads_beside_a_merged_one(weights, merged, make_model, tmp_path):
    backbone, file = make_model("FT-Full").backbone, tmp_path / "weights.pth"
    nn.init.constant_(backbone.features[3].conv[1][0].weight, 0.25)
    torch.save(backbone.state_dict(), file)
    _, path, _ = merged("TinyTL-L+B", frozen_weights=weights, weights=str(file))
    # The frozen values of a merged network that had 8 bits are in its file alone.
    other = make_model("FT-Last", weights=str(file if weights == "fp32" else path))
    other.save_pretrained(tmp_path / "other")
    model = load_merged(path)
    model.load_adapter(tmp_path / "other", "other")
    model.set_adapter("other")
    assert not model.training and same_logits(model, other.eval())


def test_a_file_is_replaced_only_on_request_and_then_whole(merged, tmp_path, monkeypatch):
    _, path, _ = merged("FT-Last")
    path.write_bytes(b"mine")
    options = ("merge", "--adapter", tmp_path / "adapter", "--output", path)
    done = run_cli(*options)
    assert done.returncode == 1 and f"output={path}: exists" in done.stderr and path.read_bytes() == b"mine"
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        done = run_cli(*options, "--overwrite")
    assert done.returncode == 1 and "No space left on device" in done.stderr
    assert [file.name for file in path.parent.iterdir()] == [path.name] and path.read_bytes() == b"mine"
    assert run_cli(*options, "--overwrite").returncode == 0
    assert load_merged(path).label_names == ["0", "1", "2", "3"]
    tensors = tmp_path / "adapter" / "adapter_model.safetensors"
    before = tensors.read_bytes()
    done = run_cli("merge", "--adapter", tmp_path / "adapter", "--output", tensors, "--overwrite")
    assert done.returncode == 1 and "is a file of the adapter" in done.stderr and tensors.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors, about: about.update(adapter_config="[" * 100_000), "maximum recursion depth"),
        (
            lambda tensors, about: about.update(
                adapter_config=about["adapter_config"].replace('"dtype"', '"dtype": "fp32", "dtype"')
            ),
            "'dtype' is there more than once",
        ),
        (lambda tensors, about: tensors["classifier.1.weight"].fill_(float("nan")), "classifier.1.weight has values"),
        (
            lambda tensors, about: tensors.update({"classifier.1.bias": torch.zeros(2, dtype=torch.int8)}),
            "does not fit the adapter_config in its metadata",
        ),
    ],
)
def test_what_a_file_of_somebody_elses_can_say_is_named_on_one_line(change, said, merged):
    _, path, _ = merged("FT-Last")
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    change(tensors, about)
    save_file(tensors, path, about)
    with pytest.raises(TinyTLError, match=path.name) as refused:
        load_merged(path)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_link_that_leads_nowhere_is_not_replaced(make_model, tmp_path):
    model = make_model("FT-Last")
    model.save_pretrained(tmp_path / "adapter")
    for words in (
        ["merge", "m.safetensors"],
        ["export", "m.onnx", "--format", "onnx"],
        ["export", "m", "--format", "timm"],
    ):
        link = tmp_path / words[1]
        link.symlink_to(tmp_path / "away")
        done = run_cli(words[0], "--adapter", tmp_path / "adapter", "--output", link, *words[2:])
        assert done.returncode == 1 and f"output={link}: exists; name another" in done.stderr
        assert link.is_symlink() and not (tmp_path / "away").exists()


@pytest.mark.parametrize(("method", "kept"), [("TinyTL-B", True), ("FT-Full", False)])
def test_the_weights_that_an_adapter_needs_are_not_replaced(method, kept, make_model, tmp_path, monkeypatch):
    weights = tmp_path / "weights.safetensors"
    tensors = make_model("FT-Full").backbone.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights)
    before = weights.read_bytes()
    make_model(method, weights=str(weights)).save_pretrained(tmp_path / "adapter")
    (tmp_path / "link.safetensors").symlink_to(weights)
    monkeypatch.chdir(tmp_path)
    for name in ("link.safetensors", "weights.safetensors"):
        done = run_cli("merge", "--adapter", "adapter", "--output", name, "--overwrite")
        assert (f"output={name}: holds the backbone's weights" in done.stderr) is kept is (done.returncode == 1)
        assert (weights.read_bytes() == before) is (kept or name.startswith("link"))


@pytest.mark.parametrize(("format", "name"), [("onnx", "m.onnx"), ("executorch", "m.pte"), ("timm", "m")])
def test_what_can_be_no_export_is_not_said_to_be_replaced_on_request(format, name, tmp_path):
    path = tmp_path / name
    path.write_text("mine") if format == "timm" else path.mkdir()
    kind = "no folder" if format == "timm" else "a folder"
    for overwrite in (False, True):
        with pytest.raises(TinyTLError, match=f"output={path}: exists and is {kind}, so no {format} export; name"):
            check_output(ExportConfig("adapter", format, str(path), overwrite=overwrite))


def test_a_json_file_of_mine_beside_a_pte_file_is_not_replaced(tmp_path):
    mine = tmp_path / "memory.json"
    mine.write_text("mine")
    config = ExportConfig("adapter", "executorch", str(tmp_path / "memory.pte"), overwrite=True)
    with pytest.raises(TinyTLError, match=f"output={mine}: is there, and was not written by this command"):
        check_output(config)
    mine.write_text('{"adapter_config": {}}')
    assert check_output(config) == tmp_path / "memory.pte"


@pytest.mark.parametrize("method", ["FT-Last", "TinyTL-L"])
def test_the_line_to_copy_loads_a_file_of_any_name(method, make_model, tmp_path):
    make_model(method).save_pretrained(tmp_path / "adapter")
    path = tmp_path / 'my "best" \\ model.safetensors'
    done = run_cli("merge", "--adapter", tmp_path / "adapter", "--output", path)
    names = {"torchvision": torchvision, "safetensors": safetensors, "tinytl_hf": tinytl_hf}
    eval(done.stdout.strip().rpartition("load it with ")[2], names)
    with safe_open(path, "pt") as file:
        assert json.dumps(path.name) in file.metadata()["load_with"]


def test_wrong_files_are_named(merged, tmp_path):
    _, path, _ = merged("FT-Last")
    done = run_cli("merge", "--adapter", tmp_path / "adapter", "--output", tmp_path / "model.pth")
    assert done.returncode == 1 and "model.pth: name a .safetensors file" in done.stderr
    for other in (tmp_path / "lost.safetensors", tmp_path, "", 5, None):
        with pytest.raises(TinyTLError, match="that tinytl-hf merge wrote"):
            load_merged(other)
    with pytest.raises(TinyTLError, match="was not written by tinytl-hf merge"):
        load_merged(tmp_path / "adapter" / "adapter_model.safetensors")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TinyTLError, match="cannot be read"):
        load_merged(path)
