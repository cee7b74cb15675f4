"""Data sets as the Hub has them: subsets, numbered parts, WebDataset's .tar files and Arrow's files."""

import io
import json
import tarfile

import datasets
import numpy as np
import pandas as pd
import pyarrow.feather
import pytest
from shared import run_cli, small_run, write_image
from test_tables import opened, png

from tinytl_hf import TinyTLError


def write_table(path, first=0, rows=20):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame({"image": [png(first + i) for i in range(rows)], "label": ["cat", "dog"] * (rows // 2)})
    table.to_parquet(path)


def write_readme(root, configs):
    (root / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")


@pytest.fixture
def subsets(tmp_path):
    """A folder with the subsets a and b, of 20 images each."""
    for number, name in enumerate("ab"):
        write_table(tmp_path / "data" / name / "train.parquet", first=20 * number)
    write_readme(tmp_path / "data", [{"config_name": name, "data_files": f"{name}/*"} for name in "ab"])
    return tmp_path / "data"


def test_subsets_are_named_where_one_is_to_be_chosen(subsets):
    with pytest.raises(TinyTLError, match=r"data: has several subsets; name one \(a, b\), as --data.subset a$"):
        opened(subsets)
    with pytest.raises(TinyTLError, match=r"data.subset=c: no such subset; name one \(a, b\), as --data.subset a$"):
        opened(subsets, subset="c")
    (subsets / "README.md").unlink()
    with pytest.raises(TinyTLError, match=r"data.subset=a: the data set has no subsets; leave that option out$"):
        opened(subsets, subset="a")


@pytest.mark.parametrize("is_trained_on", [True, False])
def test_another_subset_is_evaluated_whole_and_its_rows_are_not_those_trained_on(is_trained_on, subsets, tmp_path):
    if is_trained_on:  # 20 of the 40 images of b are those of a
        write_table(subsets / "b" / "train.parquet", first=0, rows=40)
    options = ["--data.subset", "a", "--method", "FT-Last", "--train.epochs", "1"]
    assert run_cli(*small_run(subsets, tmp_path / "run", *options)).returncode == 0
    output = tmp_path / "again.json"
    done = run_cli("eval", "--adapter", tmp_path / "run/adapter", "--data.subset", "b", "--output", output)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert (results["split"], results["n"]) == ("train", 40 if is_trained_on else 20)
    assert results["trained_on"] == (18 if is_trained_on else 0)


@pytest.mark.parametrize("trained_with", ["the subset", "its file"])
def test_a_subset_is_known_by_its_file_and_the_other_way_round(trained_with, subsets, tmp_path):
    file, subset = (["--data.dataset", subsets / "a/train.parquet"], ["--data.dataset", subsets, "--data.subset", "a"])
    first, second = (subset, file) if trained_with == "the subset" else (file, subset)
    options = [*first[2:], "--method", "FT-Last", "--train.epochs", "1"]
    assert run_cli(*small_run(first[1], tmp_path / "run", *options)).returncode == 0
    done = run_cli("eval", "--adapter", tmp_path / "run/adapter", *second)
    assert done.returncode == 0, done.stderr
    assert "evaluating on 2 images" in done.stderr and "split holdout; it was trained on none of them" in done.stderr


def test_a_part_that_was_not_downloaded_is_said(tmp_path, caplog):
    for number in (0, 1, 3):
        write_table(tmp_path / f"data/train-0000{number}-of-00005.parquet", first=20 * number)
    write_table(tmp_path / "data/test-00000-of-00001.parquet", first=100)
    assert opened(tmp_path).found.images == {"train": 60, "test": 20}
    assert [message for message in caplog.messages if "parts" in message] == [
        "data/train-00003-of-00005.parquet: of the 5 parts of this table 2 are missing "
        "(data/train-00002-of-00005, data/train-00004-of-00005): the data set is not whole"
    ]


@pytest.mark.parametrize("splits", [("train", "test"), ("train",)])
def test_splits_that_a_readme_alone_gives_to_folders_of_images_are_said(splits, tmp_path, caplog):
    for number, name in enumerate(("x/a/0", "x/b/0", "x/a/1", "x/b/1", "y/a/0", "y/b/0", "y/a/1", "y/b/1")):
        write_image(tmp_path / f"{name}.png", seed=number)
    files = [{"split": split, "path": f"{folder}/**"} for split, folder in zip(splits, "xy", strict=False)]
    write_readme(tmp_path, [{"config_name": "default", "data_files": files}])
    assert opened(tmp_path).train.label_names == ["x", "y"]
    said = "README.md: which images are for tests is not taken from there, and the folders do not say it"
    assert (said in caplog.text) is (len(splits) > 1)


def write_tar(path, names, labels=("0", "1")):
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names):
            data = labels[number // 2 % 2].encode() if name.endswith(".cls") else png(number)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def of_suffixes(*suffixes):
    return [f"{i:03}.{each}" for i in range(20) for each in (suffixes[i * len(suffixes) // 20], "cls")]


@pytest.mark.parametrize(
    ("names", "labels", "message"),
    [
        (
            of_suffixes("jpg", "png"),
            "01",
            r"images are called .jpg and .png \(000.jpg in .*, 010.png in .*\), and of a",
        ),
        (of_suffixes("jpg", "JPG"), "01", r"images are called .jpg and .JPG .* give all images one suffix"),
        ([f"a.{i:03}.{s}" for i in range(20) for s in ("png", "cls")], "01", r"a.000.png in .* behind the first dot"),
        (of_suffixes("png"), ("cat", "dog"), r"000.cls in .*: it holds 'cat', and .* with the names of classes .txt"),
    ],
)
def test_a_tar_whose_files_are_called_otherwise_than_they_should_be_is_told_so(names, labels, message, tmp_path):
    write_tar(tmp_path / "train-0.tar", names, labels)
    with pytest.raises(TinyTLError, match=message):
        opened(tmp_path)


def test_masks_beside_the_images_of_a_tar_are_no_images_of_another_suffix(tmp_path):
    write_tar(tmp_path / "train-0.tar", [f"{i:03}.{s}" for i in range(20) for s in ("jpg", "png", "cls")], "01")
    with pytest.raises(TinyTLError, match=r"data.image_column: jpg, png all fit; name one"):
        opened(tmp_path)


def test_suffixes_that_differ_between_the_parts_of_a_tar_are_noticed(tmp_path):
    for number, suffix in enumerate(("jpg", "png")):
        write_tar(tmp_path / f"train-{number}.tar", of_suffixes(suffix))
    with pytest.raises(TinyTLError, match=r"images are called .jpg and .png"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["x.feather", "x.ipc", "x.arrow"])
def test_files_of_arrow_are_tables_whatever_their_suffix(name, tmp_path):
    table = pyarrow.table({"image": [png(i) for i in range(8)], "label": ["a", "b"] * 4})
    pyarrow.feather.write_feather(table, tmp_path / name)
    for source in (tmp_path, tmp_path / name):
        assert opened(source).found.images == {"train": 8}


@pytest.mark.parametrize(
    ("values", "feature"),
    [
        (np.zeros((8, 8, 8, 3), np.uint8), datasets.Array3D((8, 8, 3), "uint8")),
        (np.zeros((8, 8, 8), np.uint8).tolist(), datasets.List(datasets.List(datasets.Value("uint8")))),
        ([[{"bytes": png(), "path": None}]] * 8, datasets.List(datasets.Image())),
    ],
)
def test_columns_of_pixels_and_of_lists_are_told_what_to_write(values, feature, tmp_path):
    features = datasets.Features(image=feature, label=datasets.Value("string"))
    datasets.Dataset.from_dict({"image": values, "label": ["a", "b"] * 4}, features=features).save_to_disk(tmp_path)
    with pytest.raises(TinyTLError, match=r"if image holds pixels or lists of images, write the bytes of one image"):
        opened(tmp_path)


def write_numbers(root, numbers, info):
    root.mkdir(exist_ok=True)
    for split, rows in numbers.items():
        pd.DataFrame({"image": [png(i) for i in range(len(rows))], "label": rows}).to_parquet(
            root / f"{split}.parquet"
        )
    (root / "README.md").write_text(f"---\ndataset_info: {json.dumps(info)}\n---\n")


@pytest.mark.parametrize("names", [["cat", "dog", "fox"], {"0": "cat", "1": "dog", "2": "fox"}])
@pytest.mark.parametrize("wrap", [lambda info: info, lambda info: [info], lambda info: [info, info]])
def test_classes_have_the_names_that_a_readme_gives_their_numbers(names, wrap, tmp_path):
    info = {"features": [{"name": "label", "dtype": {"class_label": {"names": names}}}]}
    write_numbers(tmp_path / "data", {"train": [0, 1, 2] * 6, "test": [2, 1, 0]}, wrap(info))
    sets = opened(tmp_path / "data")
    assert sets.train.label_names == ["cat", "dog", "fox"]
    assert list(sets.evaluation.labels) == [2, 1, 0]


def test_numbers_beside_those_that_a_readme_names_are_refused_and_other_names_ignored(tmp_path):
    info = {"features": [{"name": "label", "dtype": {"class_label": {"names": ["cat", "dog"]}}}]}
    write_numbers(tmp_path / "more", {"train": [0, 1, 2] * 6}, info)
    with pytest.raises(TinyTLError, match=r"README.md: names the classes of label 0 to 1, and there is 2; write all"):
        opened(tmp_path / "more")
    other = {"features": [{"name": "label", "dtype": {"class_label": {"names": ["dog", "cat"]}}}, "odd", {"name": 1}]}
    write_numbers(tmp_path / "two", {"train": [0, 1] * 6}, [info, other])  # of two subsets: not known which it is
    assert opened(tmp_path / "two").train.label_names == ["0", "1"]
