import copy

import pytest
import torch
import torchvision
from PIL import Image
from shared import write_image
from test_methods import train_steps

from tinytl_hf import TinyTLError, TinyTLModel
from tinytl_hf.adapter.delta import frozen_tensors

# Name, method, classes, image size.
KINDS = [
    ("last", "FT-Last", 4, 64),
    ("bias", "TinyTL-B", 6, 64),
    ("lite", "TinyTL-L+B", 7, 64),
    ("small", "TinyTL-L", 9, 32),
    ("norm", "FT-Norm+Last", 5, 48),
    ("full", "FT-Full", 4, 64),
]


def images_for(model):
    size = model.config.preprocessing.eval_size
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(size))


@torch.no_grad()
def logits(model):
    return model.eval()(images_for(model))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A trained adapter of each kind over the same backbone."""
    root = tmp_path_factory.mktemp("adapters")
    for name, method, classes, size in KINDS:
        torch.manual_seed(classes)
        model = TinyTLModel.from_backbone(
            "mobilenet_v2", method=method, num_classes=classes, weights="none", train_size=size
        )
        train_steps(model, steps=1)
        model.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def alone(folders):
    """What each adapter says when it is loaded alone."""
    return {name: logits(TinyTLModel.from_pretrained(folders / name)) for name, *_ in KINDS}


@pytest.fixture(scope="module")
def loaded_once(folders):
    model = TinyTLModel.from_pretrained(folders / "last")
    for name, *_ in KINDS[1:]:
        model.load_adapter(folders / name, name)
    return model


@pytest.fixture
def all_loaded(loaded_once):
    """A model with all of them, the first as ``default``: not to be changed."""
    loaded_once.set_adapter("default")
    return loaded_once


@pytest.fixture
def pair(folders):
    """A model with two of them, to be changed."""
    model = TinyTLModel.from_pretrained(folders / "norm")
    model.load_adapter(folders / "lite", "lite")
    return model


@pytest.mark.slow
def test_every_adapter_gives_the_logits_that_it_gives_alone_bit_for_bit(alone, all_loaded):
    names = [name for name, *_ in KINDS]
    for name in [*names, *reversed(names)]:
        all_loaded.set_adapter("default" if name == "last" else name)
        assert torch.equal(logits(all_loaded), alone[name]), name


@pytest.mark.parametrize(("first", "second"), [("norm", "lite"), ("lite", "norm"), ("full", "norm")])
def test_whatever_is_loaded_first_another_method_loads_beside_it(first, second, folders, alone):
    model = TinyTLModel.from_pretrained(folders / first)
    model.load_adapter(folders / second, "second")
    with model.using("second"):
        assert torch.equal(logits(model), alone[second])
    assert torch.equal(logits(model), alone[first])


def test_frozen_tensors_exist_once_and_switching_copies_none(all_loaded):
    shared = frozen_tensors(all_loaded.backbone)
    for name in ("bias", "lite", "small", "norm"):
        all_loaded.set_adapter(name)
        own = frozen_tensors(all_loaded.backbone)
        assert len(own) > 50
        assert all(own[key] is shared[key] for key in own)
    all_loaded.set_adapter("full")
    assert frozen_tensors(all_loaded.backbone) == {}


def test_config_labels_names_and_preprocessing_follow_the_active_adapter(all_loaded, tmp_path):
    image = Image.open(write_image(tmp_path / "image.png"))
    for name, method, classes, size in KINDS[1:]:
        all_loaded.set_adapter(name)
        assert all_loaded.active_adapter == name == all_loaded.adapter_names[0]
        assert all_loaded.config.method == method and len(all_loaded.label_names) == classes
        assert all_loaded.folder is not None and all_loaded.folder.name == name
        assert all_loaded.preprocess(image).shape == (1, 3, size, size)
        assert all(name.startswith("backbone.") for name, _ in all_loaded.named_parameters())
    assert sorted(all_loaded.adapter_names) == sorted(["default", *(name for name, *_ in KINDS[1:])])


def test_training_and_saving_are_about_the_active_adapter(folders, alone, pair, tmp_path):
    pair.set_adapter("lite")
    for model in (pair, TinyTLModel.from_pretrained(folders / "lite")):
        train_steps(model, steps=1)
        model.save_pretrained(tmp_path / model.active_adapter)
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("lite", "default")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not torch.equal(logits(pair), alone["lite"])
    pair.set_adapter("default")
    assert torch.equal(logits(pair), alone["norm"])


def test_using_comes_back_after_an_error_and_keeps_the_mode(all_loaded):
    all_loaded.train()
    with pytest.raises(KeyError), all_loaded.using("lite") as model:
        assert model.active_adapter == "lite" and all(module.training for module in model.backbone.modules())
        raise KeyError
    assert all_loaded.active_adapter == "default"
    all_loaded.eval()
    with all_loaded.using("lite"):
        assert not any(module.training for module in all_loaded.modules())


def test_waiting_adapters_are_cast_along_and_still_share(folders, pair):
    pair.load_adapter(folders / "bias", "bias")
    pair.double()
    shared = frozen_tensors(pair.backbone)
    for name in ("lite", "bias"):
        pair.set_adapter(name)
        tensors = [*pair.parameters(), *pair.buffers()]
        assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float64}
        assert all(frozen_tensors(pair.backbone)[key] is tensor for key, tensor in shared.items())
        assert pair.eval()(images_for(pair).double()).isfinite().all()
        shared = frozen_tensors(pair.backbone)


def test_an_adapter_loads_in_the_type_of_the_model(folders):
    model = TinyTLModel.from_pretrained(folders / "last").to(torch.bfloat16)
    model.load_adapter(folders / "lite", "lite")
    model.set_adapter("lite")
    assert model.eval()(images_for(model).bfloat16()).dtype == torch.bfloat16


def test_a_copy_of_the_model_switches_by_itself(alone, pair):
    other = copy.deepcopy(pair)
    other.set_adapter("lite")
    assert pair.active_adapter == "default"
    assert torch.equal(logits(other), alone["lite"])


def test_wrong_names_end_with_what_to_do(folders, all_loaded):
    for call, message in [
        (lambda: all_loaded.set_adapter("lost"), "name=lost: no such adapter; loaded are bias, default, full"),
        (lambda: all_loaded.unload_adapter("lost"), "name=lost: no such adapter"),
        (lambda: all_loaded.unload_adapter("default"), "default: is the active adapter; set_adapter another"),
        (lambda: all_loaded.load_adapter(folders / "lite", "default"), "name=default: is loaded already"),
        (lambda: all_loaded.load_adapter(folders / "lite", "lite"), "name=lite: is loaded already; unload it"),
        (lambda: all_loaded.load_adapter(folders / "lite", ""), "choose a name"),
        (lambda: all_loaded.load_adapter(folders / "lite", 5), "name=5: use a text"),
        (lambda: all_loaded.load_adapter(folders / "lost", "b"), "lost is no adapter"),
    ]:
        with pytest.raises(TinyTLError, match=message):
            call()
    all_loaded.unload_adapter("lite")
    assert "lite" not in all_loaded.adapter_names
    all_loaded.load_adapter(folders / "lite", "lite")
    assert all_loaded.active_adapter == "default"


def test_an_adapter_of_another_backbone_is_refused(folders, make_model, tmp_path):
    model = TinyTLModel.from_pretrained(folders / "last")
    make_model("FT-Last", "mobilenet_v3_small").save_pretrained(tmp_path / "small")
    with pytest.raises(TinyTLError, match=r"small was not trained on the mobilenet_v2 .*is for mobilenet_v3_small"):
        model.load_adapter(tmp_path / "small", "b")
    torch.manual_seed(77)
    torch.save(torchvision.models.mobilenet_v2().state_dict(), tmp_path / "other.pth")
    make_model("TinyTL-B", weights=str(tmp_path / "other.pth")).save_pretrained(tmp_path / "other")
    with pytest.raises(TinyTLError, match=r"not trained on .*in memory \(from none\): sha256 of its frozen"):
        model.load_adapter(tmp_path / "other", "b")
    with pytest.raises(TinyTLError, match=r"in memory \(from none\): features.0.0.weight differs"):
        model.load_adapter(tmp_path / "other", "b", weights=tmp_path / "other.pth")
    assert model.adapter_names == ["default"]


def test_a_model_that_trained_everything_takes_the_frozen_weights_from_where_the_adapter_says(
    folders, make_model, tmp_path
):
    torch.manual_seed(77)
    torch.save(torchvision.models.mobilenet_v2().state_dict(), tmp_path / "other.pth")
    make_model("TinyTL-B", weights=str(tmp_path / "other.pth")).save_pretrained(tmp_path / "other")
    model = TinyTLModel.from_pretrained(folders / "full")
    model.load_adapter(tmp_path / "other", "other")
    with model.using("other"):
        assert torch.equal(logits(model), logits(TinyTLModel.from_pretrained(tmp_path / "other")))
    with pytest.raises(TinyTLError, match="was not trained on"):
        model.load_adapter(folders / "lite", "lite")


def test_the_engine_of_the_model_is_that_of_its_adapters(folders, make_model):
    model = make_model("TinyTL-B", lean=False)
    model.load_adapter(folders / "lite", "lite")
    model.set_adapter("lite")
    assert model.stock_layers == []
    assert not any("lean" in type(module).__module__ for module in model.modules())


def test_adapters_with_int8_weights_share_them_and_stay_apart_from_fp32_ones(folders, make_model, tmp_path):
    for name, method in (("lite", "TinyTL-L"), ("bias", "TinyTL-B")):
        make_model(method, frozen_weights="int8").save_pretrained(tmp_path / name)
    model = TinyTLModel.from_pretrained(folders / "last")
    for name in ("lite", "bias"):
        model.load_adapter(tmp_path / name, name)
        with model.using(name):
            assert torch.equal(logits(model), logits(TinyTLModel.from_pretrained(tmp_path / name)))
    model.set_adapter("lite")
    shared = frozen_tensors(model.backbone)
    model.set_adapter("bias")
    own = frozen_tensors(model.backbone)
    assert own["features.1.conv.0.0.weight"].dtype == torch.int8
    assert all(shared[key] is tensor for key, tensor in own.items())


@pytest.mark.parametrize("waiting", ["last", "lite"])
def test_freezing_everything_for_use_and_moving_it_changes_no_adapter(waiting, folders, alone):
    model = TinyTLModel.from_pretrained(folders / "bias")
    model.load_adapter(folders / waiting, "waiting")
    model.eval().requires_grad_(False).to("cpu")
    model.load_adapter(folders / "small", "later")
    for name, kind in (("waiting", waiting), ("later", "small"), ("default", "bias")):
        with model.using(name):
            assert torch.equal(logits(model), alone[kind])


@pytest.mark.parametrize("name", ["default", "lite"])
def test_parts_that_were_put_in_evaluation_mode_stay_there_while_another_adapter_is_used(name, pair):
    pair.train().backbone.features[3].eval()
    with pair.using(name):
        assert pair.backbone.features[4].training
    assert pair.backbone.features[4].training and not pair.backbone.features[3].training
    with pair.using("lite"):
        pair.eval()
    assert not any(module.training for module in pair.modules())


@pytest.mark.parametrize("name", ["default", "lite"])
def test_what_was_loaded_evaluates_until_it_is_told_to_train(name, pair):
    pair.set_adapter(name)
    before = {key: tensor.clone() for key, tensor in pair.adapter_tensors().items()}
    assert not any(module.training for module in pair.modules())
    first = pair(images_for(pair)[:1])
    torch.testing.assert_close(pair(images_for(pair))[:1], first)
    assert all(torch.equal(tensor, before[key]) for key, tensor in pair.adapter_tensors().items())


def test_another_adapter_is_looked_at_before_its_first_training_pass(pair):
    pair.train()(images_for(pair))
    with pair.using("lite"):
        pair.backbone.features[4].conv[1][0] = torch.nn.Identity()
    pair(images_for(pair))
    pair.set_adapter("lite")
    with pytest.raises(TinyTLError, match="is not in the network any more"):
        pair(images_for(pair))
