"""Files that hold tables: the images that they name, splits of which one lacks columns, and saved data sets."""

import shutil

import datasets
import pandas as pd
import pytest
from shared import write_image
from test_tables import opened, png

from tinytl_hf import TinyTLError
from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.sets import open_eval_split

AB = ["a", "b"]


def classes_of_folders(*splits):
    """Which classes have the images of each folder that holds an ``img``."""
    return {
        (image["path"].split("/img/")[0].split("/")[-1], split.label_names[label])
        for split in splits
        for image, label in zip(split.rows["image"], split.labels, strict=True)
    }


def write_table(file, kind, columns):
    table = pd.DataFrame(columns)
    if kind == "csv":
        table.to_csv(file, index=False)
    elif kind == "jsonl":
        table.to_json(file, orient="records", lines=True)
    else:
        table.to_parquet(file)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_path_is_that_of_an_image_beside_its_own_table(kind, tmp_path):
    for number, (folder, label) in enumerate((("one", "cat"), ("two", "dog"))):
        for i in range(6):
            write_image(tmp_path / folder / "img" / f"{i}.png", seed=10 * number + i)
        paths = [f"img/{i}.png" for i in range(6)]
        write_table(tmp_path / folder / f"labels.{kind}", kind, {"path": paths, "label": [label] * 6})
    train, held_out = opened(tmp_path / "*" / f"labels.{kind}")[:2]
    assert classes_of_folders(train, held_out) == {("one", "cat"), ("two", "dog")}


def test_a_table_in_a_folder_names_images_there_which_are_not_left_out(tmp_path):
    for i in range(8):
        write_image(tmp_path / "train" / "img" / f"{i}.png", seed=i)
    columns = {"path": [f"img/{i}.png" for i in range(8)], "label": AB * 4}
    write_table(tmp_path / "train" / "x.parquet", "parquet", columns)
    write_image(tmp_path / "train" / "img" / "unused.png")
    train, held_out, _, found = opened(tmp_path)[:4]
    assert (len(train.labels), len(held_out.labels), found.left_out) == (4, 4, {".png": 1})


def test_paths_where_bytes_could_be_are_those_of_files_beside_the_table(tmp_path, monkeypatch):
    for i in range(8):
        write_image(tmp_path / "img" / f"{i}.png", seed=i)
    images = [{"bytes": None, "path": f"img/{i}.png"} for i in range(8)]
    pd.DataFrame({"image": images, "label": AB * 4}).to_parquet(tmp_path / "x.parquet")
    train = opened(tmp_path / "x.parquet").train
    assert {image["path"] for image in train.rows["image"]} < {str(tmp_path / "img" / f"{i}.png") for i in range(8)}


def table_of(count, *, label=True):
    return {"image": [png(i) for i in range(count)], **({"label": AB * (count // 2)} if label else {})}


def test_a_test_table_without_a_column_of_labels_is_left_out(tmp_path, caplog):
    write_table(tmp_path / "train.parquet", "parquet", table_of(8))
    write_table(tmp_path / "test.parquet", "parquet", table_of(4, label=False))
    assert opened(tmp_path).found.not_used == ["test"]
    assert "split test is not used: it has no column label" in caplog.text
    held_out = open_eval_split(DataConfig(dataset=str(tmp_path), eval_fraction=0.5), whole=False)
    assert held_out.title == "holdout" and len(held_out.labels) == 4


def test_eval_takes_the_split_and_the_columns_that_a_training_takes(tmp_path):
    captions = {"caption": [f"photo {i}" for i in range(40)], "species": ["cat", "dog"] * 20}
    splits = {"train": 40, "validation": 10, "test": 8}
    saved = datasets.DatasetDict()
    for name, count in splits.items():
        values = {key: texts[:count] for key, texts in captions.items()}
        values["species"] = [None] * count if name == "test" else values["species"]
        saved[name] = datasets.Dataset.from_dict({"image": [png(i) for i in range(count)], **values})
    saved.save_to_disk(tmp_path / "saved")
    assert opened(tmp_path / "saved").evaluation.name == "validation"
    evaluated = open_eval_split(DataConfig(dataset=str(tmp_path / "saved")), whole=True)
    assert (evaluated.name, len(evaluated.labels), evaluated.label_names) == ("validation", 10, ["cat", "dog"])


def test_a_set_that_is_evaluated_whole_is_its_training_split_whatever_comes_first(tmp_path):
    parts = {name: datasets.Dataset.from_dict(table_of(count)) for name, count in (("extra", 4), ("train", 8))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path)
    assert open_eval_split(DataConfig(dataset=str(tmp_path)), whole=True).name == "train"


def test_saved_sets_in_folders_are_read_without_the_files_of_their_cache(tmp_path):
    for name, count in (("train", 8), ("test", 4)):
        datasets.Dataset.from_dict(table_of(count)).save_to_disk(tmp_path / name)
    cached = datasets.load_from_disk(tmp_path / "train")
    cached.map(lambda row: {"label": row["label"].upper()}, cache_file_name=str(tmp_path / "train" / "cache-1.arrow"))
    train, test = opened(tmp_path)[:2]
    assert (len(train.labels), train.label_names, len(test.labels)) == (8, AB, 4)


def test_saved_sets_in_folders_may_have_the_places_of_images_alone(tmp_path):
    paths = [str(write_image(tmp_path / "images" / f"{number}.png", seed=number)) for number in range(8)]
    for name in ("train", "test"):
        images = [{"bytes": None, "path": path} for path in paths]
        datasets.Dataset.from_dict({"image": images, "label": AB * 4}).save_to_disk(tmp_path / "sets" / name)
    train, test = opened(tmp_path / "sets")[:2]
    assert [image["path"] for image in train.rows["image"]] == [image["path"] for image in test.rows["image"]] == paths


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
def test_a_file_of_another_tool_makes_no_saved_set(name, tmp_path):
    for folder in ("cat", "dog"):
        for i in range(4):
            write_image(tmp_path / folder / f"{i}.png")
    (tmp_path / name).write_text('{"epoch": 3}')
    assert opened(tmp_path).train.label_names == ["cat", "dog"]


@pytest.mark.parametrize(
    ("train", "test", "names"),
    [
        (["0", "1"], ["0.0", "1.0"], ["0", "1"]),
        (["0.0", "10.0"], ["10", "0"], ["0", "10"]),
        (["v1.0", "v2.0"], ["v1.0", "v2.0"], ["v1.0", "v2.0"]),
    ],
)
def test_whole_numbers_that_one_of_two_csv_files_has_with_a_zero_are_one_class(train, test, names, tmp_path):
    root = tmp_path / "tables"
    root.mkdir()
    for split, labels in (("train", train), ("test", test)):
        paths = [write_image(tmp_path / f"{split}{i}.png", seed=i) for i in range(8)]
        write_table(root / f"{split}.csv", "csv", {"path": [str(path) for path in paths], "label": labels * 4})
    assert opened(root).train.label_names == names


def test_a_link_to_a_file_has_its_own_name_and_folder(tmp_path):
    for number in range(8):
        write_image(tmp_path / "data" / f"{number}.png", seed=number)
    (tmp_path / "cache").mkdir()
    write_table(tmp_path / "cache" / "1f8a", "csv", {"path": [f"{i}.png" for i in range(8)], "label": AB * 4})
    link = tmp_path / "data" / "labels.csv"
    link.symlink_to(tmp_path / "cache" / "1f8a")
    train = opened(link).train
    assert train.label_names == AB and train.rows[0]["image"]["path"].startswith(f"{tmp_path}/data/")


def test_files_without_rows_are_no_images_and_end_nothing(tmp_path, caplog):
    table = pd.DataFrame({"image": [png(number) for number in range(8)], "label": AB * 4})
    for name, rows in {"train-0": table, "train-1": table[:0], "test-0": table[:0]}.items():
        rows.to_parquet(tmp_path / f"{name}.parquet")
    data = opened(tmp_path)
    assert data.evaluation.title == "holdout" and data.found.images == {"train": 8, "test": 0}
    assert f"split test is not used: split test of {tmp_path} has no rows" in caplog.text
    with pytest.raises(TinyTLError, match=r"split test of .* has no rows; use another split"):
        opened(tmp_path, eval_split="test")


def test_tables_of_other_columns_and_pointers_to_tables_are_named(tmp_path):
    table = pd.DataFrame({"image": [png(number) for number in range(8)], "label": AB * 4})
    table.to_parquet(tmp_path / "train-0.parquet")
    table.rename(columns={"label": "class"}).to_parquet(tmp_path / "train-1.parquet")
    with pytest.raises(
        TinyTLError, match=r"train-1.parquet has columns class, image, and .*-0.parquet .* image, label"
    ):
        opened(tmp_path)
    (tmp_path / "train-1.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(TinyTLError, match=r"train-1.parquet: is not the file, but a pointer to it; git lfs pull"):
        opened(tmp_path)


@pytest.mark.parametrize(("suffix", "damage"), [("parquet", b"junk"), ("csv", b""), ("csv", b'image,label\n"x')])
def test_of_many_files_the_damaged_one_is_named(suffix, damage, tmp_path):
    for number in range(3):
        table = {"image": [str(tmp_path / "gone.png")] * 8, "label": AB * 4}
        if suffix == "parquet":
            pd.DataFrame(table).to_parquet(tmp_path / f"part-{number}.parquet")
        else:
            pd.DataFrame(table).to_csv(tmp_path / f"part-{number}.csv", index=False)
    (tmp_path / f"part-1.{suffix}").write_bytes(damage)
    with pytest.raises(TinyTLError, match=rf"{tmp_path}/part-1.{suffix}: cannot be loaded .*; mend it or take"):
        opened(tmp_path)


def test_a_file_that_a_pattern_adds_to_those_of_the_only_split_is_named(tmp_path, caplog):
    for name in ("train.csv", "sample_submission.csv"):
        write_image(tmp_path / f"{name}.png", size=(8, 8))
        pd.DataFrame({"image": [f"{name}.png"] * 8, "label": AB * 4}).to_csv(tmp_path / name, index=False)
    assert opened(tmp_path / "*.csv").found.images == {"train": 16}
    assert "2 files are read as one split, though train.csv is called as a split is and sample_sub" in caplog.text
    caplog.clear()
    opened(tmp_path / "train.csv")
    assert "read as one split" not in caplog.text


def test_a_folder_whose_readme_names_its_files_is_read_as_it_is_now(tmp_path):
    config = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n"
    for parent, labels in (("one", ["cat", "dog"]), ("two", ["emu", "fox"]), ("two", ["gnu", "hen"])):
        root = tmp_path / parent / "photos"
        (root / "data").mkdir(parents=True, exist_ok=True)
        (root / "README.md").write_text(config)
        table = pd.DataFrame({"image": [png(number) for number in range(8)], "label": labels * 4})
        table.to_parquet(root / "data" / "train-0.parquet")
        assert opened(root).train.label_names == labels


def numbered(names, images=8):
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    rows = {"image": [{"bytes": png(n), "path": None} for n in range(images)], "label": [0, 1] * (images // 2)}
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize("names", [["dog", "cat"], ["cat", "dog", "emu"], None])
@pytest.mark.parametrize("kind", ["parquet", "arrow", "readme"])
def test_files_that_number_their_classes_otherwise_are_refused(kind, names, tmp_path):
    suffix = "arrow" if kind == "arrow" else "parquet"
    table = numbered(names or ["cat", "dog"])
    table = table if names else table.cast_column("label", datasets.Value("int64"))
    for name, each in (("train-0", numbered(["cat", "dog"])), ("train-1", table)):
        file = tmp_path / "data" / f"{name}.{suffix}"
        file.parent.mkdir(exist_ok=True)
        if kind == "arrow":
            each.save_to_disk(tmp_path / "saved" / name)
            shutil.copy(next((tmp_path / "saved" / name).glob("*.arrow")), file)
        else:
            each.to_parquet(file)
    if kind == "readme":
        files = "".join(f"  - split: {s}\n    path: train-{n}.parquet\n" for n, s in enumerate(("train", "test")))
        (tmp_path / "data" / "README.md").write_text(f"---\nconfigs:\n- config_name: all\n  data_files:\n{files}---\n")
    number, one, other = {2: (0, "'dog'", "'cat'"), 3: (2, "'emu'", "no class"), 0: (0, "no class", "'cat'")}[
        len(names or "")
    ]
    with pytest.raises(TinyTLError, match=f"train-1.{suffix} has {one} for {number} in column label, and .* {other};"):
        opened(tmp_path / "data")


@pytest.mark.parametrize(
    ("first", "other", "found", "expected"),
    [
        ([True, False], [0, 2], "numbers", "true and false"),  # else 2 is read as true
        ([0, 2], [True, False], "true and false", "numbers"),
        (["a", "b"], [True, False], "true and false", "texts"),
        (["1", "2"], [1.0, 2.0], "numbers", "texts"),
        (pd.Categorical(["a", "b"]), [1, 2], "numbers", "texts"),
    ],
)
def test_files_with_other_kinds_of_labels_are_refused(first, other, found, expected, tmp_path):
    for number, labels in enumerate((first, other)):
        rows = {"image": [png(2 * number), png(2 * number + 1)], "label": labels}
        pd.DataFrame(rows).to_parquet(tmp_path / f"train-{number}.parquet")
    with pytest.raises(TinyTLError, match=f"train-1.parquet has {found} in column label, and .*-0.* has {expected};"):
        opened(tmp_path)


def test_files_whose_numbers_are_of_other_types_are_one_split(tmp_path):
    for number, labels in enumerate(
        ([0, 1] * 10, [0.0, 1.0] * 10, [None] * 20)
    ):  # pandas writes floats beside nothing
        rows = {"image": [png(20 * number + i) for i in range(20)], "label": [0, 1] * 10, "size": labels}
        pd.DataFrame(rows).to_parquet(tmp_path / f"train-{number}.parquet")
    assert opened(tmp_path).train.label_names == ["0", "1"]


def test_files_that_number_their_classes_alike_are_one_split(tmp_path):
    for number in range(2):
        numbered(["cat", "dog"]).to_parquet(tmp_path / f"train-{number}.parquet")
    train = opened(tmp_path).train
    assert train.label_names == ["cat", "dog"] and len(train.labels) == 8


def test_metadata_in_parquet_has_the_names_of_its_classes(tmp_path):
    features = datasets.Features(file_name=datasets.Value("string"), label=datasets.ClassLabel(names=["dog", "cat"]))
    for number in range(8):
        write_image(tmp_path / f"{number}.png", size=(8, 8), seed=number)
    rows = {"file_name": [f"{number}.png" for number in range(8)], "label": [0, 1] * 4}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "metadata.parquet")
    train = opened(tmp_path).train
    assert train.label_names == ["cat", "dog"]
    odd = [int(image["path"].removesuffix(".png")[-1]) % 2 for image in train.rows["image"]]
    assert [train.label_names[label] for label in train.labels] == [("dog", "cat")[number] for number in odd]
