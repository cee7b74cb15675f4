"""Models in onnxruntime: the same logits, and labels without torch."""

import copy
import json
import subprocess
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from shared import ROOT, run_cli, slow, write_image
from test_methods import train_steps
from torch import nn

from tinytl_hf import TinyTLError, TinyTLModel
from tinytl_hf.adapter.record import DataRecord
from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.export import ExportConfig
from tinytl_hf.data.images import to_pixels
from tinytl_hf.data.view import centre_view, normalised
from tinytl_hf.deploy import export as deploy_export
from tinytl_hf.deploy import exported as exported_network
from tinytl_hf.deploy import onnx as deploy_onnx
from tinytl_hf.deploy.check import Comparison, RealImages, evaluation_images
from tinytl_hf.deploy.onnx_predict import OnnxClassifier

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
ort = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
pytest.importorskip("onnxscript", reason="the extra onnx is not installed")

LABELS = ["blue", "red", "grey", "green"]
IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def save(make_model, colour_folder):
    """Train a little, and save with the record of a data set that is on this disk."""

    def save(folder, method="FT-Last", backbone="resnet18", data=True):
        model = make_model(method, backbone, num_classes=None, label_names=LABELS)
        train_steps(model, steps=1)
        model.save_pretrained(folder, data=DataRecord(str(colour_folder)) if data else None)
        return model.eval()

    return save


def export(adapter, output, *options):
    done = run_cli("export", "--adapter", adapter, "--format", "onnx", "--output", output, *options)
    assert done.returncode == 0, done.stderr
    return ort.InferenceSession(str(output)), done.stdout


@pytest.fixture(scope="module")
def exported(save, tmp_path_factory):
    """A folder with an adapter and its .onnx file; the model, and what the export printed."""
    folder = tmp_path_factory.mktemp("onnx")
    model = save(folder / "adapter", "TinyTL-L+B")
    _, printed = export(folder / "adapter", folder / "new" / "m.onnx")
    return folder, model, printed


def check_logits(model, file, printed):
    session = ort.InferenceSession(str(file))
    for count in (1, 3):
        logits = session.run(None, {"images": IMAGES[:count].numpy()})[0]
        np.testing.assert_allclose(logits, model(IMAGES[:count]).detach().numpy(), atol=1e-4)
    assert "on 10 images of test of" in printed and "same label for 10 of 10" in printed
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["labels"]) == LABELS and about["method"] == model.config.method
    assert json.loads(about["adapter_config"])["backbone"]["sha256"] == model.config.backbone.sha256
    assert str(file.parents[2]) not in str(about)  # nothing of this disk


def test_any_number_of_images_gives_pytorchs_logits(exported):
    folder, model, printed = exported
    check_logits(model, folder / "new" / "m.onnx", printed)


def test_the_images_of_a_check_are_in_memory_a_batch_at_a_time(make_model):
    model = make_model("FT-Last", "resnet18", num_classes=10, train_size=32)
    data = DataConfig(dataset="digits", train_size=32)
    images = evaluation_images(model, data, None)
    seen, alive = 0, []
    for batch in images.batches:
        assert sum(earlier() is not None for earlier in alive) <= 1  # the one before goes with the name
        alive.append(weakref.ref(batch))
        seen += len(batch)
    again = sum(len(batch) for batch in images.batches)
    assert seen == again == images.count == len(images.labels) == 1797 and len(alive) == 57


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_that_was_cast_is_exported_in_fp32_and_stays_as_it_is(dtype, make_model, tmp_path):
    model = make_model("FT-Last", "mobilenet_v3_small").to(dtype).train()
    model.export(tmp_path / "m.onnx", format="onnx", check_images=2)
    assert model.training and {parameter.dtype for parameter in model.parameters()} == {dtype}
    logits = ort.InferenceSession(str(tmp_path / "m.onnx")).run(None, {"images": IMAGES.numpy()})[0]
    with torch.no_grad():
        expected = copy.deepcopy(model).float().eval()(IMAGES)
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("method", "backbone"), [slow("FT-Norm+Last", "mnasnet1_0"), slow("TinyTL-B", "efficientnet_b0")]
)
def test_other_networks_give_pytorchs_logits(method, backbone, save, tmp_path):
    model = save(tmp_path / "adapter", method, backbone)
    _, printed = export(tmp_path / "adapter", tmp_path / "new" / "m.onnx")
    check_logits(model, tmp_path / "new" / "m.onnx", printed)


NO_TORCH = """
import builtins, sys
absent = {"torch", "torchvision", "accelerate", "datasets", "sklearn", "onnx", "timm", "safetensors"}
real = builtins.__import__
def without(name, *rest, **named):
    if name.partition(".")[0] in absent: raise ImportError(f"No module named {name}")
    return real(name, *rest, **named)
builtins.__import__ = without
from tinytl_hf.cli import main
main(sys.argv[1:])
"""


def check_predictions(adapter, file, images, rounding, *options):
    """onnxruntime without torch says of images what the adapter says in PyTorch."""
    for i, (mode, size) in enumerate([("RGB", (90, 70)), ("L", (64, 64)), ("RGBA", (31, 200))]):
        write_image(images / f"{i}.png", mode, size, seed=i)
    (images / "bad.png").write_bytes(b"no image")
    words = ["predict", "--json", "--top_k", "2", *options, str(images)]
    expected = run_cli(*words, "--adapter", adapter)
    code = [sys.executable, "-c", NO_TORCH, *words, "--adapter", str(file)]
    done = subprocess.run(code, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == expected.returncode == 1, done.stderr
    ours, theirs = ([json.loads(line) for line in each.stdout.splitlines()] for each in (done, expected))
    assert len(ours) == 4 and [r["image"] for r in ours] == [r["image"] for r in theirs]
    assert ours[3]["error"] == theirs[3]["error"]
    for one, other in zip(ours[:3], theirs[:3], strict=True):
        assert one.get("views") == other.get("views") == (2 if "--mirror" in options else None)
        assert [label["label"] for label in one["labels"]] == [label["label"] for label in other["labels"]]
        for ours_label, their_label in zip(one["labels"], other["labels"], strict=True):
            assert ours_label["probability"] == pytest.approx(their_label["probability"], abs=rounding)


def test_predict_needs_no_torch_and_gives_the_adapters_labels(exported, tmp_path):
    folder, _, _ = exported
    check_predictions(folder / "adapter", folder / "new" / "m.onnx", tmp_path, 1e-4, "--mirror")


@pytest.mark.slow
def test_pixels_with_channels_last_at_another_size_give_the_labels_of_an_adapter_for_it(save, tmp_path):
    model = save(tmp_path / "adapter")
    options = ("--input", "uint8", "--layout", "NHWC", "--data.eval_size", "96")
    session, _ = export(tmp_path / "adapter", tmp_path / "m.onnx", *options)
    assert session.get_inputs()[0].shape[1:] == [96, 96, 3] and session.get_inputs()[0].type == "tensor(uint8)"
    model.config = replace(model.config, preprocessing=replace(model.config.preprocessing, eval_size=96))
    model.save_pretrained(tmp_path / "at_96")
    check_predictions(tmp_path / "at_96", tmp_path / "m.onnx", tmp_path / "images", 1e-2)


@pytest.mark.parametrize("size", [(40, 36), (301, 97), (64, 64), (200, 211)])
def test_the_view_without_torch_is_that_of_the_model(size, make_model):
    model = make_model("FT-Last", "resnet18")
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8))
    view = centre_view(to_pixels(image, 64), 64, 0.875)[None]
    ours = normalised(view, vars(model.config.preprocessing))
    np.testing.assert_allclose(ours, model.preprocess(image).numpy(), atol=2e-5)


@pytest.fixture
def converted(exported, monkeypatch):
    """Exports of the shared adapter take the file that there is already: the conversion takes seconds."""
    folder, _, _ = exported
    monkeypatch.setattr(deploy_onnx, "_convert", lambda *_: (folder / "new" / "m.onnx").read_bytes())
    return folder / "adapter"


@pytest.mark.slow
def test_int8_is_smaller_and_its_loss_is_measured(converted, exported, tmp_path):
    _, model, _ = exported
    options = ("--format", "onnx", "--output", tmp_path / "m.onnx", "--quantize", "int8")
    done = run_cli("export", "--adapter", converted, *options)
    session, printed = ort.InferenceSession(str(tmp_path / "m.onnx")), done.stdout
    assert (tmp_path / "m.onnx").stat().st_size < 0.3 * 4 * sum(p.numel() for p in model.parameters())
    assert "int8 loses" in printed and "accuracy there" in printed
    assert "the ranges of 8 bits are those of" in done.stderr and "training on" not in done.stderr
    assert session.run(None, {"images": IMAGES.numpy()})[0].shape == (3, 4)


@pytest.mark.parametrize("found", ["other classes", "nothing"])
def test_another_folder_of_the_name_of_an_adapters_data_ends_no_export(
    found, make_model, tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for number in range(2 * (found == "other classes")):
        write_image(tmp_path / "images" / "xy"[number] / "1.png", seed=number)
    model = make_model("FT-Last", "resnet18", num_classes=None, label_names=["blue", "red"])
    model.config = replace(model.config, data=DataRecord("images", source="local"))
    caplog.set_level("INFO", "tinytl_hf")
    data = DataConfig(dataset="images", train_size=64)
    assert evaluation_images(model, data, 3).source == "crops of scikit-learn's photos"
    assert "images here is not the data set of the adapter (" in caplog.text and "--data.dataset names" in caplog.text
    with pytest.raises(TinyTLError):  # of what 8 bits cost, photos without classes say nothing
        evaluation_images(model, data, None)
    model.config = replace(model.config, data=DataRecord("others", source="local"))
    with pytest.raises(TinyTLError, match=r"x|holds no image"):
        evaluation_images(model, data, 3)


@pytest.mark.parametrize(("of_8_bits", "words"), [(0.5, "loses 25.00"), (0.75, "loses 0.00"), (1.0, "gains 25.00")])
def test_what_8_bits_cost_has_no_double_negative(of_8_bits, words):
    images = RealImages("photos", 4, [], np.zeros(4, int))
    plain, small = (Comparison("ort", images, 0.0, 1.0, 4, (0.75, share), (1.0, 1.0)) for share in (0.75, of_8_bits))
    assert deploy_onnx._loss(plain, small).endswith(f"int8 {words} points of accuracy")


def test_a_file_tells_the_weights_that_are_in_it_and_the_model_stays_as_it_was(make_model, tmp_path, caplog):
    model = make_model("FT-Last", "resnet18")
    before = model.config
    with torch.no_grad():
        model.backbone.layer1[0].conv1.weight.mul_(1.5)
    model.export(tmp_path / "m.onnx", format="onnx", check_images=1)
    assert "the frozen weights are not those of none any more" in caplog.text and model.config == before
    model.save_pretrained(tmp_path / "adapter")
    about = ort.InferenceSession(str(tmp_path / "m.onnx")).get_modelmeta().custom_metadata_map
    told = json.loads(about["adapter_config"])["backbone"]["sha256"]
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["backbone"]["sha256"]
    assert told == saved != before.backbone.sha256


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("parametrized", r"^layer2.0.conv2.weight is not in the network any more, .* undo that"),
        ("with a bias", r"^layer2.0.conv2.bias came into the network, .* undo that"),
        ("wider", r"is not the resnet18 that it was built as \(layer2.0.conv2"),
    ],
)
def test_a_network_that_was_changed_is_named(change, said, make_model, tmp_path):
    model = make_model("FT-Last", "resnet18")
    if change == "with a bias":
        model.backbone.layer2[0].conv2 = nn.Conv2d(128, 128, 3, padding=1)
    elif change == "wider":
        model.backbone.layer2[0].conv2 = nn.Conv2d(128, 128, 5, padding=2, bias=False)
    else:
        nn.utils.parametrizations.weight_norm(model.backbone.layer2[0].conv2)
    for format, name in (("onnx", "m.onnx"), ("timm", "m")):
        with pytest.raises(TinyTLError, match=said):
            model.export(tmp_path / name, format=format, check_images=1)
    assert not any(tmp_path.iterdir())


def test_a_temporary_folder_without_room_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "away"))
    with pytest.raises(TinyTLError, match=r"quantize=int8: there is no room in .*away to try it out .* TMPDIR"):
        deploy_onnx._quantised(b"", IMAGES)


def test_without_data_the_check_uses_photos_and_says_so(converted, tmp_path, caplog):
    model = TinyTLModel.from_pretrained(converted).eval()
    model.config = replace(model.config, data=None)
    with caplog.at_level("INFO"):
        text = model.export(tmp_path / "m.onnx", format="onnx", check_images=4)
    assert "the adapter names no data set: the check uses crops of scikit-learn's two photos" in caplog.text
    assert "on 4 images of crops of scikit-learn's photos" in text and (tmp_path / "m.onnx").is_file()
    assert not model.training and model.config.preprocessing.eval_size == 64


def failed(adapter, output, *options):
    done = run_cli("export", "--adapter", adapter, "--format", "onnx", "--output", output, *options)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and lines[-1].startswith("tinytl-hf: error: ") and "Traceback" not in done.stderr
    assert sum(line.startswith("tinytl-hf") for line in lines) == 1
    return lines[-1]


def test_a_mistake_is_one_line_and_nothing_is_written(save, tmp_path, monkeypatch):
    adapter = tmp_path / "adapter"
    model = save(adapter, data=False)
    output = tmp_path / "out" / "m.onnx"
    assert "m.pth: name a .onnx file" in failed(adapter, tmp_path / "m.pth")
    assert "a training step needs --format executorch" in failed(adapter, output, "--train", "true")
    assert "name one with --data.dataset" in failed(adapter, output, "--quantize", "int8")
    assert "choose the size in use with --data.eval_size" in failed(adapter, output, "--data.train_size", "96")
    assert "nowhere: cannot be loaded" in failed(adapter, output, "--data.dataset", str(tmp_path / "nowhere"))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        assert "run pip install 'tinytl-hf[onnx]'" in failed(adapter, output)
    (tmp_path / "file").write_text("mine")
    assert "cannot be written" in failed(adapter, tmp_path / "file" / "m.onnx")
    (tmp_path / "there.onnx").write_text("mine")
    assert "there.onnx: exists; name another" in failed(adapter, tmp_path / "there.onnx")
    model.config = replace(model.config, backbone=replace(model.config.backbone, weights="lost.pth"))
    model.save_pretrained(adapter)
    assert "weights=lost.pth: no such file" in failed(adapter, output)
    assert not output.exists() and list(tmp_path.rglob("*.tmp")) == []
    assert (tmp_path / "there.onnx").read_text() == (tmp_path / "file").read_text() == "mine"


@torch.library.custom_op("tinytl_test::odd", mutates_args=())
def odd(x: torch.Tensor) -> torch.Tensor:
    return x + 1


@odd.register_fake
def _(x):
    return torch.empty_like(x)


class Odd(nn.Module):
    def forward(self, x):
        return odd(x)


def test_an_operator_that_onnx_lacks_is_named_with_its_layer(make_model, tmp_path, monkeypatch):
    model = make_model("FT-Last", "resnet18")
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3, 8), Odd(), nn.Flatten(), nn.Linear(256, 4))
    monkeypatch.setattr(exported_network, "stock_backbone", lambda _: backbone)
    with pytest.raises(TinyTLError, match=r"layer 1 has the operator tinytl_test.odd.default, which ONNX lacks"):
        model.export(tmp_path / "m.onnx", format="onnx")
    assert list(tmp_path.iterdir()) == []


def test_logits_that_differ_are_an_error(converted, tmp_path, monkeypatch):
    real = deploy_onnx.session
    monkeypatch.setattr(deploy_onnx, "session", lambda content: lambda inputs: real(content)(inputs) + 2e-4)
    assert "and only 1.0e-04 is rounding; nothing was written" in failed(converted, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_predict_says_what_is_wrong_with_a_file(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"\x08\x07no model")
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Abs", ["x"], ["y"])], "other", [x], [y])
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, ir_version=10, opset_imports=opset), tmp_path / "other.onnx")
    for name, words in (
        ("lost", "no such file"),
        ("broken", "onnxruntime cannot load it"),
        ("other", "was not written by"),
    ):
        done = run_cli("predict", "--adapter", tmp_path / f"{name}.onnx", "x.png")
        assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    done = run_cli("predict", "--adapter", tmp_path / "other.onnx", "--weights", "none", "x.png")
    assert "holds its own weights" in done.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": "no JSON"}, "Expecting value"),
        ({"labels": "[" * 100_000}, "maximum recursion depth"),
        ({"labels": '{"a": 1}'}, "its labels are no list of names"),
        ({"labels": '["blue", "red"]'}, "it has 2 labels, and gives [1, 4]"),
        ({"preprocessing": '{"eval_size": 1000000000}'}, "its eval_size is no side of an image"),
        ({"preprocessing": '{"eval_size": true}'}, "its eval_size is no side of an image"),
        ({"preprocessing": "[]"}, "list indices"),
        ({"preprocessing": '{"eval_size": 64}'}, "crop_pct"),
        ({"input": '{"name": "other", "type": "float32", "layout": "NCHW"}'}, "images"),
    ],
)
def test_a_file_that_says_of_itself_what_does_not_hold_is_refused(change, said, exported, tmp_path):
    network = onnx.load(exported[0] / "new" / "m.onnx")
    for entry in network.metadata_props:
        entry.value = change.get(entry.key, entry.value)
    onnx.save(network, tmp_path / "m.onnx")
    with pytest.raises(TinyTLError, match=r"m.onnx: is not what it says of itself \(") as refused:
        OnnxClassifier(tmp_path / "m.onnx")
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_size_in_use_that_is_null_is_that_of_training_and_for_python_that_of_the_adapter(make_model, monkeypatch):
    model, sizes = make_model("FT-Last", train_size=32, eval_size=64), []
    monkeypatch.setattr(
        deploy_export, "_export_in_format", lambda model, *_: sizes.append(model.config.preprocessing.eval_size)
    )
    config = ExportConfig(adapter="", format="onnx", output="m.onnx")
    deploy_export.export_model(model, config, DataConfig(train_size=32, eval_size=None))
    model.export("m.onnx", format="onnx", data=DataConfig(dataset="digits"))
    assert sizes == [32, 64] and model.config.preprocessing.eval_size == 64


def test_no_place_on_this_disk_is_in_the_file(exported):
    folder, _, _ = exported
    content = (folder / "new" / "m.onnx").read_bytes()
    for place in (b"site-packages", b".py", str(ROOT).encode(), str(folder).encode()):
        assert place not in content


@pytest.fixture(scope="module")
def checked_on_one_image(make_model, colour_folder, tmp_path_factory):
    """A model that trains at another size than it is used at, its file, and what the export of Python said."""
    file = tmp_path_factory.mktemp("one") / "m.onnx"
    sizes = {"train_size": 32, "eval_size": 64}
    model = make_model("FT-Last", "resnet18", num_classes=None, label_names=["blue", "red"], **sizes)
    data = DataConfig(dataset=str(colour_folder))
    return model, data, file, model.export(file, format="onnx", check_images=1, data=data)


def test_one_image_is_enough_to_check_on_and_any_number_runs(checked_on_one_image):
    model, _, file, _ = checked_on_one_image
    run = deploy_onnx.session(file.read_bytes())
    with torch.no_grad():
        np.testing.assert_allclose(run(IMAGES.numpy()), model.eval()(IMAGES).numpy(), atol=1e-4)


def test_data_given_by_python_keep_the_adapters_sizes_and_a_batch_is_of_a_step(checked_on_one_image, tmp_path):
    model, data, _, said = checked_on_one_image
    assert "[batch, 3, 64, 64]" in said
    with pytest.raises(TinyTLError, match="batch_size=3: it is that of a training step"):
        model.export(tmp_path / "n.onnx", format="onnx", batch_size=3, data=data)
    with pytest.raises(TinyTLError, match="check_images=3: a training step is checked on its own batch; leave it out"):
        ExportConfig("x", "executorch", "m.pte", train=True, check_images=3)
