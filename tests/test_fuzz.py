"""Hostile adapters and configs: each loads, or ends with a named error, and nothing else happens.

Cases are drawn by hypothesis, always the same: a few with every ``make test``, thousands with the slow tests.
"""

import copy
import json
import shutil
import struct
import sys

import pytest
import torch
from hypothesis import strategies as st
from shared import ROOT, run_cli
from watch import fuzz

from tinytl_hf import TinyTLError, TinyTLModel
from tinytl_hf.adapter.format import CONFIG_FILE, TENSORS_FILE, read_config, read_tensors

QUICK, LONG = 30, pytest.param(900, marks=pytest.mark.slow)
DEEP = 100_000
HOSTILE = [
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        2,
        33,
        10**30,
        -(10**30),
        0.5,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "\0",
        "é\u202e",
    ),
    *("../../../etc/passwd", "/dev/zero", "~", "none", "no", "1", "x" * 10_000, "../escape.pth", "file:///etc/passwd"),
    *([], {}, [[]], [None], ["a", "a"], [1, 2, 3], [0.0, 0.0, 0.0], [float("nan")] * 3, {"a": {"b": {}}}),
    {"class_path": "antigravity.Fly", "init_args": {"a": 1}},
    {"class_path": "antigravity"},
    {"__path__": "/etc/passwd"},
    "!!python/object/apply:os.system ['touch escaped']",
]


@pytest.fixture
def adapter(make_model, tmp_path, monkeypatch):
    """A valid adapter in a folder of its own, from which a test may load copies."""
    make_model("FT-Last", train_size=32).save_pretrained(tmp_path / "valid")
    folder = shutil.copytree(tmp_path / "valid", tmp_path / "adapter")
    monkeypatch.chdir(folder)
    return folder


def end_named(load):
    """Whether ``load`` gave something; a :class:`TinyTLError` of one line is the one other way to end."""
    try:
        return load()
    except TinyTLError as error:
        assert str(error).strip() and len(str(error)) < 30_000
        return None


def mutated(config):
    """Strategy: ``config`` with one to three hostile changes."""
    groups = [name for name, value in config.items() if isinstance(value, dict)]
    paths = [(key,) for key in config] + [(g, key) for g in groups for key in config[g]]
    changes = st.one_of(
        st.tuples(st.just("set"), st.sampled_from(paths), st.sampled_from(HOSTILE)),
        st.tuples(st.just("set"), st.sampled_from(paths), st.text(max_size=20) | st.integers() | st.floats()),
        st.tuples(st.just("drop"), st.sampled_from(paths), st.none()),
        st.tuples(st.just("add"), st.sampled_from([(), *((g,) for g in groups)]), st.text(max_size=20)),
        st.tuples(st.just("add"), st.sampled_from([(), ("lite",)]), st.sampled_from(["class_path", "../x", "config"])),
    )
    return st.lists(changes, min_size=1, max_size=3).map(lambda drawn: _changed(config, drawn))


def _changed(config, changes):
    config = copy.deepcopy(config)
    for kind, path, value in changes:
        target = config
        for key in path[: -1 if kind != "add" else None]:
            target = target.get(key) if isinstance(target, dict) else None
        if isinstance(target, dict):
            if kind == "set":
                target[path[-1]] = value
            elif kind == "drop":
                target.pop(path[-1], None)
            else:
                target[value] = "../../x"
    return json.dumps(config).encode()


def raw_json(text):
    """Strategy: bytes that are hardly JSON any more."""
    special = [
        *(b"", b"[" * DEEP, b'{"a":' * DEEP, b"\xff\xfe", b"null", b"[]", b"1" * 5000, b'{"format_version": 1e999}'),
        *(b'{"format_version": ' + b"9" * 5000 + b"}", text + text, text.replace(b"{", b'{"format_version": 99,', 1)),
    ]
    cut = st.integers(0, len(text)).map(lambda n: text[:n])
    return st.one_of(st.sampled_from(special), cut, st.binary(max_size=60), flipped(text))


def flipped(content):
    """Strategy: ``content`` with some of its bytes changed."""
    flips = st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), min_size=1, max_size=8)

    def flip(drawn):
        changed = bytearray(content)
        for position, value in drawn:
            changed[position] = value
        return bytes(changed)

    return flips.map(flip)


@pytest.mark.parametrize("cases", [QUICK, LONG])
def test_hostile_adapter_configs(cases, adapter, figure):
    path = adapter / CONFIG_FILE
    valid = path.read_bytes()

    def check(content):
        path.write_bytes(content)
        if end_named(lambda: read_config(adapter)):
            model = end_named(lambda: TinyTLModel.from_pretrained(adapter))
            assert model is None or model.config.label_names

    count = fuzz(mutated(json.loads(valid)) | raw_json(valid), check, adapter, cases)
    assert "antigravity" not in sys.modules
    assert {file.name for file in adapter.iterdir()} == {file.name for file in (adapter.parent / "valid").iterdir()}
    figure(f"adapter_config.json: {count} cases, 0 failures")


def headers(content):
    """Strategy: a safetensors file whose header lies."""
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    values = st.one_of(
        st.tuples(
            st.just("dtype"), st.sampled_from(["F64", "F16", "BF16", "I64", "I8", "BOOL", "F8_E4M3", "C64", "X"])
        ),
        st.tuples(st.just("shape"), st.sampled_from([[2**40], [2**62, 4], [-1], [], [0], [1] * 5000, "x", [1.5]])),
        st.tuples(st.just("data_offsets"), st.sampled_from([[0, 2**60], [2**63, 0], [-4, 0], [0], [5, 1], None])),
    )

    def build(drawn):
        changed = copy.deepcopy(header)
        name, (key, value), renamed, repeated = drawn
        changed[name][key] = value
        if renamed is not None:
            changed[renamed] = changed.pop(name)
        text = json.dumps(changed)
        if repeated:
            text = text[:-1] + f', "{names[0]}": {json.dumps(header[names[0]])}' + "}"
        return struct.pack("<Q", len(text)) + text.encode() + body

    new_names = (
        st.none() | st.sampled_from(["../../escape", "", "backbone\0", "classifier.1.bias "]) | st.text(max_size=9)
    )
    return st.tuples(st.sampled_from(names), values, new_names, st.booleans()).map(build)


def hostile_tensors(content):
    """Strategy: files that are, or nearly are, the safetensors file ``content``."""
    special = [
        *(b"", b"\0" * 8, struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 2**40), b"PK\x03\x04", content * 2),
        *(struct.pack("<Q", 2) + b"{}", struct.pack("<Q", DEEP) + b"[" * DEEP, b"\x80\x04cos\nsystem\n(S'x'\ntR."),
    ]
    not_finite = content[:-4] + struct.pack("<f", float("nan"))
    cut = st.integers(0, len(content)).map(lambda n: content[:n])
    near = st.integers(1, 64).map(lambda n: content[:-n])
    special = st.sampled_from([*special, not_finite])
    return st.one_of(special, cut, near, headers(content), headers(content), flipped(content[:400]), flipped(content))


@pytest.mark.parametrize("cases", [QUICK, LONG])
def test_hostile_safetensors(cases, adapter, figure):
    path = adapter / TENSORS_FILE
    model = TinyTLModel.from_pretrained(adapter)

    def check(content):
        path.write_bytes(content)
        tensors = end_named(lambda: read_tensors(adapter))
        if tensors is not None:
            end_named(lambda: model.load_adapter_tensors(tensors, str(adapter)))
            assert all(tensor.isfinite().all() for tensor in model.adapter_tensors().values())

    count = fuzz(hostile_tensors(path.read_bytes()), check, adapter, cases)
    figure(f"adapter_model.safetensors: {count} cases, 0 failures")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c["preprocessing"].update(train_size=10**9), "train_size=1000000000: use 2048 or less"),
        (lambda c: c["lite"].update(expand=1e9), "lite.expand=1000000000.0"),
        (lambda c: c.update(method="TinyTL-L+B", lite={"expand": 64}), "missing, such as "),
        (lambda c: c["preprocessing"].update(std=[0, 1, 1]), "a std above 0"),
        (lambda c: c.update(label_names=["a", "a"]), "is there more than once; use one name or more, each once"),
        (lambda c: c.update(lite="../other.yaml"), "lite is '../other.yaml', not an object"),
        (lambda c: c.update(backbone={"class_path": "antigravity"}), "class_path is no setting"),
        (lambda c: c.update(format_version=True), "it has no format_version"),
    ],
)
def test_what_a_config_may_not_ask_for_is_named_at_the_command_line(change, named, adapter):
    config = json.loads((adapter / CONFIG_FILE).read_text())
    change(config)
    (adapter / CONFIG_FILE).write_text(json.dumps(config))
    done = run_cli("predict", "--adapter", adapter, "nothing.png")
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert named in done.stderr and "unexpected" not in done.stderr


YAML_PARTS = [
    *(
        "seed: 1",
        "train:",
        "  lr: 1e-3",
        "  epochs: two",
        "data: [1, 2]",
        "data: {train_size: {}}",
        "\t- tab",
        "method: FT-Last",
    ),
    *(
        "backbone: none",
        "a: &a [x, x]",
        "b: *a",
        "<<: *a",
        "- item",
        "? {}",
        "seed: 2001-99-99",
        "seed: 1:2:3",
        "%TAG ! x",
    ),
    *(
        "seed: !!python/object/apply:os.system ['touch escaped']",
        "lite: {class_path: antigravity}",
        "data: ../other.yaml",
    ),
    *(
        "seed: " + "9" * 5000,
        "train: {lr: .nan}",
        "train: {lr: -.inf}",
        "seed: 0x_",
        "---",
        "...",
        "!!set {a, b}",
        "seed: !!int ''",
    ),
    *(
        "data: {crop_scale: [0, 0, 0]}",
        "data: {crop_scale: [.nan, 1]}",
        "lite: null",
        "config: again.yaml",
        "seed: !!binary x",
    ),
    "[" * 5000,
    "{a: " * 3000,
    "\0",
    "é\u202e: \x1b[2J",
]
BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize("cases", [8, pytest.param(250, marks=pytest.mark.slow)])
def test_hostile_yaml(cases, tmp_path, monkeypatch, figure):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.yaml").write_text("dataset: digits")
    text = st.lists(st.sampled_from(YAML_PARTS) | st.text(max_size=15), min_size=1, max_size=6).map("\n".join)

    def check(content):
        (tmp_path / "config.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        # Where all is well with the config, the data set is missing.
        done = run_cli(
            "train", "--config", "config.yaml", "--data.dataset", "nowhere/x.parquet", "--output_dir", "run"
        )
        lines = [line for line in done.stderr.splitlines() if " on 1 process, " not in line]
        assert done.returncode in (1, 2) and len(lines) == 1, done.stderr
        assert lines[0].startswith("tinytl-hf: error: ") and "(unexpected: " not in lines[0], done.stderr
        assert "\x1b" not in lines[0]

    count = fuzz(st.one_of(st.just(BOMB), text, text, st.binary(max_size=40)), check, tmp_path, cases)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.yaml",
        "other.yaml",
    } and "antigravity" not in sys.modules
    figure(f"YAML: {count} cases, 0 failures")


def test_aliases_are_refused_by_name(tmp_path):
    (tmp_path / "bomb.yaml").write_text(BOMB)
    done = run_cli("train", "--config", tmp_path / "bomb.yaml")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "aliases (*name) are not taken" in done.stderr


def test_no_code_of_others_is_trusted():
    source = "".join(path.read_text() for path in (ROOT / "tinytl_hf").rglob("*.py"))
    assert "trust_remote_code" not in source and "pickle.load" not in source and "yaml.unsafe" not in source
    assert source.count("torch.load(") == source.count("weights_only=True)")


def test_adapters_are_never_unpickled(adapter, monkeypatch):
    monkeypatch.setattr("pickle.Unpickler", None)
    monkeypatch.setattr("torch.load", None)
    assert isinstance(TinyTLModel.from_pretrained(adapter), torch.nn.Module)
