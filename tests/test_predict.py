"""What ``predict`` takes for an image, what it prints and writes, and what does not end it."""

import csv
import io
import json
import os
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import torch
from PIL import Image
from shared import run_cli, write_image

from tinytl_hf import TinyTLModel, cli
from tinytl_hf.data import images
from tinytl_hf.deploy.adapter_classifier import AdapterClassifier
from tinytl_hf.deploy.sources import find_images

LABELS = ["\u732b", "\U0001f600 caf\u00e9", "\x1b[31mred", "two\nlines"]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="file names are text here")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict") / "run" / "adapter"
    model = TinyTLModel.from_backbone(
        "mobilenet_v2", method="FT-Last", label_names=LABELS, weights="none", train_size=32
    )
    model.save_pretrained(folder)
    return folder


def names(path):
    return [os.path.basename(source.name) for source in find_images(str(path))]


def main_into(stream, *arguments):
    """Run the command line with this standard output; its exit code and what went to standard error."""
    errors = io.StringIO()
    with redirect_stdout(stream), redirect_stderr(errors), pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
        sys.exit(0)
    return end.value.code or 0, errors.getvalue()


def test_a_folder_gives_its_images_and_says_what_it_left_out(adapter, tmp_path):
    for name in ("a.png", "b.JPG", "below/c.webp", "below/deeper/d.tif"):
        write_image(tmp_path / name)
    for name in ("._a.png", ".hidden/e.png", "doc.pdf", "clip.mpg", "x.h5", "y.eps", "notes", "below/list.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"%PDF-1.4")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    done = run_cli("predict", "--adapter", adapter, tmp_path)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 4, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "left out" in line]
    assert line.startswith(f"{tmp_path}: 4 images; left out: ")
    for part in (
        "1 hidden,",
        "1 hidden folder",
        "1 .pdf",
        "1 .mpg",
        "1 .h5",
        "1 .eps",
        "1 without a suffix",
        "1 .txt",
        "1 broken link",
    ):
        assert part in line
    named = run_cli("predict", "--adapter", adapter, tmp_path / "doc.pdf", tmp_path / "a.png")
    assert named.returncode == 1 and "doc.pdf: error: cannot identify" in named.stderr and "a.png: " in named.stdout
    (tmp_path / "empty").mkdir()
    none = run_cli("predict", "--adapter", adapter, tmp_path / "empty")
    assert none.returncode == 1 and "empty: error: no image in this folder" in none.stderr


def test_folders_of_systems_are_left_out_of_a_folder(tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("a.png", "cat/b.png", "cat/@eaDir/b.png", "__MACOSX/a.png", "$Recycle.Bin/c.png"):
        write_image(tmp_path / name, size=(8, 8))
    assert names(tmp_path) == ["a.png", "b.png"]
    for name in ("@eaDir", "__MACOSX", "$Recycle.Bin"):
        assert f"1 folder {name} of a system or tool" in caplog.text
    assert names(tmp_path / "__MACOSX") == ["a.png"]  # which is named, so that it is meant


def test_links_are_followed_and_a_circle_of_them_ends(tmp_path):
    write_image(tmp_path / "elsewhere" / "a.png")
    write_image(tmp_path / "photos" / "b.png")
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "again").symlink_to(tmp_path / "photos")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "c.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    assert sorted(names(tmp_path / "photos")) == ["a.png", "b.png", "c.png"]


def test_brackets_patterns_and_what_no_path_can_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "photos [2024]" / "a[1].png")
    write_image(tmp_path / "x1.png")
    assert names("photos [2024]") == names("photos [2024]/a[1].png") == ["a[1].png"]
    assert names("x?.png") == names("**/x*.png") == ["x1.png"]
    for name in ("a" * 5000, "a\0b", "~nobody-of-that-name/x.png", "missing.png"):
        (source,) = find_images(name)
        assert source.problem or not os.path.exists(source.name)


def test_the_plots_of_a_run_are_none_of_the_images_of_a_folder_around_it(tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("photos/a.png", "photos/runs/x/curves.png"):
        write_image(tmp_path / name, size=(8, 8))
    run = tmp_path / "photos" / "runs" / "x"
    (run / "metrics.jsonl").write_text("{}")
    (run / "config.yaml").write_text("method: FT-Last\nlite:\n")
    assert names(tmp_path / "photos") == ["a.png"]
    assert caplog.messages == [f"{tmp_path}/photos: 1 image; left out: 1 folder written by tinytl-hf"]
    assert names(run) == ["curves.png"]


def test_folders_that_a_pattern_matches_give_their_images_once(tmp_path):
    for name in ("a.png", "cat/b.png", "dog/below/c.png", "@eaDir/d.png"):
        write_image(tmp_path / name, size=(8, 8))
    assert names(tmp_path / "*") == names(tmp_path / "**") == ["a.png", "b.png", "c.png"]
    assert names(tmp_path / "[cd]*") == ["b.png", "c.png"]
    assert names(tmp_path / "**/below") == ["c.png"]


@LINUX
def test_a_name_that_is_not_utf8_ends_nothing(adapter, tmp_path):
    write_image(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    write_image(tmp_path / "z.png")
    (tmp_path / "\x1b[2Jclear.png").write_bytes(b"no image")
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    code, errors = main_into(out, "predict", "--adapter", adapter, "--csv", tmp_path / "out.csv", tmp_path)
    lines = out.buffer.getvalue().decode().splitlines()
    assert code == 1 and len(lines) == 2 and "/caf\\udce9.png: " in lines[0] and "/z.png: " in lines[1]
    assert "\\x1b[2Jclear.png: error: cannot identify" in errors and "\x1b" not in errors
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        assert [row["image"].rpartition("/")[2] for row in csv.DictReader(file)][1] == "caf\\udce9.png"


def test_a_terminal_that_cannot_show_a_label_gets_it_escaped(adapter, tmp_path):
    write_image(tmp_path / "a.png")
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    code, errors = main_into(out, "predict", "--adapter", adapter, "--top_k", "4", tmp_path / "a.png")
    text = out.buffer.getvalue().decode("ascii")
    assert code == 0 and errors == "" and text.count("\n") == 1
    for shown in ("\\u732b", "\\U0001f600 caf\\xe9", "\\x1b[31mred", "two\\nlines"):
        assert shown in text


@pytest.mark.parametrize("length", [3, 9000])  # the longer one is more than is kept back to be flushed
def test_a_reader_that_has_seen_enough_ends_it_silently(length, make_model, tmp_path):
    make_model("FT-Last", num_classes=None, label_names=["a" * length, "b"]).save_pretrained(tmp_path / "adapter")
    write_image(tmp_path / "a.png")
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as out:
        words = ["predict", "--adapter", tmp_path / "adapter", "--top_k", "2", tmp_path / "a.png"]
        assert main_into(out, *words) == (141, "")


def test_an_image_comes_from_standard_input(adapter, tmp_path, monkeypatch):
    write_image(tmp_path / "a.png")
    by_name = json.loads(run_cli("predict", "--adapter", adapter, "--json", tmp_path / "a.png").stdout)
    for content, code in (((tmp_path / "a.png").read_bytes(), 0), (b"", 1)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        done = run_cli("predict", "--adapter", adapter, "--json", "-")
        result = json.loads(done.stdout)
        assert done.returncode == code and result["image"] == "-"
        assert result.get("labels") == (None if code else by_name["labels"])


def test_a_url_is_shown_as_it_was_typed(adapter):
    done = run_cli("predict", "--adapter", adapter, "https://example.org/a//cat.jpg")
    assert done.returncode == 1 and "https://example.org/a//cat.jpg: error: it is a URL" in done.stderr


def test_a_csv_file_stays_where_the_adapter_is_not_found(adapter, tmp_path):
    file, image = tmp_path / "out.csv", write_image(tmp_path / "a.png")
    assert run_cli("predict", "--adapter", adapter, "--csv", file, image).returncode == 0
    before = file.read_text()
    assert run_cli("predict", "--adapter", tmp_path / "typo", "--csv", file, image).returncode == 1
    assert file.read_text() == before and before.count("a.png") == 1


@pytest.mark.parametrize("top_k", [1, 2, 9])
def test_the_columns_of_a_csv_file_are_those_that_its_help_tells(top_k, adapter, tmp_path):
    help_text = " ".join(run_cli("predict", "--help").stdout.split())
    assert (
        "image, label and probability of the likeliest, label_2 and probability_2 and so on up to top_k" in help_text
    )
    image, file = write_image(tmp_path / "a.png"), tmp_path / "out.csv"
    assert run_cli("predict", "--adapter", adapter, "--csv", file, "--top_k", str(top_k), image).returncode == 0
    with file.open(encoding="utf-8", newline="") as lines:
        (row,) = csv.DictReader(lines)
    further = [f"{name}_{number}" for number in range(2, top_k + 1) for name in ("label", "probability")]
    assert list(row) == ["image", "label", "probability", *further, "error"]
    labels = [value for name, value in row.items() if name.startswith("label")]
    known = min(top_k, len(LABELS))
    assert len(set(labels[:known]) & set(LABELS)) == known and set(labels[known:]) <= {""}


def test_a_csv_file_has_a_line_for_each_image_and_replaces_only_its_like(adapter, tmp_path):
    write_image(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    mine = tmp_path / "mine.csv"
    for head in ("image,truth\n", "image,label,probability,checked_by\n", "note\nimage,label,probability,error\n"):
        mine.write_text(head)
        refused = run_cli("predict", "--adapter", adapter, "--csv", mine, tmp_path)
        assert refused.returncode == 1 and "was not written by this command" in refused.stderr
        assert mine.read_text() == head
    for _ in range(2):  # the second time over the first
        done = run_cli(
            "predict", "--adapter", adapter, "--csv", tmp_path / "new" / "out.csv", "--top_k", "2", tmp_path
        )
        assert done.returncode == 1 and done.stdout.count("\n") == 1
    with (tmp_path / "new" / "out.csv").open(encoding="utf-8", newline="") as file:
        good, bad = csv.DictReader(file)
    assert list(good) == ["image", "label", "probability", "label_2", "probability_2", "error"]
    assert good["image"] == str(tmp_path / "a.png") and {good["label"], good["label_2"]} < set(LABELS)
    assert 1 > float(good["probability"]) >= float(good["probability_2"]) > 0 and good["error"] == ""
    assert bad["label"] == "" and "cannot identify" in bad["error"]
    assert "csv=x.txt: name a .csv file" in run_cli("predict", "--adapter", adapter, "--csv", "x.txt", tmp_path).stderr


def test_the_folder_of_a_run_stands_for_its_adapter(adapter, tmp_path):
    write_image(tmp_path / "a.png")
    done = run_cli("predict", "--adapter", adapter.parent, tmp_path / "a.png")
    assert done.returncode == 0 and f"{adapter.parent} is a run; its adapter is {adapter}\n" in done.stderr
    assert TinyTLModel.from_pretrained(adapter.parent).label_names == LABELS
    assert run_cli("merge", "--adapter", adapter.parent, "--output", tmp_path / "m.safetensors").returncode == 0


def test_an_image_beyond_pillows_limit_names_the_option_that_allows_it(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    Image.new("L", (2000, 1001)).save(tmp_path / "large.png")
    done = run_cli("predict", "--adapter", adapter, tmp_path / "large.png")
    assert done.returncode == 1 and "it has 2 megapixels; if you trust the file" in done.stderr
    assert "--max_megapixels" in done.stderr
    done = run_cli("predict", "--adapter", adapter, "--max_megapixels", "3", tmp_path / "large.png")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "suffix", [".avif", ".mpo", ".png", ".jp2", ".bmp", ".tiff", ".gif", ".webp", ".tga", ".fits"]
)
def test_what_pillow_reads_is_an_image(suffix):
    assert suffix in images.IMAGE_SUFFIXES


def test_predict_and_preprocess_see_the_same_pixels(adapter, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 210, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    model = TinyTLModel.from_pretrained(adapter).eval()
    expected = model(model.preprocess(pixels)).softmax(1)[0]
    done = run_cli("predict", "--adapter", adapter, "--json", "--top_k", "4", tmp_path / "a.png")
    for label in json.loads(done.stdout)["labels"]:
        assert label["probability"] == pytest.approx(expected[LABELS.index(label["label"])].item(), rel=1e-6)


def test_a_cpu_that_accelerate_is_told_to_use_predicts_beside_a_gpu(adapter, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    photo = np.full((40, 30, 3), 128, dtype=np.uint8)
    assert AdapterClassifier(str(adapter), None, None).probabilities([photo]).sum() == pytest.approx(1)


def test_an_adapter_whose_folder_is_called_as_an_exported_file_is_one(adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "model.onnx")
    done = run_cli("predict", "--adapter", folder, write_image(tmp_path / "a.png"))
    assert done.returncode == 0 and "a.png: " in done.stdout, done.stderr
