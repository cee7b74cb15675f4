"""Tables as other tools write them: read where that is certain, else named with what to do."""

import base64
import json
import re

import datasets
import pandas as pd
import pytest
from shared import write_image
from test_tables import opened, png

from tinytl_hf import TinyTLError
from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.tables import load

LABELS = ["cat", "dog"] * 4


def test_saved_splits_of_no_rows_are_read(tmp_path, caplog):
    full = datasets.Dataset.from_dict({"image": [png(number) for number in range(8)], "label": LABELS})
    datasets.DatasetDict(train=full, test=full.select([])).save_to_disk(tmp_path / "both")
    assert opened(tmp_path / "both").found.images == {"train": 8, "test": 0}
    assert f"split test is not used: split test of {tmp_path / 'both'} has no rows" in caplog.text
    full.select([]).save_to_disk(tmp_path / "none")
    with pytest.raises(TinyTLError, match=r"split train of .* has no rows; use another split or data set"):
        opened(tmp_path / "none")


def labelled(root, header="file_name,label", separator=",", names="{}.png", rows=range(8)):
    for number in range(8):
        write_image(root / f"{number}.png", size=(8, 8), seed=number)
    return "\n".join([header, *(separator.join([names.format(number), LABELS[number]]) for number in rows)])


@pytest.mark.parametrize("name", ["metadata.csv", "labels.csv"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_line_of_excel_says_the_separator(name, separator, tmp_path):
    text = labelled(tmp_path, separator.join(["file_name", "label"]), separator)
    (tmp_path / name).write_text(f"sep={separator}\n{text}", encoding="utf-8-sig")
    assert opened(tmp_path if name == "metadata.csv" else tmp_path / name).found.classes == ["cat", "dog"]


@pytest.mark.parametrize("name", ["metadata.csv", "labels.csv"])
def test_spaces_behind_paths_change_nothing(name, tmp_path):
    (tmp_path / name).write_text(labelled(tmp_path, "file_name ,label", names="{}.png "))
    data = opened(tmp_path if name == "metadata.csv" else tmp_path / name)
    assert data.found.images == {"train": 8} and not data.found.left_out


def test_names_of_columns_that_come_again_are_named(tmp_path):
    file = tmp_path / "labels.csv"
    file.write_text(f"{labelled(tmp_path, rows=range(4))}\n{labelled(tmp_path, rows=range(4, 8))}")
    with pytest.raises(TinyTLError, match=r"names of its columns come again in row 5 of its values"):
        opened(file)


@pytest.mark.parametrize(("second", "fits"), [("x", False), (None, True)])
@pytest.mark.parametrize("header", ["file_name,label,label", "file_name,label,label.1", "file_name,label, label"])
def test_two_columns_of_one_name_are_refused_if_they_differ(header, second, fits, tmp_path):
    lines = labelled(tmp_path, header).splitlines()
    rows = [f"{line},{second or line.split(',')[1]}" for line in lines[1:]]
    (tmp_path / "labels.csv").write_text("\n".join([header, *rows]))
    if header.endswith(".1") or (fits and " " not in header):
        assert opened(tmp_path / "labels.csv").found.classes == ["cat", "dog"]
        return
    with pytest.raises(TinyTLError, match=r"its first line has the name label 2 times; give each column a name"):
        opened(tmp_path / "labels.csv")


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("split", [0, 0, 1, 1] * 2),
        ("Fold", [0.0, 1.0, 2.0, 3.0] * 2),
        ("kfold", [1, 2] * 4),
        ("is_test", [True, False] * 4),
        ("is_valid", [True, False] * 4),
        ("set", [1, 2, 3, 3] * 2),
    ],
)
def test_columns_of_splits_that_hold_no_names_are_said(name, values, kind, tmp_path, caplog):
    labelled(tmp_path)
    table = pd.DataFrame({"image": [f"{number}.png" for number in range(8)], "label": LABELS, name: values})
    options = {"orient": "records", "lines": True} if kind == "jsonl" else {"index": False}
    getattr(table, f"to_{kind.removesuffix('l')}")(tmp_path / f"x.{kind}", **options)
    assert opened(tmp_path / f"x.{kind}").found.images == {"train": 8}
    assert f"column {name} is not used" in caplog.text and caplog.text.count("is not used") == 1
    caplog.clear()
    opened(tmp_path / f"x.{kind}", label_column=name)
    assert "is not used" not in caplog.text


def test_tables_of_splits_beside_a_folder_of_images_are_named_by_a_pattern(tmp_path):
    labelled(tmp_path / "images")
    for split in ("train", "val"):
        rows = [f"images/{number}.png,{LABELS[number]}" for number in range(8)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["image,label", *rows]))
    with pytest.raises(TinyTLError, match=rf"by column label of train.csv; name these files, '{tmp_path}/\*.csv' to"):
        opened(tmp_path)
    assert opened(tmp_path / "*.csv").found.images == {"train": 8, "validation": 8}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("options", [{}, {"image_column": "id"}])
@pytest.mark.parametrize("prefix", ["", "train/"])
def test_images_are_named_without_their_suffix(prefix, options, kind, tmp_path, caplog):
    caplog.set_level("INFO")
    labelled(tmp_path / "train")
    ids = [f"{prefix}{number}" for number in range(8)] if prefix or kind == "csv" else range(8)
    table = pd.DataFrame({"id": ids, "breed": LABELS})
    getattr(table, f"to_{kind}")(tmp_path / f"labels.{kind}", index=False)
    data = opened(tmp_path / f"labels.{kind}", **options)
    found = {image["path"]: label for image, label in zip(data.train.rows["image"], data.train.labels, strict=True)}
    assert all(path == f"{tmp_path}/train/{path[-5]}.png" and int(path[-5]) % 2 == found[path] for path in found)
    assert data.found.classes == ["cat", "dog"] and f"{prefix}0 is train/0.png" in caplog.text


def test_ids_of_two_images_or_none_are_named(tmp_path):
    for folder in ("train", "test"):
        labelled(tmp_path / folder)
    text = labelled(tmp_path / "train", "id,label", names="{}")
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(TinyTLError, match=r"column id: 0 can be test/0.png and train/0.png .*; put the table into"):
        opened(tmp_path / "labels.csv")
    (tmp_path / "train" / "labels.csv").write_text(f"{text}\n99,cat")
    with pytest.raises(TinyTLError, match=r"column id names .*/train/99, and there is no such file"):
        opened(tmp_path / "train" / "labels.csv")
    assert len(opened(tmp_path / "train" / "labels.csv", skip_corrupt=True).train.labels) == 4


@pytest.mark.parametrize("options", [{}, {"image_column": "image"}])
@pytest.mark.parametrize("start", ["", "data:image/png;base64,"])
def test_images_in_base64_are_called_so(start, options, tmp_path):
    texts = [start + base64.b64encode(png(number)).decode() for number in range(8)]
    pd.DataFrame({"image": texts, "label": LABELS}).to_csv(tmp_path / "x.csv", index=False)
    with pytest.raises(TinyTLError, match=r"image_column=image: it holds images as texts in base64.*b64decode"):
        opened(tmp_path / "x.csv", **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": [{"id": 1}], "annotations": [], "categories": []}, "is a file of COCO"),
        ({"0.png": "cat", "1.png": "dog"}, "has images as names and not in rows; write a .csv file"),
        (
            {"image": {"0": "0.png"}, "label": {"0": "cat"}},
            r'one column after the other.*orient="records", lines=True',
        ),
        ({"image": ["0.png", "1.png"], "label": ["cat", "dog"]}, "one column after the other"),
        ({"version": 1, "data": [{"image": "0.png"}] * 2}, "has its rows in data; write such a list into a file"),
    ],
)
@pytest.mark.parametrize("query", ["", "?download=true"])
def test_json_files_that_hold_no_rows_are_called_what_they_are(content, message, query, file_server, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(content, indent=1))
    with pytest.raises(TinyTLError, match=f"{tmp_path}/x.json: .*{message}"):
        opened(tmp_path / "x.json")
    url = f"{file_server(tmp_path)}/x.json{query}"
    with pytest.raises(TinyTLError, match=f"{re.escape(url)}: .*{message}"):
        opened(url)


@pytest.mark.parametrize("lines", [True, False])
def test_json_at_a_url_is_read_as_it_is_now(lines, file_server, tmp_path):
    url = f"{file_server(tmp_path)}/x.json"
    for labels in (LABELS, ["emu", "fox"] * 4):
        rows = pd.DataFrame({"image": "https://x.org/0.png", "label": labels})
        rows.to_json(tmp_path / "x.json", orient="records", lines=lines)
        assert load(DataConfig(dataset=url)).splits["train"]["label"][:] == labels


@pytest.mark.parametrize("lines", [True, False])
def test_json_files_of_rows_are_read(lines, tmp_path):
    labelled(tmp_path)
    table = pd.DataFrame({"image": [f"{number}.png" for number in range(8)], "label": LABELS})
    table.to_json(tmp_path / "x.json", orient="records", lines=lines)
    assert opened(tmp_path / "x.json").found.classes == ["cat", "dog"]


@pytest.mark.parametrize("yes", [1, 1.0, True])
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_column_for_each_class_is_called_so(yes, kind, tmp_path):
    labelled(tmp_path)
    columns = {name: [yes if label == name else type(yes)(0) for label in LABELS] for name in ("cat", "dog", "emu")}
    table = pd.DataFrame({"image": [f"{number}.png" for number in range(8)], **columns})
    getattr(table, f"to_{kind}")(tmp_path / f"x.{kind}", index=False)
    with pytest.raises(TinyTLError, match="cat, dog, emu are a column for each class, with one yes in each row"):
        opened(tmp_path / f"x.{kind}")


@pytest.mark.parametrize("names", ["{}", "images/{}"])
def test_metadata_may_leave_the_suffix_out_too(names, tmp_path):
    text = labelled(tmp_path / "images", names=names)
    (tmp_path / "metadata.csv").write_text(text)
    assert opened(tmp_path).found.images == {"train": 8}
    labelled(tmp_path / "more" / "images")
    (tmp_path / "metadata.csv").write_text(text.replace("images/", ""))
    with pytest.raises(TinyTLError, match=r"metadata.csv: names 0 and 7 more, and there is no such image"):
        opened(tmp_path)
