"""Pipes, devices, links and texts where files are read or written: nothing waits, runs or is lost.

What would wait for ever is ended by a timer, so that a test of it fails.
"""

import io
import json
import os
import signal
import stat
import tarfile
from contextlib import contextmanager
from dataclasses import replace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from shared import run_cli, write_image
from test_card import config
from test_tables import opened

from tinytl_hf import TinyTLError
from tinytl_hf.adapter.format import CONFIG_FILE, read_config
from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.changed_copies import original_name
from tinytl_hf.data.encoded import PIXELS
from tinytl_hf.data.images import UnreadableImageError, decode_pixels
from tinytl_hf.data.labels import label_values
from tinytl_hf.data.odd_classes import about_names
from tinytl_hf.data.tars import check_tars
from tinytl_hf.disk import check_writable
from tinytl_hf.errors import one_line
from tinytl_hf.hub.card import BEGIN, END, render_card

NO_FILE = "it is no file, but a pipe, a device or the like"


@contextmanager
def within(seconds):
    """End what takes longer."""

    def end(*_):
        raise AssertionError(f"it takes longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def model(make_model):
    return make_model("FT-Last", train_size=32)


@pytest.fixture
def images(tmp_path):
    for number in range(12):
        write_image(tmp_path / "data" / "ab"[number % 2] / f"{number}.png", size=(8, 8), seed=number)
    return tmp_path / "data"


def test_a_link_where_a_file_is_to_be_made_is_not_written_through(model, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("precious")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / f".{CONFIG_FILE}.tmp").symlink_to(mine)
    os.mkfifo(folder / ".README.md.tmp")
    with within(60):
        model.save_pretrained(folder)
    assert mine.read_text() == "precious" and not (folder / CONFIG_FILE).is_symlink()
    assert read_config(folder).method == "FT-Last"
    assert not [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_to_try_whether_a_file_can_be_written_removes_none_and_follows_no_link(tmp_path):
    (tmp_path / ".x.json.tmp").write_text("mine")
    (tmp_path / ".y.json.tmp").symlink_to(tmp_path / "away")
    for name in ("x.json", "y.json", "z.json"):
        check_writable(tmp_path / name)
    assert (tmp_path / ".x.json.tmp").read_text() == "mine" and not (tmp_path / "away").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.json.tmp", ".y.json.tmp"]


def test_a_pipe_is_neither_replaced_nor_waited_for(model, tmp_path):
    model.save_pretrained(tmp_path / "adapter")
    pipe, table = tmp_path / "pipe.safetensors", tmp_path / "pipe.csv"
    os.mkfifo(pipe)
    os.mkfifo(table)
    (tmp_path / "adapter" / "README.md").unlink()
    os.mkfifo(tmp_path / "adapter" / "README.md")
    adapter = ("--adapter", tmp_path / "adapter")
    write_image(tmp_path / "a.png")
    for words, said in (
        (("merge", *adapter, "--output", pipe, "--overwrite"), f"output={pipe}: cannot be written ({NO_FILE})"),
        (("predict", *adapter, tmp_path / "a.png", "--csv", table), f"csv={table}: cannot be written ({NO_FILE})"),
        (("predict", *adapter, pipe), f"{pipe}: error: {NO_FILE}"),
        (("predict", *adapter, "/dev/zero"), f"/dev/zero: error: {NO_FILE}"),
    ):
        with within(60):
            done = run_cli(*words)
        assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    with within(60), pytest.raises(TinyTLError, match=r"README.md cannot be read \(it is no file.*move it away"):
        model.save_pretrained(tmp_path / "adapter")


def test_data_that_are_pipes_are_not_waited_for(images, tmp_path):
    os.mkfifo(images / "README.md")
    os.mkfifo(tmp_path / "pipe.csv")
    os.mkfifo(tmp_path / "pipe.png")
    with within(60):
        assert opened(images).found.images == {"train": 12}
        with pytest.raises(TinyTLError, match=r"pipe.csv: is no file, but a pipe"):
            opened(tmp_path / "pipe.csv")
        with pytest.raises(UnreadableImageError, match=NO_FILE):
            decode_pixels({"bytes": None, "path": str(tmp_path / "pipe.png")}, 32)


@pytest.mark.parametrize(
    "head", ["date: 2024-13-45", f"a: {'9' * 10_000}", f"a: {'[' * 50_000}", "a: !!python/name:os"]
)
def test_a_readme_whose_head_cannot_be_read_ends_no_training_and_no_saving(head, images):
    (images / "README.md").write_text(f"---\n{head}\n---\n")
    assert opened(images).found.images == {"train": 12}
    new = render_card(config(), {"accuracy": 0.5}, f"---\n{head}\n---\nMine.\n{BEGIN}\nformer\n{END}\n")
    assert "Mine." in new and "former" not in new and head in new and "| accuracy | 0.5000 |" in new


@pytest.mark.parametrize(
    "name",
    [
        *(
            "_flip" * 49 + "!",
            "_hflip" * 40 + "_!",
            "_flip_h" * 34 + "?",
            "_rotated90" * 24 + "!",
            "_1 deg" * 40 + "!",
        ),
        *("1" * 250, "_flip" * 400_000, "1" * 2_000_000),
    ],
)
def test_no_name_of_an_image_takes_for_ever(name):
    with within(5):
        assert original_name(f"x{name}.png") == f"x{name}"


def test_changes_behind_a_name_are_taken_off_from_the_first_that_is_set_apart():
    for name, original in (
        ("fish_flip", "fish"),  # no hflip behind fis
        ("cat_rot_90deg", "cat"),
        ("cat_crop_1_2_3deg", "cat"),
        ("cat_crop_1_2_3", "cat_crop_1_2_3"),
        ("catflip_crop", "catflip"),
        ("cat_flip_hflipcrop12", "cat"),
        ("cat_flipped_dog", "cat_flipped_dog"),
    ):
        assert original_name(f"a/{name}.png") == original


@pytest.mark.parametrize("text", ["1.2." * 40 + "xxx", "1. " * 62 + "x", "1..1.." * 31 + "x", "1.5.2 " * 20_000])
def test_no_text_of_a_table_takes_for_ever(text, tmp_path):
    table = pyarrow.table({"text": [text] * 4, "label": ["a", "b"] * 2})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with within(20), pytest.raises(TinyTLError, match="no column of text, label fits by its type; name one"):
        opened(tmp_path / "x.parquet")


def test_pixels_in_a_text_are_known_however_they_are_written():
    for separator in (" ", ", ", ";", "\n", " -"):
        for number in ("7", "70", "0.5", "1."):
            text = f"[{separator.join([number] * 64)}]"
            assert PIXELS.match(text) and not PIXELS.match(f"[{separator.join([number] * 63)}]")


def test_a_class_in_a_tar_is_read_no_further_than_a_number_can_be(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        held = tarfile.TarInfo("1.cls")
        held.size = 50_000_000
        tar.addfile(held, io.BytesIO(b"7" * held.size))
    with within(20), pytest.raises(TinyTLError, match=r"1.cls in .*: it holds '7{50}', and .cls files"):
        check_tars([str(tmp_path / "x.tar")])


def test_marks_that_turn_text_reach_no_terminal(tmp_path, make_model):
    model = make_model(
        "FT-Last", num_classes=None, label_names=["\u202egnp.exe", "a\u2066b", "\u05d0\u200d"], train_size=32
    )
    model.save_pretrained(tmp_path / "adapter")
    write_image(tmp_path / "a.png")
    done = run_cli("predict", "--adapter", tmp_path / "adapter", "--top_k", 3, tmp_path / "a.png")
    assert r"\u202egnp.exe" in done.stdout and r"a\u2066b" in done.stdout and "\u05d0\u200d" in done.stdout, (
        done.stderr
    )
    assert not {"\u202e", "\u2066"} & {*done.stdout} and one_line("a\u202eb\u05d0\u200d") == "a b\u05d0\u200d"
    done = run_cli("predict", "--adapter", tmp_path / "\u202egnp", tmp_path / "a.png")
    assert done.returncode == 1 and "\u202e" not in done.stderr


@pytest.mark.parametrize(("key", "value"), [("std", [1e-40] * 3), ("mean", [3e38] * 3)])
def test_what_is_no_number_is_no_probability(key, value, model, tmp_path):
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / CONFIG_FILE).read_text())
    record["preprocessing"][key] = value
    (tmp_path / CONFIG_FILE).write_text(json.dumps(record))
    write_image(tmp_path / "a.png", colour=(255, 0, 90))
    done = run_cli("predict", "--adapter", tmp_path, tmp_path / "a.png", "--json")
    (line,) = done.stdout.splitlines()
    assert done.returncode == 1 and "gives no finite numbers" in json.loads(line)["error"]


def test_a_text_that_is_no_name_is_no_class_and_many_classes_take_no_time(images, tmp_path):
    image = {"bytes": next(images.rglob("*.png")).read_bytes(), "path": None}
    table = pyarrow.table({"image": [image] * 8, "label": ["x" * 3_000_000, "b"] * 4})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with within(20), pytest.raises(TinyTLError, match="label: it holds a text of 3,000,000 characters, and the name"):
        opened(tmp_path / "x.parquet")
    names = ["x" * 2_000_000, f"{'x' * 2_000_000} (1)", "cat", "cat - Copy"]
    with within(10):
        assert [len(line) < 2_000 for line in about_names(names)] == [True, True]
    table = datasets.Dataset.from_dict({"label": [str(number) for number in range(200_000)]})
    with within(30):
        _, numbers, classes = label_values(table, "train", DataConfig(label_column="label"), "image")
    assert numbers.tolist() == list(range(200_000)) and classes[:3] == ["0", "1", "2"]


@pytest.mark.parametrize("key", ["name", "weights"])
def test_a_name_that_none_can_be_is_not_told_in_full(key, model, tmp_path):
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / CONFIG_FILE).read_text())
    record["backbone"][key] = "x" * 1_000_000
    (tmp_path / CONFIG_FILE).write_text(json.dumps(record))
    with pytest.raises(TinyTLError, match=rf"backbone.{key} has 1,000,000 characters") as refused:
        read_config(tmp_path)
    assert len(str(refused.value)) < 1_000


def test_what_an_adapter_says_of_its_weights_is_code_in_a_card():
    record = config()
    odd = "`<img src=x>`"
    for backbone in (
        replace(record.backbone, weights="w.pth", sha256=odd),
        replace(record.backbone, weights=f"hf-hub:a/b@{odd.replace(' ', '')}", sha256="0" * 64),
    ):
        card = render_card(replace(record, backbone=backbone))
        assert "`'<img" in card and "``<img" not in card
