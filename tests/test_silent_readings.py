"""Data that can be read in a way nobody meant: what is trained on, or named as, something else without a word."""

import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from shared import run_cli, write_image
from test_tables import opened, png

from tinytl_hf import TinyTLError
from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.copies import count_shared
from tinytl_hf.data.images import decode_pixels
from tinytl_hf.data.listing import list_folder
from tinytl_hf.data.sets import open_data, with_label_names
from tinytl_hf.data.tables import load

LABELS = ["cat", "dog"] * 4


def table(path, labels=LABELS, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [png(number) for number in range(len(labels))]
    pd.DataFrame({"image": images, "label": labels, **columns}).to_parquet(path)
    return path


@pytest.mark.parametrize("names", [("train-0.parquet", "test-0.parquet"), ("train/a.parquet", "test/a.parquet")])
def test_files_of_a_pattern_are_the_splits_that_their_names_say(names, tmp_path):
    for name in names:
        table(tmp_path / name)
    assert opened(tmp_path / "**" / "*.parquet").found.images == {"train": 8, "test": 8}
    table(tmp_path / "more.parquet")
    found = opened(tmp_path / "**" / "*.parquet").found
    assert found.images == {"train": 8, "test": 8} and found.left_out == {".parquet": 1}


def test_a_pattern_reads_a_file_once_where_links_lead_in_a_circle(tmp_path):
    table(tmp_path / "a" / "x.parquet")
    (tmp_path / "a" / "up").symlink_to("..")
    assert opened(tmp_path / "**" / "*.parquet").found.images == {"train": 8}
    write_image(tmp_path / "a" / "x.png")
    done = run_cli("predict", "--adapter", "none", str(tmp_path / "**" / "*.png"))
    assert done.returncode and "adapter" in done.stderr


@pytest.mark.parametrize(
    ("values", "images"),
    [
        (["train"] * 4 + ["test"] * 4, {"train": 4, "test": 4}),
        (["Train "] * 4 + ["val"] * 2 + ["test"] * 2, {"train": 4, "test": 2, "validation": 2}),
        (["train"] * 4 + ["test"] * 2 + ["unlabeled"] * 2, {"train": 4, "test": 2}),
        (["train"] * 4 + ["test"] * 2 + [None] * 2, {"train": 4, "test": 2}),
    ],
)
@pytest.mark.parametrize("column", ["split", "Split"])
def test_rows_are_of_the_split_that_their_column_says(values, images, column, tmp_path, caplog):
    found = opened(table(tmp_path / "x.parquet", **{column: values})).found
    assert found.images == images
    assert ("2 rows are of no split" in caplog.text) == (sum(images.values()) == 6)


def test_a_column_of_splits_that_does_not_say_all_is_refused_and_one_of_other_things_is_not(tmp_path):
    with pytest.raises(TinyTLError, match="calls some rows train and others extra, which is no split's name"):
        opened(table(tmp_path / "a.parquet", split=["train"] * 4 + ["extra"] * 4))
    with pytest.raises(TinyTLError, match="the data set has test, validation"):
        opened(table(tmp_path / "b.parquet", split=["val"] * 4 + ["test"] * 4))
    folds = table(tmp_path / "c.parquet", split=["fold1"] * 4 + ["fold2"] * 4)
    found = opened(folds, train_split="fold1", eval_split="fold2").found
    assert (found.train, found.evaluation) == (("fold1", 4), ("fold2", 4))
    assert opened(folds).found.images == {"train": 8}
    table(tmp_path / "d" / "train.parquet", split=["train"] * 4 + ["val"] * 4)
    table(tmp_path / "d" / "test.parquet")
    with pytest.raises(TinyTLError, match="column split calls rows of split train val"):
        opened(tmp_path / "d")


def test_a_table_that_was_replaced_is_read_again_whatever_its_time(tmp_path):
    for labels in (LABELS, ["emu", "fox"] * 4):
        path = table(tmp_path / "x.parquet", labels)
        os.utime(path, (1e9, 1e9))
        assert opened(path).train.label_names == sorted(set(labels))


def folders(root, tops=("part_1", "part_2")):
    for number in range(8):
        write_image(root / tops[number % 2] / f"{number}.png", size=(8, 8), seed=number)
    return [f"{tops[number % 2]}/{number}.png" for number in range(8)]


@pytest.mark.parametrize("name", ["labels.csv", "LABELS.CSV"])
def test_labels_of_a_table_beside_folders_that_are_no_classes_are_asked_for(name, tmp_path, caplog):
    paths = folders(tmp_path)
    file = tmp_path / name
    pd.DataFrame({"path": paths, "label": ["cat", "cat", "dog", "dog"] * 2}).to_csv(file, index=False)
    with pytest.raises(TinyTLError, match=f"part_1/0.png is part_1 by its folder, and cat by .* name {file}"):
        opened(tmp_path)
    assert opened(file, image_column="path").train.label_names == ["cat", "dog"]
    pd.DataFrame({"path": paths, "label": ["part_1", "part_2"] * 4}).to_csv(file, index=False)
    assert opened(tmp_path).train.label_names == ["part_1", "part_2"]
    pd.DataFrame({"path": paths, "kind": ["cat", "dog"] * 4}).to_csv(file, index=False)
    assert opened(tmp_path).train.label_names == ["part_1", "part_2"]
    assert f"{name} names 8 of these images and is not used: the folders are the classes" in caplog.text
    with pytest.raises(TinyTLError, match="by its folder, and cat by column kind"):
        opened(tmp_path, label_column="kind")


def test_pictures_beside_the_files_of_splits_are_asked_about(tmp_path):
    folders(tmp_path, ("assets", "docs"))
    for name in ("train", "test"):
        table(tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    with pytest.raises(TinyTLError, match=r"can be classes \(assets, docs\) and data/test-0.* '.*/data/\*.parquet'"):
        opened(tmp_path)
    assert opened(tmp_path / "data" / "*.parquet").found.images == {"train": 8, "test": 8}


def test_flat_images_name_all_the_tables_that_have_their_labels(tmp_path):
    for number in range(8):
        write_image(tmp_path / f"{number}.png", size=(8, 8), seed=number)
    for split, part in (("train", range(4)), ("test", range(4, 8))):
        rows = {"path": [f"{number}.png" for number in part], "label": ["cat", "dog"] * 2}
        pd.DataFrame(rows).to_csv(tmp_path / f"{split}.csv", index=False)
    with pytest.raises(TinyTLError, match=r"name these files, '.*/\*.csv'"):
        opened(tmp_path)
    assert opened(tmp_path / "*.csv").found.images == {"train": 4, "test": 4}


def test_a_comma_at_the_end_of_rows_shifts_no_column_and_values_too_many_are_refused(tmp_path):
    folders(tmp_path / "i", ("a", "a"))
    rows = [f"i/a/{number}.png,mask{number}.png,{LABELS[number]}" for number in range(8)]
    file = tmp_path / "x.csv"
    file.write_text("\n".join(["image,mask,label", *(f"{row}," for row in rows)]))
    train = opened(file, image_column="image").train
    assert train.label_names == ["cat", "dog"] and "/i/a/" in train.rows[0]["image"]["path"]
    file.write_text("\n".join(["image,mask,label", *(f"{row},more" for row in rows)]))
    with pytest.raises(TinyTLError, match=r"x.csv: has rows with more values than its first line has names"):
        opened(file, image_column="image")


def test_images_of_the_test_split_that_are_trained_on_under_another_name_are_counted(tmp_path, caplog):
    for split in ("train", "test"):
        for number in range(8):
            write_image(tmp_path / split / LABELS[number] / f"{split}{number}.png", size=(8, 8), seed=number)
    write_image(tmp_path / "test" / "cat" / "test0.png", size=(8, 8), seed=100)
    data = opened(tmp_path)
    assert "7 of the 8 images of test are trained on as well: the same files" in caplog.text
    assert count_shared(data.evaluation, data.train) == 7 and count_shared(data.train, data.train) == 8


def test_dark_images_of_16_bits_are_dark_in_every_format(tmp_path):
    values = np.full((32, 32), 200, dtype=">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5 32 32 65535\n" + values.tobytes())
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "a.png")
    Image.fromarray(np.full((32, 32), 30000, np.uint16)).save(tmp_path / "b.png", transparency=30000)
    pixels = [
        int(decode_pixels({"bytes": None, "path": str(tmp_path / name)}, 32).max()) for name in ("a.pgm", "a.png")
    ]
    assert pixels == [1, 1]
    assert int(decode_pixels({"bytes": None, "path": str(tmp_path / "b.png")}, 32).min()) == 255


@pytest.mark.parametrize(("kind", "white"), [(np.uint8, 255), (np.uint16, 65535), (np.float32, 1)])
def test_a_tiff_whose_white_is_zero_is_not_read_as_its_negative(kind, white, tmp_path):
    shown = np.arange(0, 256, 17).reshape(4, 4)
    values = (shown * (white / 255)).astype(kind) if kind == np.uint8 else (white - shown * (white / 255)).astype(kind)
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo={262: 0})  # Pillow turns 8 bits round itself
    pixels = decode_pixels({"bytes": None, "path": str(tmp_path / "a.tif")}, 32)
    assert (pixels == shown[..., None]).all()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat", ""] * 4, "row 1 of split train has no label"),
        (["cat", " "] * 4, "row 1 of split train has no label"),
        ([1.0, float("inf")] * 4, "it holds inf, and a class is a text"),
        ([1.0, 1e30] * 4, "it holds 1e.30, and a class is a text"),
        (pd.to_datetime(["2020-01-01", "2020-01-02"] * 4), r"it holds timestamp\[\w+\], and a class is a text"),
    ],
)
def test_what_is_no_class_is_none(labels, message, tmp_path):
    with pytest.raises(TinyTLError, match=message):
        opened(table(tmp_path / "x.parquet", labels))


def test_one_letter_in_two_spellings_is_one_class_in_saved_data_too(tmp_path):
    composed, apart = "caf\u00e9", "cafe\u0301"
    for split, name in (("train", apart), ("test", composed)):
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=[name, "tea"]))
        rows = {"image": [{"bytes": png(n), "path": None} for n in range(4)], "label": [0, 1] * 2}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / split)
    data = opened(tmp_path)
    assert data.train.label_names == data.evaluation.label_names == [composed, "tea"]
    assert with_label_names(data.train, [apart, "tea"]).labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("dataset", ["digits", "saved", "http://127.0.0.1:9/x.csv"])
def test_a_subset_of_what_has_none_is_refused(dataset, tmp_path):
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    datasets.Dataset.from_dict({"image": [], "label": []}, features=features).save_to_disk(tmp_path / "saved")
    name = str(tmp_path / "saved") if dataset == "saved" else dataset
    with pytest.raises(TinyTLError, match=r"data.subset=nosuch: .* no subsets"):
        load(DataConfig(dataset=name, subset="nosuch"))


def test_a_pipe_among_images_is_left_out(tmp_path):
    folders(tmp_path)
    os.mkfifo(tmp_path / "part_1" / "f.png")
    listing = list_folder(tmp_path)
    assert len(listing.images) == 8 and listing.left_out == {"that is no file": 1}


def test_images_of_a_table_are_partly_in_it_and_partly_beside_it(tmp_path):
    write_image(tmp_path / "t" / "b.png", size=(8, 8))
    images = [{"bytes": png(), "path": "a.png"}, {"bytes": None, "path": "b.png"}] * 4
    pd.DataFrame({"image": images, "label": LABELS}).to_parquet(tmp_path / "t" / "x.parquet")
    rows = open_data(DataConfig(dataset=str(tmp_path / "t" / "x.parquet"), eval_fraction=0.5)).train.rows
    assert {row["path"] for row in rows["image"] if row["bytes"] is None} == {str(tmp_path / "t" / "b.png")}


def test_addresses_of_files_on_this_disk_are_paths(tmp_path):
    paths = [f"file://{tmp_path}/{path}" for path in folders(tmp_path)]
    pd.DataFrame({"image": paths, "label": LABELS}).to_csv(tmp_path / "x.csv", index=False)
    assert opened(tmp_path / "x.csv").found.images == {"train": 8}


@pytest.mark.parametrize(("name", "values"), [("set", ["train", "test"]), ("Usage", ["Training", "validation"])])
def test_a_column_of_splits_may_have_another_name(name, values, tmp_path, caplog):
    caplog.set_level("INFO")
    folders(tmp_path / "i", ("a", "a"))
    rows = [f"i/a/{number}.png,{LABELS[number]},{values[number // 4]}" for number in range(8)]
    file = tmp_path / "x.csv"
    file.write_text("\n".join([f"image,label,{name}", *rows]))
    data = opened(file)
    assert len(data.train.labels) == len(data.evaluation.labels) == 4
    assert f"the column {name} says which rows are of which split" in caplog.text
    file.write_text("\n".join([f"image,label,{name}", *rows[:7], f"i/a/7.png,{LABELS[7]},other"]))
    assert list(opened(file).found.images) == ["train"]  # which is no column of splits


USAGE = ["Training"] * 4 + ["PublicTest"] * 2 + ["PrivateTest"] * 2


def test_splits_of_other_names_are_those_that_the_options_name_in_columns_as_in_folders(tmp_path, caplog):
    for number in range(8):
        write_image(tmp_path / "folders" / USAGE[number] / LABELS[number] / f"{number}.png", size=(8, 8), seed=number)
    usage, split = (table(tmp_path / f"{name}.parquet", **{name: USAGE}) for name in ("Usage", "split"))
    assert opened(usage).found.images == {"train": 8}
    assert "column Usage is not used (PrivateTest, PublicTest, Training): if it says" in caplog.text
    assert "name its values with --data.train_split and --data.eval_split, or write train" in caplog.text
    for place, told in (
        (
            split,
            "some rows train and others PrivateTest, PublicTest, which is no split's name; .* or --data.eval_split",
        ),
        (tmp_path / "folders", "if PrivateTest/ is a split as well, name it with --data.eval_split PrivateTest"),
    ):
        with pytest.raises(TinyTLError, match=told):
            opened(place)
    for place in (usage, split, tmp_path / "folders"):
        found = opened(place, eval_split="PublicTest").found
        assert (found.train, found.evaluation) == (("train", 4), ("PublicTest", 2)), place


def test_a_split_of_training_and_validation_is_one_where_it_is_named(tmp_path):
    values = ["trainval"] * 6 + ["test"] * 2
    with pytest.raises(TinyTLError, match="calls some rows test and others trainval, which is no split's name"):
        opened(table(tmp_path / "a.parquet", split=values))
    for name in ("split", "set"):
        found = opened(table(tmp_path / f"{name}.parquet", **{name: values}), train_split="trainval").found
        assert (found.train, found.evaluation) == (("trainval", 6), ("test", 2))


def test_a_column_split_of_other_values_is_said(tmp_path, caplog):
    folders(tmp_path / "i", ("a", "a"))
    rows = [f"i/a/{number}.png,{LABELS[number]},{number // 4}" for number in range(8)]
    (tmp_path / "x.csv").write_text("\n".join(["image,label,split", *rows]))
    assert list(opened(tmp_path / "x.csv").found.images) == ["train"]
    assert "column split is not used: it calls rows 0, 1, and splits are train, validation, test" in caplog.text


def test_tables_in_the_folders_of_splits_are_named_by_a_pattern(tmp_path):
    for split in ("train", "test"):
        for number in range(4):
            write_image(tmp_path / split / f"{number}.png", size=(8, 8), seed=number)
        rows = [f"{number}.png,{LABELS[number]}" for number in range(4)]
        (tmp_path / split / "labels.csv").write_text("\n".join(["image,label", *rows]))
    with pytest.raises(TinyTLError, match=rf"name these files, '{tmp_path}/\*/\*.csv'"):
        opened(tmp_path)
    assert opened(tmp_path / "*" / "*.csv").found.images == {"train": 4, "test": 4}


@pytest.mark.parametrize("kind", ["folder", "link", "table", "bytes"])
def test_a_file_that_is_in_two_classes_is_named(kind, tmp_path, caplog):
    folders(tmp_path / "i", ("cat", "dog"))
    images = sorted((tmp_path / "i").rglob("*.png"))
    rows = {"image": [str(path) for path in images], "label": [path.parent.name for path in images]}
    first, name = images[0], tmp_path / "i"
    if kind == "folder":
        shutil.copy(first, tmp_path / "i" / "dog" / "copy.png")
    elif kind == "link":
        os.link(first, tmp_path / "i" / "dog" / "copy.png")
    else:
        rows = {"image": [*rows["image"], str(first)], "label": [*rows["label"], "dog"]}
        if kind == "bytes":
            rows["image"] = [Path(path).read_bytes() for path in rows["image"]]
        name = tmp_path / "x.parquet"
        pd.DataFrame(rows).to_parquet(name)
    opened(name)
    other = {"table": first, "bytes": "row 8 of split train"}.get(kind, tmp_path / "i" / "dog" / "copy.png")
    first = "row 0 of split train" if kind == "bytes" else first
    pairs = {f"{first} (cat) and {other} (dog)", f"{other} (dog) and {first} (cat)"}
    assert any(f"1 file is in two classes, byte for byte: {pair}; one is wrong" in caplog.text for pair in pairs)


def test_a_file_that_is_twice_in_its_class_is_not_in_two(tmp_path, caplog):
    folders(tmp_path, ("cat", "dog"))
    shutil.copy(tmp_path / "dog" / "1.png", tmp_path / "dog" / "copy.png")
    opened(tmp_path)
    assert "in two classes" not in caplog.text


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["cat", "dog", "nan"], "'nan': taken as a class; leave such images out if it says that they have no label"),
        (["1", "N/A", "None"], "'N/A', 'None': taken as a class; leave such images out"),
        ([0, 1, -1], "'-1': taken as a class; leave such images out"),
        (["0.0", "1.0", "-1.0"], "'-1.0': taken as a class; leave such images out"),
        (["cat", "dog", "unlabeled"], "'unlabeled': taken as a class; leave such images out"),
        (["cat", "dog", "cat (1)"], "'cat', 'cat (1)': the name of the second is as that of a copy"),
        (["cat", "dog", "cat - Copy"], "'cat', 'cat - Copy': the name of the second is as that of a copy"),
        (["cat", "dog", "dog copy 2"], "'dog', 'dog copy 2': the name of the second is as that of a copy"),
        (["cat", "dog", "cat|dog"], "'cat|dog': taken as a class of its own, beside those that it names"),
        (["['cat']", "['dog']", "['cat', 'dog']"], "\"['cat', 'dog']\": taken as a class of its own"),
    ],
)
def test_a_class_that_says_no_label_or_several_is_named(labels, said, tmp_path, caplog):
    opened(table(tmp_path / "x.parquet", labels * 8), eval_fraction=0.2)
    assert said in caplog.text


@pytest.mark.parametrize(
    "labels", [[-1, 1], ["none", "some"], ["hot", "dog", "hot dog"], ["a, x", "b", "x"], ["T", "T 2"]]
)
def test_names_that_only_look_odd_are_not_spoken_of(labels, tmp_path, caplog):
    opened(table(tmp_path / "x.parquet", labels * 8), eval_fraction=0.2)
    assert "taken as a class" not in caplog.text


@pytest.mark.parametrize("name", ["dataset", "data set", "data_split", "train_test", "tvt"])
@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_column_of_nothing_but_splits_says_them_whatever_its_name(name, kind, tmp_path, caplog):
    caplog.set_level("INFO")
    paths = folders(tmp_path / "i", ("a", "a"))
    columns = {"image": [f"i/{path}" for path in paths], "label": LABELS, name: ["train"] * 4 + ["test", "val"] * 2}
    written = pd.DataFrame(columns)
    file = tmp_path / f"x.{kind}"
    if kind == "jsonl":
        written.to_json(file, orient="records", lines=True)
    else:
        getattr(written, f"to_{kind}")(file, **({"index": False} if kind == "csv" else {}))
    assert opened(file).found.images == {"train": 4, "validation": 2, "test": 2}
    assert f"the column {name} says which rows are of which split" in caplog.text


@pytest.mark.parametrize("values", [["train", "bus"], ["val", "test"], ["train", "train"], ["train", None]])
def test_a_column_of_other_names_that_says_not_all_is_none_of_splits(values, tmp_path):
    paths = folders(tmp_path / "i", ("a", "a"))
    columns = {"image": [f"i/{path}" for path in paths], "label": LABELS, "vehicle": values * 4}
    pd.DataFrame(columns).to_csv(tmp_path / "x.csv", index=False)
    assert opened(tmp_path / "x.csv").found.images == {"train": 8}
    columns = {"image": columns["image"], "label": ["train", "test"] * 4}
    pd.DataFrame(columns).to_csv(tmp_path / "y.csv", index=False)
    assert opened(tmp_path / "y.csv").found.classes == ["test", "train"]


@pytest.mark.parametrize("suffix", ["", ".png"])
def test_a_table_beside_folders_may_name_images_without_their_suffix_or_folder(suffix, tmp_path, caplog):
    for number in range(8):
        write_image(tmp_path / f"part_{number % 2}" / f"ISIC_{number}.png", size=(8, 8), seed=number)
    file, names = tmp_path / "about.csv", [f"ISIC_{number}{suffix}" for number in range(8)]
    pd.DataFrame({"id": names, "kind": ["cat", "cat", "dog", "dog"] * 2}).to_csv(file, index=False)
    assert opened(tmp_path).train.label_names == ["part_0", "part_1"]
    assert "about.csv names 8 of these images and is not used: the folders are the classes" in caplog.text
    pd.DataFrame({"id": names, "label": ["cat", "cat", "dog", "dog"] * 2}).to_csv(file, index=False)
    with pytest.raises(TinyTLError, match=f"part_0/ISIC_0.png is part_0 by its folder, and cat by .* name {file}"):
        opened(tmp_path)
    train = opened(file).train
    assert train.label_names == ["cat", "dog"] and train.rows[0]["image"]["path"].startswith(f"{tmp_path}/part_")
    pd.DataFrame({"id": [f"{number}" for number in range(8)], "label": [*"abcdefgh"]}).to_csv(file, index=False)
    assert opened(tmp_path).train.label_names == ["part_0", "part_1"]  # numbers of rows name no image


def test_a_name_of_an_image_that_is_gone_is_not_that_of_another_elsewhere(tmp_path):
    for name in ("a.png", "b.png", "old/c.png"):
        write_image(tmp_path / name, size=(8, 8), seed=ord(name[0]))
    file = tmp_path / "x.csv"
    pd.DataFrame({"image": ["a.png", "b.png", "c.png"], "label": [*"xyx"]}).to_csv(file, index=False)
    with pytest.raises(TinyTLError, match=r"column image names .*/c.png, and there is no such file"):
        opened(file)


def test_a_sample_of_what_to_hand_in_has_no_labels(tmp_path):
    for number in range(8):
        write_image(tmp_path / ("train" if number % 2 else "test") / f"{number}.png", size=(8, 8), seed=number)
    pd.DataFrame({"id": range(8), "label": ["cat"] * 8}).to_csv(tmp_path / "sampleSubmission.csv", index=False)
    with pytest.raises(TinyTLError, match=r"in no class folder \(test/0.png\); write a metadata.csv"):
        opened(tmp_path)
    pd.DataFrame({"id": [1, 3, 5, 7], "label": ["cat", "dog"] * 2}).to_csv(tmp_path / "trainLabels.csv", index=False)
    with pytest.raises(TinyTLError, match=r"if trainLabels.csv has their paths and labels, name .*/trainLabels.csv"):
        opened(tmp_path)
    assert opened(tmp_path / "trainLabels.csv").train.label_names == ["cat", "dog"]


def test_tables_that_are_not_used_are_named_in_one_line(tmp_path, caplog):
    paths = folders(tmp_path)
    for top in ("part_1", "part_2"):
        rows = {"name": [path.split("/")[1] for path in paths if path.startswith(top)], "size": [8] * 4}
        pd.DataFrame(rows).to_csv(tmp_path / top / "about.csv", index=False)
    opened(tmp_path)
    said = [line for line in caplog.messages if "not used" in line]
    assert len(said) == 1
    assert said[0].startswith("part_1/about.csv, part_2/about.csv name 8 of these images and are not used: ")


@pytest.mark.parametrize("kind", ["column", "files"])
@pytest.mark.parametrize("tops", [("cat", "dog"), ("train/cat", "train/dog", "test/cat", "test/dog")])
def test_splits_that_tables_beside_class_folders_say_are_named_where_the_folders_say_none(
    kind, tops, tmp_path, caplog
):
    paths = [f"{top}/{number}.png" for top in tops for number in range(4)]
    for number, path in enumerate(paths):
        write_image(tmp_path / path, size=(8, 8), seed=number)
    table = pd.DataFrame({"path": paths, "label": [path.split("/")[-2] for path in paths]})
    if kind == "column":
        table.assign(split=["train", "test"] * (len(paths) // 2)).to_csv(tmp_path / "all.csv", index=False)
        said, name = "all.csv: which images are for tests is not taken from there", tmp_path / "all.csv"
    else:
        table[::2].to_csv(tmp_path / "train.csv", index=False)
        table[1::2].to_csv(tmp_path / "test.csv", index=False)
        said, name = "test.csv, train.csv: which images are for tests is not taken", tmp_path / "*.csv"
    opened(tmp_path)
    assert (said in caplog.text) is (len(tops) == 2)
    assert opened(name).found.images == {"train": len(paths) // 2, "test": len(paths) // 2}


@pytest.mark.parametrize("lines", ["{}/0.png 0", "{}/0", "0.png,{}", "./{}/0.png"])
@pytest.mark.parametrize("names", [("train.txt", "test.txt"), ("meta/TrainImages.txt", "meta/TestImages.txt")])
def test_lists_of_splits_beside_class_folders_are_named(lines, names, tmp_path, caplog):
    for number, top in enumerate(("cat", "dog") * 2):
        write_image(tmp_path / top / f"{number // 2}.png", size=(8, 8), seed=number)
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{lines.format('cat')}\n{lines.format('dog')}\n")
    assert opened(tmp_path).train.label_names == ["cat", "dog"]
    said = f"{', '.join(sorted(names))}: which images are for tests is not taken from there"
    assert (said in caplog.text) is (not lines.startswith("0"))


@pytest.mark.parametrize("names", [("train.txt", "train_notes.txt"), ("cat/train.txt", "cat/test.txt")])
def test_texts_that_are_no_lists_of_splits_are_not_named(names, tmp_path, caplog):
    for number, top in enumerate(("cat", "dog") * 2):
        write_image(tmp_path / top / f"{number}.png", size=(8, 8), seed=number)
    for name in names:
        (tmp_path / name).write_text("cat/0.png" if names[0] == "train.txt" else "a picture of a train")
    opened(tmp_path)
    assert "is not taken from there" not in caplog.text
