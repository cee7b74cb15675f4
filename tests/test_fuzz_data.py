"""Hostile images and data sets: each is read, or ends with a named error, and nothing else happens."""

import io
import os
import struct
import zlib

import datasets
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image
from shared import run_cli
from test_fuzz import LONG, end_named, flipped
from watch import fuzz

from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.batches import read_images
from tinytl_hf.data.images import MAX_ASPECT, REDUCE_ABOVE, UnreadableImageError
from tinytl_hf.data.sets import open_data
from tinytl_hf.data.tensors import decode

SIZE = 32
FORMATS = {
    "PNG": "RGB",
    "JPEG": "CMYK",
    "GIF": "P",
    "BMP": "1",
    "TIFF": "RGBA",
    "WEBP": "RGBA",
    "PPM": "L",
    "ICO": "RGBA",
}
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script><image href="file:///etc/passwd"/></svg>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(escaped) (w) file closefile\nshowpage\n%%EOF\n"


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width, height, colour_type=0, bits=8, data=b""):
    """A PNG that claims a size."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def make_images():
    """Valid images of every format, odd ones and traps, by name."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8))
    images = {kind: encoded(noise.convert(mode), kind) for kind, mode in FORMATS.items()}
    frames = [Image.new("RGB", (20, 20), (i, 0, 0)) for i in range(30)]
    images |= {
        "animated GIF": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated PNG": encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "16 bit": encoded(Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40)), "PNG"),
        "1x1": encoded(Image.new("RGB", (1, 1)), "PNG"),
        "20000x1": encoded(Image.new("RGB", (20_000, 1)), "PNG"),
        "1x20000": encoded(Image.new("L", (1, 20_000)), "PNG"),
        "SVG": SVG,
        "EPS": EPS,
        "0 bytes": b"",
        "claims 0x0": png(0, 0),
        "claims 50000x50000": png(50_000, 50_000, data=zlib.compress(b"\0" * 10_000_000)),
        "claims 2^31": png(2**31 - 1, 2**31 - 1),
        "bomb": png(13_000, 13_000, bits=1, data=zlib.compress(b"\0" * 13_000 * 1626)),
        "float TIFF": encoded(Image.fromarray(np.full((9, 9), np.nan, dtype=np.float32)), "TIFF"),
    }
    return images


@pytest.mark.parametrize("cases", [60, LONG])
def test_hostile_images(cases, tmp_path, monkeypatch, figure):
    monkeypatch.chdir(tmp_path)
    images = make_images()
    whole = st.sampled_from(list(images.values()))
    cut = st.tuples(whole, st.floats(0, 1)).map(lambda pair: pair[0][: int(len(pair[0]) * pair[1])])
    small = [content for content in images.values() if content and len(content) < 100_000]
    broken = st.sampled_from(small).flatmap(flipped)

    def check(content):
        (tmp_path / "image.png").write_bytes(content)
        for source in ({"bytes": content, "path": None}, {"bytes": None, "path": "image.png"}):
            try:
                pixels = decode(source, SIZE)
            except UnreadableImageError as error:
                assert str(error) and len(str(error)) < 2000
                continue
            height, width = pixels.shape[1:]
            assert pixels.dtype == torch.uint8 and pixels.shape[0] == 3
            shorter, longer = sorted((height, width))
            assert 1 <= shorter <= REDUCE_ABOVE * SIZE and longer <= MAX_ASPECT * shorter + 1

    count = fuzz(st.one_of(whole, cut, broken, broken, st.binary(max_size=200)), check, tmp_path, cases)
    assert os.listdir(tmp_path) == ["image.png"]
    figure(f"images: {count} cases, 0 failures")


def test_images_that_are_traps_are_refused_and_odd_ones_read(tmp_path):
    unreadable = {"float TIFF", "SVG", "EPS", "0 bytes", "claims 0x0", "claims 50000x50000", "claims 2^31"}
    for name, content in make_images().items():
        if name in unreadable:
            with pytest.raises(UnreadableImageError):
                decode({"bytes": content, "path": None}, SIZE)
        else:
            assert decode({"bytes": content, "path": None}, SIZE).numel() > 0, name


PNG = encoded(Image.new("RGB", (9, 9), "red"), "PNG")
PICTURES = [{"bytes": PNG, "path": None}] * 6 + [
    *(
        None,
        {"bytes": b"", "path": None},
        {"bytes": SVG, "path": "x.png"},
        {"bytes": PNG, "path": "../../etc/passwd"},
    ),
    *({"bytes": PNG * 2, "path": "nowhere.png"}, {"bytes": PNG[:40], "path": None}),
]
LABEL_KINDS = {
    "class": (datasets.ClassLabel(names=["a", "b", "c"]), st.integers(-1, 2) | st.integers(0, 1)),
    "int": (datasets.Value("int64"), st.none() | st.integers(-(2**62), 2**62) | st.integers(0, 1)),
    "float": (datasets.Value("float32"), st.sampled_from([0.0, 1.0, float("nan"), float("inf")])),
    "string": (datasets.Value("string"), st.sampled_from(["a", "b", "", "../x", "é\0", None])),
    "bool": (datasets.Value("bool"), st.booleans()),
    "list": (datasets.List(datasets.Value("int64")), st.lists(st.integers(0, 3), max_size=2)),
    "dict": ({"a": datasets.Value("int64")}, st.fixed_dictionaries({"a": st.integers(0, 1)})),
    "time": (datasets.Value("timestamp[s]"), st.integers(0, 2)),
    "binary": (datasets.Value("binary"), st.binary(max_size=2)),
}


@st.composite
def tables(draw):
    """A data set of a few rows whose columns may be anything."""
    rows = draw(st.sampled_from([0, 1, 2, 5, 8, 12]))
    features, values = {}, {}
    kind = draw(st.sampled_from(["image", "image", "image", "text", "none", "two"]))
    if kind in ("image", "two"):
        for name in ("picture", "other")[: 1 + (kind == "two")]:
            features[name] = datasets.Image()
            values[name] = [draw(st.sampled_from(PICTURES)) for _ in range(rows)]
    elif kind == "text":
        features["picture"], values["picture"] = datasets.Value("string"), ["no image"] * rows
    label = draw(st.sampled_from([None, *LABEL_KINDS]))
    if label is not None:
        features["kind"], value = LABEL_KINDS[label]
        values["kind"] = [draw(value) for _ in range(rows)]
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "image_column": st.sampled_from(["picture", "kind", "nowhere", ""]),
        "label_column": st.sampled_from(["kind", "picture", "nowhere"]),
        "eval_split": st.sampled_from(["train", "test", "holdout", "nowhere", "../test"]),
        "train_split": st.sampled_from(["train", "train", "test", "nowhere"]),
        "eval_fraction": st.sampled_from([0.01, 0.5, 0.99]),
        "max_train_samples": st.sampled_from([1, 3, 10**12]),
        "skip_corrupt": st.booleans(),
        "memory_limit_mb": st.sampled_from([0, 2048]),
    },
)


@pytest.mark.parametrize("cases", [15, pytest.param(400, marks=pytest.mark.slow)])
def test_hostile_data_sets(cases, tmp_path, monkeypatch, figure):
    monkeypatch.chdir(tmp_path)
    numbers = iter(range(10**9))

    def check(case):
        tables, options = case
        folder = tmp_path / str(next(numbers))
        datasets.DatasetDict(tables).save_to_disk(str(folder))
        config = DataConfig(dataset=str(folder), train_size=SIZE, workers=0, **options)
        for split in end_named(lambda: open_data(config)[:2]) or ():
            images = end_named(lambda split=split: read_images(split, config, SIZE))
            batch = end_named(lambda images=images: images.__getitems__([0])) if images is not None else None
            if batch is not None:
                assert batch["pixels"].dtype == torch.uint8 and 0 <= batch["labels"].item() < len(split.label_names)

    splits = st.dictionaries(
        st.sampled_from(["train", "train", "test", "validation"]), tables(), min_size=1, max_size=3
    )
    count = fuzz(st.tuples(splits, CONFIGS), check, tmp_path, cases)
    figure(f"data sets: {count} cases, 0 failures")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda p: (p / "dataset_dict.json").write_text('{"splits": ["train", "train"]}'), None),  # harmless
        (lambda p: (p / "dataset_dict.json").write_text('{"splits": ["../../etc"]}'), "cannot be loaded"),
        (lambda p: (p / "dataset_dict.json").write_text("["), "cannot be loaded"),
        (lambda p: (p / "train" / "state.json").write_text("{}"), "cannot be loaded"),
        (lambda p: next((p / "train").glob("*.arrow")).write_bytes(b"ARROW1"), "cannot be loaded"),
        (lambda p: (p / "train" / "dataset_info.json").unlink(), "cannot be loaded"),
    ],
)
def test_a_damaged_data_set_ends_with_one_line(damage, named, tmp_path):
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])})
    rows = {"picture": [{"bytes": PNG, "path": None}] * 20, "kind": [0, 1] * 10}
    table = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=table).save_to_disk(str(tmp_path / "data"))
    damage(tmp_path / "data")
    options = ["--backbone.weights", "none", "--data.train_size", "32", "--method", "FT-Last"]
    options += ["--train.epochs", "1", "--train.global_batch_size", "6"]
    done = run_cli("train", "--data.dataset", tmp_path / "data", "--output_dir", tmp_path / "run", *options)
    if named:
        lines = done.stderr.splitlines()
        assert done.returncode == 1 and named in lines[-1] and len(lines) == 2, done.stderr
        assert not (tmp_path / "run").exists()
    else:
        assert done.returncode == 0, done.stderr
