"""Folders of images: which folders are classes, which are splits, what is left out, and what is said of it."""

import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from shared import run_cli, slow, small_run, write_image

from tinytl_hf import TinyTLError
from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.batches import read_images
from tinytl_hf.data.sets import open_data, open_eval_split


def make(root, files):
    """Small images, each of its own colour, by their paths."""
    for number, name in enumerate(files):
        write_image(root / name, size=(8, 8), colour=(number % 256, number // 256, 0))
    return root


def images_of(folder, count=4):
    return [f"{folder}/{i}.png" for i in range(count)]


def each(*folders, count=4):
    return [path for folder in folders for path in images_of(folder, count)]


def opened(root, **options):
    return open_data(DataConfig(dataset=str(root), **{"eval_fraction": 0.5, **options}))


def paths_by_class(root, *splits):
    """The images of splits, relative to the data set's folder, by class."""
    found = {}
    for split in splits:
        for image, label in zip(split.rows["image"], split.labels, strict=True):
            found.setdefault(split.label_names[label], set()).add(os.path.relpath(image["path"], root))
    return found


@pytest.mark.parametrize(
    "classes",
    [
        *(["valid", "invalid"], ["test", "control"], ["bus", "car", "train"], ["dev-board", "cable"]),
        *(["eval_a", "other"], ["train", "valid"], ["train", "test"], ["Validation", "x"]),
        *(["0", "1", "2", "10"], ["[x] cross", "a#b & c%20", "0 zero", "猫 ねこ"], ["data", "images"]),
    ],
)
def test_any_name_of_a_folder_can_be_a_class(classes, tmp_path):
    make(tmp_path, each(*classes))
    train, held_out, test, _, _, _ = opened(tmp_path)
    assert test is None and sorted(train.label_names) == sorted(classes)
    assert paths_by_class(tmp_path, train, held_out) == {name: set(images_of(name)) for name in classes}


def test_classes_that_are_numbers_are_in_the_order_of_numbers(tmp_path):
    make(tmp_path, each("10", "9", "-1"))
    assert opened(tmp_path).train.label_names == ["-1", "9", "10"]


def test_names_of_splits_that_are_classes_are_said(tmp_path, caplog):
    make(tmp_path, each("seg_train/a", "seg_train/b", "seg_test/c", "seg_test/d"))
    assert opened(tmp_path).train.label_names == ["seg_test", "seg_train"]
    assert "seg_test, seg_train: read as classes" in caplog.text


@pytest.mark.parametrize(
    "names", [("training_set", "test_set"), ("train2017", "val2017"), ("seg_train", "seg_test", "seg_pred")]
)
@pytest.mark.parametrize("nested", [False, True])
def test_folders_called_almost_as_splits_with_the_same_classes_are_refused(names, nested, tmp_path):
    outer = [f"{name}/{name}" if nested else name for name in names]
    make(tmp_path, [path for folder in outer[:2] for path in each(f"{folder}/cat", f"{folder}/dog")])
    make(tmp_path, [path for folder in outer[2:] for path in images_of(folder)])
    with pytest.raises(TinyTLError, match=r"called almost as splits are, and hold the same folders \(cat, dog\)"):
        opened(tmp_path)
    if not nested:
        data = opened(tmp_path, train_split=names[0], eval_split=names[1])
        assert data.train.label_names == ["cat", "dog"] and len(data.train.labels) == len(data.evaluation.labels) == 8


def test_file_names_decide_nothing(tmp_path):
    names = [f"{c}/{n}.png" for c in ("city", "nature") for n in ("train-station", "crash_test_1", "val", "x")]
    make(tmp_path, names)
    train, held_out = opened(tmp_path)[:2]
    assert train.name == "train" and len(train.labels) + len(held_out.labels) == 8


@pytest.mark.parametrize("name", ["photos [2024]", "a*b", "what?", "d{x}", "test", "train-1"])
def test_the_folder_may_have_any_name(name, tmp_path):
    root = make(tmp_path / name, each("cat", "dog"))
    assert len(opened(root).train.labels) == 4


def test_deeper_folders_belong_to_their_class(tmp_path, caplog):
    caplog.set_level("INFO")
    make(tmp_path, each("cat/batch0", "cat/batch1", "dog/batch0", "dog/batch1/more"))
    train, held_out = opened(tmp_path)[:2]
    assert {name: len(paths) for name, paths in paths_by_class(tmp_path, train, held_out).items()} == {
        "cat": 8,
        "dog": 8,
    }
    assert "different depths (cat/batch0/0.png, dog/batch1/more/0.png): the class is the first folder" in caplog.text


@pytest.mark.parametrize("validation", ["validation", "valid", "val", "dev", "Val"])
@pytest.mark.parametrize("outer", ["", "data/"])
def test_folders_called_so_are_splits_if_they_hold_classes(validation, outer, tmp_path):
    splits = {"train": 6, validation: 2, "test": 3}
    for split, count in splits.items():
        make(tmp_path, each(f"{outer}{split}/cat", f"{outer}{split}/dog", count=count))
    train, evaluation, test, found, _, _ = opened(tmp_path)
    assert [len(split.labels) for split in (train, evaluation, test)] == [12, 4, 6]
    assert (evaluation.name, test.name) == ("validation", "test")
    assert train.label_names == ["cat", "dog"] and found.images == {"train": 12, "validation": 4, "test": 6}


def test_splits_may_have_names_that_the_options_give(tmp_path):
    make(tmp_path, each("fold1/a", "fold1/b", "fold2/a", "fold2/b", "fold3/a"))
    train, evaluation = opened(tmp_path, train_split="fold1", eval_split="fold2")[:2]
    assert paths_by_class(tmp_path, train)["a"] == set(images_of("fold1/a"))
    assert paths_by_class(tmp_path, evaluation)["b"] == set(images_of("fold2/b"))


def test_what_lies_beside_splits_is_left_out_and_said(tmp_path, caplog):
    caplog.set_level("INFO")
    make(tmp_path, [*each("train/a", "train/b", "test/a", "pred"), "train/loose.png", "top.png"])
    train, test, _, found, _, _ = opened(tmp_path)
    assert len(train.labels) == 8 and len(test.labels) == 4
    assert found.left_out == {"in no class folder": 2, "beside the splits": 4}
    assert "left out: 2 in no class folder (top.png), 4 beside the splits (pred/0.png)" in caplog.text


def test_a_test_folder_without_classes_is_left_out_and_said(tmp_path, caplog):
    caplog.set_level("INFO")
    make(tmp_path, [*each("train/cat", "train/dog"), *images_of("test", 5)])
    train, held_out, test, found, _, _ = opened(tmp_path)
    assert held_out.held_out and test is None and len(train.labels) == 4
    assert "2 classes (cat, dog), 8 images in train; left out: 5 without labels" in caplog.text
    assert "(test/0.png)" in caplog.text and list(found.left_out.values()) == [5]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (each("train/steam", "train/diesel", "bus", "car"), r"train/ can be a split .*or a class beside bus"),
        (each("train", "test/a", "test/b"), r"test/ can be a split .*or a class beside train"),
        (each("val/a", "val/b", "dev/a", "train/a", "train/b"), r"are both the validation split"),
        (each("cat/batch0", "cat/batch1"), r"one class \(cat\).*if batch0, batch1 are the classes, name .*/cat"),
        (each("cat"), r"split train has one class \(cat\); use two or more"),
        (["a.png", "b.jpg"], r"its images lie in no class folder \(a.png\).*metadata.csv"),
    ],
)
def test_what_can_be_read_in_two_ways_or_none_is_refused_with_paths(files, message, tmp_path):
    make(tmp_path, files)
    with pytest.raises(TinyTLError, match=message):
        opened(tmp_path)


def test_files_beside_the_images_change_nothing(tmp_path):
    make(tmp_path, each("cat", "dog"))
    plain = opened(tmp_path)
    for path in sorted(tmp_path.rglob("*.png")):
        for suffix, text in ((".json", '{"a": 1}'), (".txt", "x"), (".xml", "<a/>"), (".csv", "a,b\n")):
            path.with_suffix(suffix).write_text(text)
    (tmp_path / "features.parquet").write_bytes(b"PAR1")
    (tmp_path / "images.zip").write_bytes(b"PK")
    beside = opened(tmp_path)
    assert beside.train.rows["image"] == plain.train.rows["image"]
    assert beside.found.left_out == {".parquet": 1, ".zip": 1}


def test_pictures_that_cannot_be_read_are_counted_by_kind(tmp_path, caplog):
    caplog.set_level("INFO")
    make(tmp_path, each("cat", "dog"))
    for name in ("cat/a.HEIC", "cat/b.heic", "dog/c.svg", "dog/d.cr2", "cat/._0.png", ".trash/x.png", "dog/nosuffix"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"?")
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = opened(tmp_path).found
    counts = {".heic": 2, ".svg": 1, ".cr2": 1, "hidden": 2, "broken link": 1, "without a suffix": 1}
    assert found.left_out == counts
    assert "2 .heic (cat/a.HEIC; pip install pillow-heif reads them), 1 broken link (cat/gone.png)" in caplog.text


def test_folders_without_an_image_are_named(tmp_path):
    make(tmp_path, each("cat", "dog"))
    for name in ("emu", "cat/deep", "dog/old/older", ".cache"):
        (tmp_path / name).mkdir(parents=True)
    assert opened(tmp_path).found.left_out == {"folder without images": 3}


def test_every_suffix_that_pillow_reads_is_read(tmp_path):
    names = ["a.avif", "b.MPO", "c.webp", "d.JPG", "e.tiff", "f.bmp", "g.gif", "h.jp2", "i.ppm", "j.tga"]
    names += ["k.pjpeg", "l.PJP"]
    for folder in ("cat", "dog"):
        for name in names:
            kind = "JPEG" if name.endswith(("MPO", "pjpeg", "PJP")) else None
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.new("RGB", (9, 9), (255, names.index(name), 0)).save(tmp_path / folder / name, kind)
    train, _ = open_data(DataConfig(dataset=str(tmp_path), eval_fraction=0.1))[:2]
    images = read_images(train, DataConfig(), 32)
    assert len(images) == 21 and min(image[0].float().mean() for image in images.images) > 200


@pytest.mark.parametrize(
    "folders", [["cat/train", "cat/test", "dog/train"], ["a/train/cat", "a/test/cat", "b/val/cat"]]
)
def test_splits_inside_the_classes_are_refused_with_both_readings(folders, tmp_path):
    make(tmp_path, each(*folders))
    with pytest.raises(TinyTLError, match=r"called as splits are: if (cat|a) is a class, .* is a data set"):
        opened(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="file names are bytes on POSIX systems only")
def test_a_name_that_is_no_text_is_left_out(tmp_path):
    make(tmp_path, each("cat", "dog"))
    shutil.copy(tmp_path / "cat" / "0.png", os.fsencode(tmp_path / "cat") + b"/caf\xe9.png")
    assert opened(tmp_path).found.left_out == {"with a name that is not UTF-8": 1}


def test_two_spellings_of_one_accent_are_one_class(tmp_path):
    make(tmp_path, each("train/caf\u00e9", "train/b", "test/cafe\u0301"))
    train, test = opened(tmp_path)[:2]
    assert train.label_names == ["b", "caf\u00e9"] and set(test.labels) == {1}


def test_a_class_of_one_image_is_trained_on_and_named(tmp_path, caplog):
    make(tmp_path, [*each("cat", "dog", count=10), "rare/0.png"])
    train, held_out = opened(tmp_path, eval_fraction=0.2)[:2]
    assert np.bincount(train.labels).tolist() == [8, 8, 1] and np.bincount(held_out.labels).tolist() == [2, 2]
    assert "rare has a single image, which is trained on and not evaluated" in caplog.text


@pytest.mark.parametrize("count", [2, 3, 9])
def test_of_a_few_images_for_each_class_one_is_held_out(count, tmp_path, caplog):
    make(tmp_path, [*each(*"abcdefgh", count=count), "rare/0.png"])
    data = opened(tmp_path, eval_fraction=0.1)
    assert np.bincount(data.train.labels).tolist() == [count - 1] * 8 + [1]
    assert np.bincount(data.evaluation.labels).tolist() == [1] * 8
    assert f"one of each is held out, 8 of {8 * count + 1} images" in caplog.text or count == 9
    again, other = (opened(tmp_path, eval_fraction=0.1, split_seed=seed).evaluation.numbers for seed in (0, 1))
    assert np.array_equal(again, data.evaluation.numbers) and not np.array_equal(other, again)


def test_a_share_that_leaves_too_few_to_train_on_is_named_with_one_that_does(tmp_path):
    make(tmp_path, each(*"abcdefgh", count=3))
    with pytest.raises(TinyTLError, match=r"data.eval_fraction=0.7: leaves fewer of 24 images .* use 0.666 or less"):
        opened(tmp_path, eval_fraction=0.7)
    assert np.bincount(opened(tmp_path, eval_fraction=0.666).train.labels).tolist() == [1] * 8


def test_a_class_that_only_the_test_images_have_is_named(tmp_path, caplog):
    make(tmp_path, each("train/cat", "train/dog", "test/cat", "test/emu"))
    train, _ = opened(tmp_path)[:2]
    assert train.label_names == ["cat", "dog", "emu"] and "emu has no training images" in caplog.text


@pytest.mark.parametrize(
    ("files", "options", "split"),
    [
        ([*each("cat", count=40), *each("emu", count=2)], {"eval_fraction": 0.1}, "holdout"),
        (each("train/cat", "train/dog", "train/emu", "test/cat", "test/dog"), {}, "test"),
        (each("train/emu", "train/cat", "val/cat", "val/emu", "test/cat", count=2), {}, "test"),
    ],
)
def test_a_class_that_is_trained_on_and_not_evaluated_is_named(files, options, split, tmp_path, caplog):
    make(tmp_path, files)
    opened(tmp_path, **options)
    assert f"emu has images to train on and none in {split}, which" in caplog.text


def test_a_subset_that_lacks_classes_names_them(tmp_path, caplog):
    make(tmp_path, each("train/cat", "train/dog", "test/cat", "test/dog", count=9))
    opened(tmp_path)
    assert "images to train on and none in" not in caplog.text
    opened(tmp_path, max_eval_samples=1)
    assert "images to train on and none in test, which" in caplog.text


def test_one_class_can_be_evaluated_on(tmp_path):
    make(tmp_path, each("cat/old", "cat/new"))
    split = open_eval_split(DataConfig(dataset=str(tmp_path)), whole=True)
    assert split.label_names == ["cat"] and len(split.labels) == 8


def test_a_corrupt_image_is_named_by_its_path(tmp_path):
    make(tmp_path, each("cat", "dog", count=6))
    (tmp_path / "dog" / "3.png").write_bytes((tmp_path / "dog" / "3.png").read_bytes()[:50])
    config = DataConfig(dataset=str(tmp_path), eval_fraction=0.2)
    with pytest.raises(TinyTLError, match=rf"image {tmp_path}/dog/3.png of split train cannot be read"):
        for split in open_data(config)[:2]:
            read_images(split, config, 32)


@pytest.mark.parametrize("spelling", [".", "./", "../data", "../data/", "~/data", "file://{}"])
def test_a_folder_is_found_however_it_is_spelled(spelling, tmp_path, monkeypatch):
    root = make(tmp_path / "data", each("cat", "dog"))
    monkeypatch.chdir(root)
    monkeypatch.setenv("HOME", str(tmp_path))
    there = open_data(DataConfig(dataset=spelling.format(root), eval_fraction=0.5))
    assert there.source.name == str(root) and len(there.train.labels) == 4


def test_a_folder_called_digits_is_meant_and_that_is_said(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    make(tmp_path / "digits", each("cat", "dog"))
    monkeypatch.chdir(tmp_path)
    assert opened("digits").train.label_names == ["cat", "dog"]
    assert "digits is the folder here, not scikit-learn's digits" in caplog.text


@pytest.mark.parametrize("place", ["data/runs/a", slow("data")])
def test_runs_inside_the_data_set_are_left_out(place, tmp_path):
    data, output = make(tmp_path / "data", each("cat", "dog", count=8)), tmp_path / place
    options = ["--method", "FT-Last", "--train.epochs", "1", "--overwrite", "true"]
    for _ in range(2):
        done = run_cli(*small_run(data, output, *options), pictures=True)
        assert done.returncode == 0 and "2 classes (cat, dog), 16 images in train" in done.stderr, done.stderr
    assert (output / "adapter" / "confusion_matrix.png").is_file() and re.search(
        "folders? written by tinytl-hf", done.stderr
    )
    done = run_cli("eval", "--adapter", output / "adapter")
    assert "evaluating on 2 images" in done.stderr and "trained on none of them" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("images.zip", b"PK", r"it holds no image, but images.zip; unpack it first"),
        ("notes.txt", b"x", r"it holds no image and no table"),
        ("cat/a.heic", b"x", r"no image and no table; left out: 1 .heic \(cat/a.heic; pip install pillow-heif"),
        ("bad.parquet", b"PAR1", r"cannot be loaded \(.*[Pp]arquet"),
    ],
)
def test_a_folder_without_images_says_what_it_has(name, content, message, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TinyTLError, match=message):
        opened(tmp_path)


def test_files_are_listed_and_not_read(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for number in range(500):
            (tmp_path / folder / f"{number}.jpg").touch()  # an empty file cannot be decoded
    train, held_out = opened(tmp_path)[:2]
    assert len(train.labels) + len(held_out.labels) == 1000


def test_a_comparison_inside_the_data_is_no_class_and_a_class_with_files_of_another_tool_is_one(tmp_path):
    root = make(tmp_path, each("cat", "dog", "runs/comparison"))
    for name in ("compare.csv", "compare.md"):
        (root / "runs" / "comparison" / name).write_text("method\n")
    (root / "runs" / "comparison" / "compare.json").write_text('{"rows": [{"method": "FT-Last"}]}')
    (root / "cat" / "config.yaml").write_text("camera: 3\n")
    (root / "cat" / "metrics.jsonl").write_text("{}\n")
    found = opened(root).found
    assert found.classes == ["cat", "dog"] and found.left_out == {"folder written by tinytl-hf": 1}


def test_a_split_that_has_none_of_the_trained_classes_is_refused(tmp_path):
    make(tmp_path, each("train/cat", "train/dog", "val/images", "test/images"))
    with pytest.raises(TinyTLError, match=r"split validation has the classes images alone, and split train none of"):
        opened(tmp_path)
    assert opened(tmp_path, eval_split="holdout").train.label_names == ["cat", "dog"]


def test_images_with_more_behind_their_suffix_are_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    make(tmp_path, each("cat", "dog"))
    for name in ("a.jpg?w=300", "b.jpg_large", "c.JPG.1", "d.jpg~", "e.jpg.txt", "f.dcm"):
        (tmp_path / "cat" / name).write_bytes(b"")
    assert opened(tmp_path).found.left_out == {"with more behind .jpg": 4, ".dcm": 1}


def test_images_that_are_not_here_yet_are_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    make(tmp_path, each("cat", "dog"))
    for name in ("a.jpg.part", "b.png.crdownload", "c.png.", ".d.jpg.icloud", ".e.plist"):
        (tmp_path / "cat" / name).write_bytes(b"")
    left_out = opened(tmp_path).found.left_out
    assert left_out == {"hidden": 1, "with more behind .jpg": 1, "with more behind .png": 2}
    assert left_out.examples["hidden"] == "cat/.d.jpg.icloud"


def test_what_was_deleted_is_no_class(tmp_path):
    make(tmp_path, each("cat", "dog", "$RECYCLE.BIN/S-1-5", "#recycle", "cat/#recycle"))
    data = opened(tmp_path)
    assert data.train.label_names == ["cat", "dog"] and data.found.images["train"] == 2 * 4


@pytest.mark.parametrize(
    ("folders", "hint"),
    [
        (("a/b/cat", "a/b/dog"), "if cat, dog are the classes, name {root}/a/b"),
        (("a/b/train/cat", "a/b/train/dog", "a/b/test/cat"), "if test, train are the splits, name {root}/a/b"),
    ],
)
def test_classes_and_splits_below_several_folders_are_pointed_at(folders, hint, tmp_path):
    make(tmp_path, each(*folders))
    with pytest.raises(TinyTLError, match=rf"has one class \(a\); use two or more; {hint.format(root=tmp_path)}"):
        opened(tmp_path)


def test_what_was_left_out_is_said_where_one_class_is_left(tmp_path):
    make(tmp_path, each("cat"))
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "1.jxl").write_bytes(b"")
    with pytest.raises(TinyTLError, match=r"has one class \(cat\); use two or more.*left out: 1 .jxl \(dog/1.jxl\)"):
        opened(tmp_path)


OF_SYSTEMS = [
    *(
        "lost+found",
        "__MACOSX",
        "$RECYCLE.BIN",
        "$Recycle.Bin",
        "System Volume Information",
        "__pycache__",
        "FOUND.000",
    ),
    *("@eaDir", "#recycle", "#snapshot", "@Recycle", ".ipynb_checkpoints", ".Trash-1000", ".thumbnails", ".git"),
]


@pytest.mark.parametrize("name", OF_SYSTEMS)
@pytest.mark.parametrize("splits", [("",), ("train/", "val/")])
def test_folders_that_systems_make_are_no_classes_and_are_named(name, splits, tmp_path, caplog):
    caplog.set_level("INFO")
    make(tmp_path, each(*(f"{split}{label}" for split in splits for label in ("cat", "dog"))))
    make(tmp_path, each(name, *(f"{split}{name}/deeper" for split in splits), f"{splits[0]}cat/{name}", count=1))
    data = opened(tmp_path)
    assert data.found.classes == ["cat", "dog"] and data.found.images["train"] == 8
    if name.startswith("."):
        assert name == ".git" or set(data.found.left_out) == {"hidden"}
    else:
        count = 2 + (len(splits) if splits[0] else 0)
        assert data.found.left_out == {f"folder {name} of a system or tool": count}
        assert f"left out: {count} folder{'s' * (count > 1)} {name} of a system or tool (" in caplog.text


def test_folders_of_systems_hide_no_tables_and_no_class_of_a_like_name(tmp_path):
    make(tmp_path, each("recycle", "recycled", "lost", "found", "snapshot", "System", "trash"))
    assert len(opened(tmp_path).found.classes) == 7
    root = make(tmp_path / "lost+found", each("cat", "dog"))  # which is named, so that it is meant
    assert opened(root).found.classes == ["cat", "dog"]
    (tmp_path / "empty" / "__MACOSX").mkdir(parents=True)
    with pytest.raises(TinyTLError, match="no image and no table; left out: 1 folder __MACOSX of a system or tool"):
        opened(tmp_path / "empty")
