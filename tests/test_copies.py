"""Images that are copies of one another, changed or not, across the splits of a data set and in its held-out part."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from shared import write_image
from test_beside import folders
from test_tables import opened

from tinytl_hf import TinyTLError
from tinytl_hf.data import copies
from tinytl_hf.data.changed_copies import original_name


@pytest.mark.parametrize(
    ("copy", "told"),
    [
        *[
            ("{}_flip", True),
            ("{}-rotated90", True),
            ("{}_90deg", True),
            ("{}_new30degFlipLR", True),
            ("{}_aug_3", True),
        ],
        *[
            ("{}_crop_12_0", True),
            ("{}_Blurred_2", True),
            ("flipped_{}", True),
            ("{}_hflip_noise", True),
            ("{}_jpg.rf.0a1b2c", True),
        ],
        *[("{}_2", False), ("{}_front", False), ("rain{}flip", False), ("dark", False)],
    ],
)
def test_changed_copies_on_both_sides_of_a_split_are_named_and_held_out_together(copy, told, tmp_path, caplog):
    caplog.set_level("INFO")
    names = [f"{label}/photo{number}" for label in ("cat", "dog") for number in range(4)]
    copies = [f"{label}/{copy.format(f'photo{number}')}" for label in ("cat", "dog") for number in range(4)]
    folders(
        tmp_path / "a", [f"{top}/{name}.png" for top, part in (("train", names), ("val", copies)) for name in part]
    )
    opened(tmp_path / "a")
    line = "8 of the 8 images of validation are, by the names, changed copies of images that are trained on"
    assert (f"{line} ({tmp_path}/a/val/cat/" in caplog.text) is told and ("changed copies" in caplog.text) is told
    caplog.clear()
    folders(tmp_path / "b", [f"{name}.png" for name in [*names, *copies]])
    data = opened(tmp_path / "b", eval_fraction=0.25)
    assert ("8 images are copies of others" in caplog.text) is told
    assert "changed copies" not in caplog.text
    if told:
        held_out = {original_name(image["path"]) for image in data.evaluation.rows["image"]}
        assert len(data.evaluation.labels) == 4 and len(held_out) == len(set(data.evaluation.labels)) == 2


def test_the_images_that_are_held_out_are_counted_with_their_copies(tmp_path, caplog):
    names = [f"{label}/{number}{copy}" for label in ("cat", "dog") for number in range(4) for copy in ("", "_flip")]
    folders(tmp_path, [f"{name}.png" for name in names])
    assert len(opened(tmp_path, eval_fraction=0.1).evaluation.labels) == 4
    assert "one of each is held out, 4 of 16 images" in caplog.text
    with pytest.raises(TinyTLError, match=r"leaves fewer of 16 images to train on than one of each class; use 0\.75"):
        opened(tmp_path, eval_fraction=0.9)


@pytest.mark.parametrize("kind", ["same file", "same file in a table", "other format"])
def test_images_that_are_there_twice_are_held_out_together(kind, tmp_path, caplog):
    caplog.set_level("INFO")
    folders(tmp_path, [f"{label}/{number}.png" for label in ("cat", "dog") for number in range(8)])
    images = sorted(tmp_path.glob("*/*.png"))
    for number, image in enumerate(images):
        if kind == "other format":
            write_image(image.with_suffix(".bmp"), size=(8, 8), seed=100 + number)
        else:
            shutil.copy(image, image.with_name(f"again{15 - number}.png"))
    source = tmp_path
    if kind == "same file in a table":
        rows = [(path.read_bytes(), path.parent.name) for path in sorted(tmp_path.glob("*/*.png"))]
        source = tmp_path / "x.parquet"
        pd.DataFrame(rows, columns=["image", "label"]).to_parquet(source)
    data = opened(source, eval_fraction=0.25)
    assert "16 images are copies of others (the same file, or by the names" in caplog.text
    assert "trained on as well" not in caplog.text
    assert np.bincount(data.evaluation.labels).tolist() == [4, 4] and len(data.train.labels) == 24
    if kind == "other format":
        stems = [{Path(image["path"]).with_suffix("") for image in split.rows["image"]} for split in data[:2]]
        assert len(stems[1]) == 4 and not stems[0] & stems[1]


@pytest.mark.parametrize("name", ["{}.png", "1_flip_{}.png"])
def test_a_class_of_one_image_and_its_copies_is_held_out_in_part_and_said(name, tmp_path, caplog):
    folders(tmp_path, [*(f"{label}/{number}.png" for label in ("cat", "dog") for number in range(8)), "one/1.png"])
    for number in range(2, 10):
        shutil.copy(tmp_path / "one" / "1.png", tmp_path / "one" / name.format(number))
    data = opened(tmp_path, eval_fraction=0.25)
    assert "one: all images of it are copies of one, so that those held out say nothing of others" in caplog.text
    assert np.bincount(data.train.labels).min() > 0 and np.bincount(data.evaluation.labels).tolist() == [2, 2, 3]


@pytest.mark.parametrize("path", ["image.png", None])
def test_images_that_a_table_calls_alike_are_not_copies(path, tmp_path, caplog):
    folders(tmp_path, [f"{label}/{number}.png" for label in ("cat", "dog") for number in range(8)])
    rows = [({"bytes": image.read_bytes(), "path": path}, image.parent.name) for image in tmp_path.glob("*/*.png")]
    pd.DataFrame(rows, columns=["image", "label"]).to_parquet(tmp_path / "x.parquet")
    caplog.set_level("INFO")
    assert len(opened(tmp_path / "x.parquet", eval_fraction=0.25).evaluation.labels) == 4
    assert "copies of others" not in caplog.text


def test_changed_copies_on_one_side_alone_are_not_named(tmp_path, caplog):
    names = ("photo{}", "photo{}_flip", "photo{}_rot90")
    paths = [
        f"train/{label}/{name.format(number)}.png" for label in ("cat", "dog") for number in range(2) for name in names
    ]
    folders(tmp_path, [*paths, *(f"val/{label}/photo{number}.png" for label in ("cat", "dog") for number in (7, 8))])
    opened(tmp_path)
    assert "changed copies" not in caplog.text


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["wheat_crop_{i:03}", "maize_crop_{i:03}"], 60),  # numbers that count images
        (["night_dark_{i}"], 30),
        (["crop_{i}_0", "crop_{i}_1"], 60),
        (["p{i}/left", "p{i}/left_flip", "p{i}/right", "p{i}/right_flip"], 60),  # each patient in a folder
        (["p{i}/image", "p{i}/image_flip"], 30),
        (["{i}", "thumbs/{i}"], 30),
        (["original/{i}", "Augmented_2/{i}", "Augmented_2/{i}_flip"], 30),
        (["a{i}", "A{i}"], 60),
        (["{i}", "{i}_aug_0", "{i}_aug_1"], 30),
        (["{i}_aug_0", "{i}_aug_1"], 30),
    ],
)
def test_images_are_held_out_with_their_own_copies_alone(names, groups, tmp_path, caplog):
    caplog.set_level("INFO")
    paths = [f"{label}/{name.format(i=i)}.png" for label in ("cat", "dog") for name in names for i in range(30)]
    folders(tmp_path, paths)
    data = opened(tmp_path, eval_fraction=0.1)
    each = len(paths) // 2
    assert np.bincount(data.evaluation.labels).tolist() == [each // 10, each // 10]
    copied = len(paths) - 2 * groups
    assert (f"{copied} images are copies of others" in caplog.text) is (copied > 0)
    assert "all images of each are copies" not in caplog.text
    counted = any(word in names[0] for word in ("crop", "dark"))
    assert (f"{len(paths)} images: named as many changed copies of a few images would be" in caplog.text) is counted


def test_images_of_a_table_that_have_one_name_are_no_copies_by_it(tmp_path, caplog):
    folders(tmp_path / "i", [f"{label}/{number}.png" for label in ("cat", "dog") for number in range(40)])
    images = sorted((tmp_path / "i").glob("*/*.png"))
    rows = [
        ({"bytes": path.read_bytes(), "path": ("left.png", "left_flip.png")[number % 2]}, path.parent.name)
        for number, path in enumerate(images)
    ]
    pd.DataFrame(rows, columns=["image", "label"]).to_parquet(tmp_path / "x.parquet")
    assert np.bincount(opened(tmp_path / "x.parquet", eval_fraction=0.1).evaluation.labels).tolist() == [4, 4]
    assert "are copies of" not in caplog.text


def test_an_image_whose_copies_are_most_of_its_class_is_trained_on(tmp_path):
    folders(tmp_path, [f"{label}/{name}.png" for label in ("cat", "dog") for name in ("x", "y", "z")])
    for number in range(40):
        shutil.copy(tmp_path / "cat" / "x.png", tmp_path / "cat" / f"x_flip_{number}.png")
    for seed in range(6):
        data = opened(tmp_path, eval_fraction=0.1, split_seed=seed)
        assert np.bincount(data.evaluation.labels).tolist() == [1, 1]


@pytest.mark.parametrize("limit", [10**9, 1])
def test_rows_that_name_a_file_twice_are_copies_however_large_the_files_are(limit, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(copies, "READ_WHOLE", limit)
    folders(tmp_path, [f"{label}/{number}.png" for label in ("cat", "dog") for number in range(10)])
    rows = [(str(path), path.parent.name) for path in sorted(tmp_path.glob("*/*.png"))] * 2
    pd.DataFrame(rows, columns=["image", "label"]).to_csv(tmp_path / "x.csv", index=False)
    data = opened(tmp_path / "x.csv", eval_fraction=0.2)
    sides = [{image["path"] for image in split.rows["image"]} for split in data[:2]]
    assert len(sides[1]) == 4 and not sides[0] & sides[1]
    pd.DataFrame(rows[:20], columns=["image", "label"]).to_csv(tmp_path / "train.csv", index=False)
    pd.DataFrame(rows[3:12], columns=["image", "label"]).to_csv(tmp_path / "test.csv", index=False)
    opened(tmp_path / "t*.csv")
    assert "9 of the 9 images of test are trained on as well" in caplog.text


def test_names_that_several_folders_have_are_no_copies_across_splits(tmp_path, caplog):
    def paths(top, numbers, name):
        return [f"{top}/{label}/p{number}/{name}.png" for label in ("cat", "dog") for number in numbers]

    folders(tmp_path, [*paths("train", (1, 2), "left"), *paths("val", (3, 4), "left_flip")])
    opened(tmp_path)
    assert "changed copies" not in caplog.text
