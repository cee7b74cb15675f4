"""ExecuTorch: the same logits in its runtime, and training steps whose gradients and losses are those of PyTorch."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from shared import run_cli, small_run, write_image
from torch.export.experimental import _export_forward_backward

from tinytl_hf import TinyTLError, TinyTLModel
from tinytl_hf.config.export import ExportConfig
from tinytl_hf.config.network import LiteConfig
from tinytl_hf.deploy.device_graph import keep_less
from tinytl_hf.deploy.device_step import TrainingStep
from tinytl_hf.deploy.exported import check_output
from tinytl_hf.deploy.gradient_check import GradientCheck, largest_difference

LABELS = ["blue", "red", "grey", "green"]
GROUP = LiteConfig(norm="group")
BATCH, SIZE = 4, 32
METHODS = ("FT-Last", "TinyTL-B", "TinyTL-L+B")
SAME_PADDING = "timm/tf_efficientnet_lite0"


@pytest.fixture
def executorch():
    return pytest.importorskip("executorch.exir", reason="the extra executorch is not installed")


@pytest.fixture
def make_step(make_model):
    """A model whose lite residuals are no zeros, and a batch for it."""

    def make(method, backbone="resnet18"):
        model = make_model(method, backbone, num_classes=None, label_names=LABELS, train_size=SIZE, lite=GROUP)
        with torch.no_grad():
            for parameter in model.trainable_parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        images = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
        return model, images, torch.arange(BATCH) % len(LABELS)

    return make


def eager_gradients(step, images, labels):
    loss, _ = step(images, labels)
    names = [name for name, parameter in step.named_parameters() if parameter.requires_grad]
    values = torch.autograd.grad(loss, [step.get_parameter(name) for name in names])
    return dict(zip(names, values, strict=True))


def run_graph(program, step, images, labels):
    """Run the graph of both passes in PyTorch: the gradients by name."""
    tensors = {**dict(step.named_parameters()), **dict(step.named_buffers())}
    inputs = iter((images, labels))
    specs, constants = program.graph_signature.input_specs, program.constants
    values = [tensors.get(s.target, constants.get(s.target)) if s.target else next(inputs) for s in specs]
    with torch.no_grad():
        outputs = torch.fx.Interpreter(program.graph_module).run(*values)
    kinds = program.graph_signature.output_specs
    return {k.target: v for k, v in zip(kinds, outputs, strict=True) if k.kind.name == "GRADIENT_TO_PARAMETER"}


def bytes_kept(graph):
    """Bytes of what is computed before the loss and used after it."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    (loss,) = (i for node, i in position.items() if node.target is torch.ops.aten._log_softmax.default)
    kept = [
        node.meta["val"]
        for node, i in position.items()
        if node.op == "call_function" and i < loss and max((position[user] for user in node.users), default=0) > loss
    ]
    return sum(value.numel() * value.element_size() for value in kept if isinstance(value, torch.Tensor))


@pytest.mark.parametrize(
    ("method", "backbone"),
    [
        ("TinyTL-B", "timm/test_resnet"),
        pytest.param("TinyTL-L+B", "resnet18", marks=pytest.mark.slow),
        pytest.param("TinyTL-L+B", SAME_PADDING, marks=pytest.mark.slow),
    ],
)
def test_less_is_kept_for_the_same_gradients(method, backbone, make_step):
    if backbone.startswith("timm/"):
        pytest.importorskip("timm", reason="the extra timm is not installed")
    model, images, labels = make_step(method, backbone)
    step = TrainingStep(model)
    expected = eager_gradients(step, images, labels)
    program = _export_forward_backward(torch.export.export(step, (images, labels), strict=False))
    before = bytes_kept(program.graph)
    keep_less(program.graph)
    program.graph_module.recompile()
    gradients = run_graph(program, step, images, labels)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        largest = float(expected[name].abs().max())  # small values are sums of large ones, with their rounding
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=max(1e-5 * largest, 1e-7))
    assert bytes_kept(program.graph) < 0.5 * before
    padding = [n for n in program.graph.nodes if n.target is torch.ops.aten.constant_pad_nd.default]
    assert all(side >= 0 for node in padding for side in node.args[1])  # ExecuTorch refuses less


@pytest.mark.slow
def test_a_step_of_a_network_with_same_padding_runs(make_step, tmp_path, executorch):
    pytest.importorskip("timm", reason="the extra timm is not installed")
    model, _, _ = make_step("TinyTL-L+B", SAME_PADDING)
    text = model.export(tmp_path / "step.pte", format="executorch", train=True, batch_size=2)
    assert re.search(r"\d+ gradients, largest relative difference [\d.]+e-0[6-9]", text), text


def test_gradients_that_differ_by_more_than_rounding_are_refused(make_step):
    model, images, labels = make_step("TinyTL-B")
    ours = eager_gradients(TrainingStep(model), images, labels)
    one = next(iter(ours))
    for share, is_refused in ((1e-6, False), (0.01, True)):
        theirs = {**ours, one: (1 + share) * ours[one]}
        check = GradientCheck(len(ours), largest_difference(theirs, ours), rounding=2e-6, single=None)
        assert check.batch == pytest.approx(share, rel=0.1)
        if is_refused:
            with pytest.raises(
                TinyTLError, match=r"differ by 1\.0e-02 from PyTorch's, those by 2\.0e-06 from float64"
            ):
                check.check()
        else:
            check.check()
    with pytest.raises(TinyTLError, match="in place of"):
        largest_difference({one: ours[one]}, ours)


@pytest.mark.parametrize("place", [0, -1])
def test_gradients_that_are_no_numbers_are_refused_wherever_they_are(place):
    ours = {"first": torch.ones(3), "second": torch.ones(2)}
    name = list(ours)[place]
    check = GradientCheck(2, largest_difference({**ours, name: ours[name] * float("nan")}, ours), 2e-6, single=None)
    with pytest.raises(TinyTLError, match="gradients differ by nan"):
        check.check()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("FT-Full", {}, "norms of FT-Full learn from their batch, which a device cannot do; use FT-Last"),
        ("TinyTL-L+B", {}, "train it with --lite.norm group"),
        ("FT-Last", {"head_dropout": 0.2}, "head.dropout=0.2; a device step needs 0"),
    ],
)
def test_what_cannot_train_on_a_device_is_refused(method, options, message, make_model, tmp_path):
    from tinytl_hf.config.network import HeadConfig

    model = make_model(method, "resnet18", head=HeadConfig(options.get("head_dropout", 0.0)))
    with pytest.raises(TinyTLError, match=message):
        model.export(tmp_path / "step.pte", format="executorch", train=True)
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_the_extra_is_named(make_model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    for train in (True, False):
        with pytest.raises(TinyTLError, match=r"run pip install 'tinytl-hf\[executorch\]'"):
            make_model("FT-Last", "resnet18").export(tmp_path / "m.pte", format="executorch", train=train)


def test_two_files_are_written_or_none(tmp_path):
    (tmp_path / "m.json").write_text("mine")
    with pytest.raises(TinyTLError, match=r"m.json: exists"):
        check_output(ExportConfig("", "executorch", str(tmp_path / "m.pte")))
    assert (tmp_path / "m.json").read_text() == "mine" and not (tmp_path / "m.pte").exists()


@pytest.mark.slow
def test_the_runtime_gives_pytorchs_logits(make_step, tmp_path, executorch):
    from executorch.runtime import Runtime

    model, images, _ = make_step("TinyTL-L+B")
    text = model.export(tmp_path / "m.pte", format="executorch", check_images=3)
    assert "checked in ExecuTorch on 3 images" in text and "same label for 3 of 3" in text
    method = Runtime.get().load_program(tmp_path / "m.pte").load_method("forward")
    logits = method.execute([images[:1]])[0]
    torch.testing.assert_close(logits, model.eval()(images[:1]).detach(), atol=1e-4, rtol=0)
    about = json.loads((tmp_path / "m.json").read_text())
    assert about["labels"] == LABELS and about["input"]["shape"] == [3, SIZE, SIZE]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_fifty_steps_on_a_device_are_fifty_steps_in_pytorch_and_the_adapter_comes_back(
    method, make_step, tmp_path, executorch, figure
):
    from tinytl_hf.deploy.device_training import DeviceTraining

    model, _, _ = make_step(method)
    model.save_pretrained(tmp_path / "before")
    text = model.export(tmp_path / "step.pte", format="executorch", train=True, batch_size=BATCH)
    figure(f"{method} of resnet18: {text.splitlines()[2]}")
    training, step = DeviceTraining(tmp_path / "step.pte", lr=0.01), TrainingStep(model)
    random = np.random.default_rng(0)
    images = random.standard_normal((6, BATCH, 3, SIZE, SIZE)).astype(np.float32)
    labels = random.integers(0, len(LABELS), (6, BATCH))
    optimizer = torch.optim.SGD([p for p in step.parameters() if p.requires_grad], 0.01)
    for i in range(50):
        ours = training.step(images[i % 6], labels[i % 6])
        loss, _ = step(torch.from_numpy(images[i % 6]), torch.from_numpy(labels[i % 6]))
        assert ours == pytest.approx(loss.item(), abs=1e-3), i
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    training.save_adapter(tmp_path / "after")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys() and all(not torch.equal(before[name], after[name]) for name in after)
    back = TinyTLModel.from_pretrained(tmp_path / "after").eval()
    expected = step.backbone.eval()(torch.from_numpy(images[0])).detach()
    torch.testing.assert_close(back(torch.from_numpy(images[0])).detach(), expected, atol=2e-3, rtol=1e-3)


def test_the_photos_of_a_folder_are_read_by_class(tmp_path, caplog):
    from tinytl_hf.deploy.device_training import read_folder

    caplog.set_level("INFO", "tinytl_hf")
    for i, name in enumerate(("red", "blue", "red/deeper")):
        write_image(tmp_path / name / f"{i}.png", seed=i)
    (tmp_path / "red" / "notes.txt").write_text("no photo")
    photos, labels = read_folder(tmp_path, LABELS, SIZE)
    assert labels == [0, 1, 1] and photos[0].shape == (36, 40, 3)
    assert caplog.messages == [f"{tmp_path / 'red'}: 2 images; left out: 1 .txt"]
    (tmp_path / "green").mkdir()
    with pytest.raises(TinyTLError, match="no photo in its sub-folder green"):
        read_folder(tmp_path, LABELS, SIZE)
    (tmp_path / "cat").mkdir()
    with pytest.raises(TinyTLError, match="has a sub-folder cat"):
        read_folder(tmp_path, LABELS, SIZE)
    with pytest.raises(TinyTLError, match="has no sub-folder"):
        read_folder(tmp_path / "cat", LABELS, SIZE)


def test_beside_the_folders_of_classes_others_are_left_out_and_said(tmp_path, caplog):
    from tinytl_hf.deploy.device_training import read_folder

    caplog.set_level("INFO", "tinytl_hf")
    for name in ("red/1.png", "2.png", ".ipynb_checkpoints/3.png", "__MACOSX/4.png"):
        write_image(tmp_path / name, seed=0)
    photos, labels = read_folder(tmp_path, LABELS, SIZE)
    assert len(photos) == 1 and labels == [1]
    left_out = "left out, as they are no folder of a class: '.ipynb_checkpoints', '2.png', '__MACOSX'"
    assert caplog.messages == [f"{tmp_path}: {left_out}"]
    with pytest.raises(TinyTLError, match="images=: it is empty"):
        read_folder("", LABELS, SIZE)


@pytest.mark.parametrize(
    ("labels", "photos", "message"),
    [
        ([], 0, "photos=0: use one or more"),
        ([0, 1], 3, r"labels=int64 \[2\]: use a class number for each of 3 photos"),
        ([0.0, 1.0], 2, r"labels=float64 \[2\]: use a class number"),
        (["red"], 1, "use a class number for each of 1 photo"),
        ([0, 4], 2, r"labels=\[4\]: use class numbers from 0 to 3"),
        (np.array([-1]), 1, r"labels=\[-1\]: use class numbers"),
    ],
)
def test_numbers_of_no_class_never_reach_a_device(labels, photos, message):
    from tinytl_hf.deploy.device_training import class_numbers

    with pytest.raises(TinyTLError, match=message):
        class_numbers(labels, photos, len(LABELS))
    assert class_numbers(np.array([3, 0], np.uint8), 2, len(LABELS)).tolist() == [3, 0]


def test_an_adapter_that_is_there_ends_a_training_on_a_device_before_it_begins(make_model, tmp_path):
    from tinytl_hf.deploy.device_training import DeviceTraining, main

    model = make_model("FT-Last", "resnet18")
    model.save_pretrained(tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    (tmp_path / "file").write_text("mine")
    for output, message in (
        ("adapter", "holds an adapter; name another folder, or replace it with --overwrite"),
        ("file/adapter", "cannot be written"),
    ):
        words = ["--step", "lost.pte", "--images", "lost", "--output", str(tmp_path / output)]
        with pytest.raises(SystemExit, match=f"error: output={tmp_path / output}: {message}"):
            main(words)
    with pytest.raises(SystemExit, match="output=: it is empty"):
        main(["--step", "lost.pte", "--images", "lost", "--output", ""])
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
    for options, message in (({"lr": -0.1}, "lr=-0.1: use"), ({"lr": 0.1, "momentum": 1.0}, "momentum=1.0: use")):
        with pytest.raises(TinyTLError, match=message):
            DeviceTraining("lost.pte", **options)


def test_eval_does_not_say_what_a_device_trained_on(colour_folder, tmp_path):
    from tinytl_hf.deploy.device_training import trained_further

    before = tmp_path / "run" / "adapter"
    options = ("--method", "FT-Last", "--backbone.name", "resnet18", "--train.epochs", "1")
    assert run_cli(*small_run(colour_folder, before.parent, *options)).returncode == 0
    assert "trained on none of them" in run_cli("eval", "--adapter", before).stderr
    model = TinyTLModel.from_pretrained(before)
    for name in ("once", "twice"):
        model.config = trained_further(model.config)
        model.save_pretrained(tmp_path / name)
        said = run_cli("eval", "--adapter", tmp_path / name, "--data.dataset", colour_folder).stderr
        assert "whether it was trained on any of them is not known" in said
        assert "went on from another adapter (FT-Last, 2 classes)" in (tmp_path / name / "README.md").read_text()


def test_a_step_that_is_none_is_named(tmp_path):
    pytest.importorskip("executorch.extension.training", reason="the extra executorch is not installed")
    from tinytl_hf.deploy.device_training import DeviceTraining

    with pytest.raises(TinyTLError, match=r"step\.json: is not the description of a training step"):
        DeviceTraining(tmp_path / "step.pte", lr=0.1)


def test_the_verb_refuses_a_pte_without_its_suffix(make_model, tmp_path):
    make_model("FT-Last", "resnet18").save_pretrained(tmp_path / "x")
    done = run_cli("export", "--adapter", tmp_path / "x", "--format", "executorch", "--output", tmp_path / "m.bin")
    assert done.returncode == 1 and "m.bin: name a .pte file" in done.stderr and done.stderr.count("\n") == 1
