"""Tables as other tools write them: read where that is certain, else named with what to do."""

import datasets
import pandas as pd
import pytest
from conftest import write_image
from test_tables import opened, png

from tinytl_hf import TinyTLError

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
