"""``metadata.csv`` and the like: which images they label, in which splits, and what is said of them."""

import json
import unicodedata

import pandas as pd
import pytest
from shared import write_image

from tinytl_hf import TinyTLError
from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.sets import open_data


def opened(dataset, **options):
    return open_data(DataConfig(dataset=str(dataset), **{"eval_fraction": 0.5, **options}))


def names_of(split, root):
    return {image["path"].removeprefix(f"{root}/") for image in split.rows["image"]}


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_metadata_labels_images_where_it_has_a_column_for_that(suffix, tmp_path, caplog):
    caplog.set_level("INFO")
    names = [f"{folder}/{i}.png" for folder in ("cat", "dog") for i in range(6)]
    for number, name in enumerate(names):
        write_image(tmp_path / name, seed=number)
    table = pd.DataFrame({"file_name": names, "photographer": [f"p{i % 3}" for i in range(12)]})
    file = tmp_path / f"metadata.{suffix}"
    write = {"csv": table.to_csv, "parquet": table.to_parquet}
    kinds = {"csv": {"index": False}, "parquet": {}}
    if suffix == "jsonl":
        table.to_json(file, orient="records", lines=True)
    else:
        write[suffix](file, **kinds[suffix])
    assert opened(tmp_path).train.label_names == ["cat", "dog"]
    assert f"metadata.{suffix} has no column label: the class folders are the labels" in caplog.text
    assert opened(tmp_path, label_column="photographer").train.label_names == ["p0", "p1", "p2"]
    with pytest.raises(TinyTLError, match=r"data.label_column=nope: no such column; metadata.* has photographer"):
        opened(tmp_path, label_column="nope")


def write_metadata(root, names, labels, there):
    for number, name in enumerate(there):
        write_image(root / name, seed=number)
    pd.DataFrame({"file_name": names, "label": labels}).to_csv(root / "metadata.csv", index=False)
    return root


def test_images_that_metadata_does_not_name_are_counted(tmp_path):
    names = [f"{i}.png" for i in range(20)]
    root = write_metadata(tmp_path, names[:16], ["a", "b"] * 8, names)
    found = opened(root).found
    assert "labels are from column label of metadata.csv" in str(found)
    assert found.images == {"train": 16} and found.left_out == {"not named by metadata.csv": 4}


def test_an_address_in_metadata_is_shown_as_it_stands_there(tmp_path):
    root = write_metadata(tmp_path, ["https://x.org/0.png", "1.png"], ["a", "b"], ["1.png"])
    with pytest.raises(TinyTLError, match=r"metadata.csv: names https://x.org/0.png, and there is no such image"):
        opened(root)


def test_files_that_metadata_names_must_be_there_and_once(tmp_path):
    names = [f"{i}.png" for i in range(10)]
    root = write_metadata(tmp_path, names, ["a", "b"] * 5, names[:8])
    with pytest.raises(TinyTLError, match=r"metadata.csv: names 8.png and 1 more, and there is no such image"):
        opened(root)
    found = opened(root, skip_corrupt=True).found
    assert found.images == {"train": 8} and found.left_out == {"named by metadata, but not there": 2}
    write_metadata(tmp_path, [*names, "0.png"], ["a", "b"] * 5 + ["a"], names)
    with pytest.raises(TinyTLError, match=r"names 0.png twice"):
        opened(root)


def test_each_split_may_have_its_own_metadata(tmp_path):
    for split, count in (("train", 8), ("test", 4)):
        names = [f"{i}.png" for i in range(count)]
        write_metadata(tmp_path / split, names, ["a", "b"] * (count // 2), names)
    train, test = opened(tmp_path)[:2]
    assert (len(train.labels), len(test.labels), test.name) == (8, 4, "test")


def test_images_whose_own_metadata_has_no_column_of_labels_are_said_to_be_left_out_for_that(tmp_path):
    of_each_split(tmp_path)
    labels = tmp_path / "test/metadata.csv"
    labels.write_text(labels.read_text().replace("label", "species"))
    found = opened(tmp_path).found
    assert found.images == {"train": 8}
    assert found.left_out == {"named by test/metadata.csv, which has no column label": 4}


def test_a_table_of_pandas_may_have_the_files_as_its_index(tmp_path):
    names = [f"{i}.png" for i in range(8)]
    for number, name in enumerate(names):
        write_image(tmp_path / name, seed=number)
    table = pd.DataFrame({"file_name": names, "label": ["a", "b"] * 4})
    table.set_index("file_name").to_parquet(tmp_path / "metadata.parquet")
    data = opened(tmp_path)
    assert data.train.label_names == ["a", "b"] and data.found.images == {"train": 8}


def write_splits(root, folder="", column="label", image_prefix=""):
    """Eight images to train on and four to test on, of cats and dogs, by a metadata file in ``folder``."""
    names = [f"{split}/{i}.png" for split, count in (("train", 8), ("test", 4)) for i in range(count)]
    for number, name in enumerate(names):
        write_image(root / folder / image_prefix / name, seed=number)
    table = pd.DataFrame({"file_name": [f"{image_prefix}{name}" for name in names], column: ["cat", "dog"] * 6})
    table.to_csv(root / folder / "metadata.csv", index=False)
    return root


def of_each_split(root, column="label"):
    for split, count in (("train", 8), ("test", 4)):
        names = [f"{i}.png" for i in range(count)]
        write_metadata(root / split, names, ["cat", "dog"] * (count // 2), names)
        (root / split / "metadata.csv").write_text(
            (root / split / "metadata.csv").read_text().replace("file_name,label", f"file_name,{column}")
        )
    return root


LAYOUTS = {
    "splits below one folder": lambda root: of_each_split(root / "data").parent,
    "a file in that folder": lambda root: write_splits(root, folder="ds"),
    "a file beside that folder": lambda root: write_splits(root, image_prefix="images/"),
    "a label of another name": lambda root: write_splits(root, column="category"),
    "and a file for each split": lambda root: of_each_split(root, "category"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_test_images_are_not_trained_on_however_deep_the_splits_lie(layout, tmp_path):
    train, test = opened(LAYOUTS[layout](tmp_path))[:2]
    assert train.label_names == ["cat", "dog"] and test.name == "test"
    assert len(train.labels) == 8 and all("train/" in name for name in names_of(train, tmp_path))
    assert len(test.labels) == 4 and all("test/" in name for name in names_of(test, tmp_path))


def test_an_image_beside_the_splits_is_left_out_and_they_stay_splits(tmp_path):
    root = write_splits(tmp_path)
    write_image(root / "extra.png")
    (root / "metadata.csv").write_text((root / "metadata.csv").read_text() + "extra.png,cat\n")
    train, test, _, found = opened(root)[:4]
    assert (len(train.labels), len(test.labels)) == (8, 4) and found.left_out == {"beside the splits": 1}


def test_a_table_beside_folders_that_are_splits_and_hold_no_classes_is_to_be_named(tmp_path):
    for name in [*(f"train/{i}.png" for i in range(4)), "test/a.png", "test/b.png"]:
        write_image(tmp_path / name)
    (tmp_path / "train.csv").write_text("id,label\n0.png,a\n")
    with pytest.raises(TinyTLError, match=r"lie in no class folder .*; if train.csv has their paths and labels, name"):
        opened(tmp_path)


def test_a_column_called_split_says_the_split(tmp_path, caplog):
    caplog.set_level("INFO")
    names = [f"{i}.png" for i in range(12)]
    root = write_metadata(tmp_path, names, ["a", "b"] * 6, names)
    table = pd.read_csv(root / "metadata.csv")
    table["split"] = ["Train"] * 8 + ["test"] * 4
    table.to_csv(root / "metadata.csv", index=False)
    train, test = opened(root)[:2]
    assert names_of(train, root) == set(names[:8]) and names_of(test, root) == set(names[8:])
    assert "the column split says which rows are of which split" in caplog.text
    table.loc[8:, "label"] = None
    table.to_csv(root / "metadata.csv", index=False)
    assert opened(root).found.not_used == ["test"] and "split test is not used: no row" in caplog.text
    table["split"], table["label"] = ["train", "left"] * 6, ["a", "b"] * 6
    table.to_csv(root / "metadata.csv", index=False)
    with pytest.raises(TinyTLError, match="column split calls some rows train and others left, which is no split"):
        opened(root)


def test_accents_in_two_spellings_are_one_class_and_one_file(tmp_path):
    composed, apart = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    names = [f"{apart}{i}.png" for i in range(8)]
    asked = [name.replace(apart, composed) for name in names]
    root = write_metadata(tmp_path, asked, [composed, apart, "tea", "tea"] * 2, names)
    train, held_out = opened(root)[:2]
    assert train.label_names == [composed, "tea"]
    assert names_of(train, root) | names_of(held_out, root) == set(names)


@pytest.mark.parametrize("name", ["Metadata.csv", "METADATA.CSV", "metadata.jsonl"])
def test_spaces_marks_and_capitals_of_a_file_change_nothing(name, tmp_path):
    for i in range(8):
        write_image(tmp_path / f"{i}.png", seed=i)
    if name.endswith("jsonl"):
        lines = [{"file_name": f"{i}.png", "label": ["a", "b"][i % 2], "width": [640, "640"][i % 2]} for i in range(8)]
        text = "\ufeff" + "\n\n".join(json.dumps(line) for line in lines)
    else:
        lines = [f"{i}.png, {'ab'[i % 2]},\r\n" for i in range(8)]
        text = "".join(["\ufefffile_name, label, note\r\n", *lines])
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    train = opened(tmp_path).train
    assert train.label_names == ["a", "b"] and len(train.labels) == 4


def test_a_label_that_is_missing_is_named_by_its_image(tmp_path):
    names = [f"{i}.png" for i in range(8)]
    root = write_metadata(tmp_path, names, ["a", "b", "a", None, "b", "a", "b", "a"], names)
    with pytest.raises(TinyTLError, match=r"metadata.csv: 3.png has no label; fill it in"):
        opened(root)


def test_the_file_that_has_the_labels_is_named(tmp_path):
    for split, column in (("train", "label"), ("test", "photographer")):
        names = [f"{i}.png" for i in range(8)]
        write_metadata(tmp_path / split, names, ["a", "b"] * 4, names)
        file = tmp_path / split / "metadata.csv"
        file.write_text(file.read_text().replace("label", column))
    assert "labels are from column label of train/metadata.csv" in str(opened(tmp_path).found)


NEAR = ["filename", "file", "path", "image", "File_Name", "img_path"]


def write_near(root, name, column, labels=("cat", "dog"), folders=("",)):
    """Metadata whose column of names is not called file_name, for eight images."""
    names = [f"{folders[number % len(folders)]}{number}.png" for number in range(8)]
    for number, path in enumerate(names):
        write_image(root / path, size=(8, 8), seed=number)
    table = pd.DataFrame({"id": range(8), column: names, "label": list(labels) * 4})
    if name.endswith("csv"):
        table.to_csv(root / name, index=False)
    elif name.endswith("jsonl"):
        table.to_json(root / name, orient="records", lines=True)
    else:
        table.to_parquet(root / name)
    return root


@pytest.mark.parametrize("column", NEAR)
@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
@pytest.mark.parametrize("folder", ["", "images/"])
def test_a_column_that_was_meant_to_be_file_name_is_named(folder, name, column, tmp_path, caplog):
    root = write_near(tmp_path, name, column, folders=(folder,))
    where = r"has one class \(images\); use two or more" if folder else r"its images lie in no class folder \(0.png\)"
    said = f"{where}; {name} has no column file_name: if its column {column} names the images, call that file_name"
    with pytest.raises(TinyTLError, match=said):
        opened(root)
    assert f"(but id, {column}, label); if {column} names the images, call it file_name" in caplog.text


def test_names_without_a_suffix_are_known_by_the_name_of_their_column(tmp_path):
    root = write_near(tmp_path, "metadata.csv", "image_id")
    table = pd.read_csv(root / "metadata.csv").drop(columns="id")
    table["image_id"] = [name.removesuffix(".png") for name in table["image_id"]]
    table.to_csv(root / "metadata.csv", index=False)
    with pytest.raises(TinyTLError, match="if its column image_id names the images, call that file_name"):
        opened(root)


def test_class_folders_and_almost_metadata_must_agree(tmp_path, caplog):
    root = write_near(tmp_path, "metadata.csv", "filename", folders=("cat/", "dog/"))
    assert opened(root).found.classes == ["cat", "dog"]
    assert "if filename names the images, call it file_name" in caplog.text
    write_near(tmp_path, "metadata.csv", "filename", labels=("dog", "cat"), folders=("cat/", "dog/"))
    with pytest.raises(TinyTLError, match=r"cat/0.png is cat by its folder, and dog by column label of metadata.csv"):
        opened(root)


def test_metadata_of_other_things_is_called_no_near_miss(tmp_path, caplog):
    for number in range(8):
        write_image(tmp_path / ["cat", "dog"][number % 2] / f"{number}.png", size=(8, 8), seed=number)
    pd.DataFrame({"camera": ["a", "b"], "iso": [100, 200]}).to_csv(tmp_path / "metadata.csv", index=False)
    assert opened(tmp_path).found.classes == ["cat", "dog"]
    assert "not used, as it has no column file_name (but camera, iso)" in caplog.text and "call it" not in caplog.text
