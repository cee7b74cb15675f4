"""JSON files and lists beside class folders, and images of one name in the folders of several splits."""

import json

import pandas as pd
import pytest
from shared import write_image
from test_tables import opened

from tinytl_hf import TinyTLError

LABELS = {"cat/0.png": "cat", "cat/1.png": "cat", "dog/2.png": "dog", "dog/3.png": "dog"}
OTHERS = dict(zip(LABELS, ["dog", "dog", "cat", "cat"], strict=True))
NOT_USED = "labels.json names 4 of these images and is not used: the folders are the classes"


def folders(root, paths=LABELS):
    for number, path in enumerate(paths):
        write_image(root / path, size=(8, 8), seed=number)


def as_rows(labels):
    return [{"size": 8, "image": path, "label": label} for path, label in labels.items()]


def as_object(labels):
    return {path.split("/")[1]: label for path, label in labels.items()}


@pytest.mark.parametrize(("layout", "take"), [(as_rows, "name .*/labels.json"), (as_object, "write a metadata.csv.*")])
def test_other_labels_of_a_json_file_beside_class_folders_are_asked_for(layout, take, tmp_path, caplog):
    folders(tmp_path)
    file = tmp_path / "labels.json"
    file.write_text(json.dumps(layout(OTHERS)))
    with pytest.raises(TinyTLError, match=f"cat/0.png is cat by its folder, and dog by labels.json; {take} to take"):
        opened(tmp_path)
    file.write_text(json.dumps(layout(LABELS)))
    assert opened(tmp_path).train.label_names == ["cat", "dog"] and "not used" not in caplog.text
    if layout is as_rows:
        file.write_text(json.dumps(as_rows(OTHERS)))
        assert len(opened(file).train.labels) == 2


@pytest.mark.parametrize(
    "content",
    [
        {f"{number}.png": f"a photo, the {number}th of them" for number in range(4)},
        {f"{number}.png": ("Canon", "Nikon")[number % 2] for number in range(4)},
        {f"{number}.png": {"boxes": [[0, 0, 1, 1]]} for number in range(4)},
        {"images": [{"file_name": f"{number}.png"} for number in range(4)], "annotations": []},
        {"cat": ["cat/0", "./cat/1"], "dog": ["dog\\2", "dog/3"]},
    ],
)
def test_a_json_file_with_something_else_of_the_images_is_named(content, tmp_path, caplog):
    folders(tmp_path)
    (tmp_path / "labels.json").write_text(json.dumps(content))
    assert opened(tmp_path).train.label_names == ["cat", "dog"] and NOT_USED in caplog.text


@pytest.mark.parametrize("name", ["class_index.json", "cat/0.json", "cat/0.png.json"])
def test_a_json_file_of_one_image_or_of_none_is_not_named(name, tmp_path, caplog):
    folders(tmp_path)
    text = json.dumps({"imagePath": "0.png"}) if name.startswith("cat") else json.dumps({"0": "cat", "1": "dog"})
    (tmp_path / name).write_text(text)
    (tmp_path / "broken.json").write_text("{")
    opened(tmp_path)
    assert "not used: the folders" not in caplog.text


def test_boxes_in_two_folders_that_are_called_as_splits_are_named_with_the_splits(tmp_path, caplog):
    for top in ("train", "valid"):
        folders(tmp_path / top, [f"{number}.png" for number in range(4)])
        content = {"images": [{"file_name": f"{number}.png"} for number in range(4)], "annotations": []}
        (tmp_path / top / "_annotations.coco.json").write_text(json.dumps(content))
    opened(tmp_path)
    names = "train/_annotations.coco.json, valid/_annotations.coco.json"
    assert f"{names} name 8 of these images and are not used" in caplog.text
    assert f"{names}: which images are for tests is not taken from there" in caplog.text


def test_lists_with_a_heading_and_the_path_behind_numbers_are_named(tmp_path, caplog):
    folders(tmp_path)
    for name in ("Ebay_train.txt", "Ebay_test.txt"):
        (tmp_path / name).write_text("image_id class_id path\n1 1 cat/0.png\n")
    opened(tmp_path)
    assert "Ebay_test.txt, Ebay_train.txt: which images are for tests is not taken from there" in caplog.text


@pytest.mark.parametrize("folder", ["{}", "{}_images", "photos/{}"])
def test_images_of_one_name_are_those_in_the_folder_of_their_split(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    for number, split in enumerate(("train", "val")):
        paths = [f"{folder.format(split)}/{each}.png" for each in range(4)]
        for seed, path in enumerate(paths):
            write_image(tmp_path / path, size=(8, 8), seed=10 * number + seed)
        rows = {"image": [path.split("/")[-1] for path in paths], "label": ["cat", "dog"] * 2}
        pd.DataFrame(rows).to_csv(tmp_path / f"{split}.csv", index=False)
    data = opened(tmp_path / "*.csv")
    for split, part in (("train", data.train), ("val", data.evaluation)):
        where = folder.format(split)
        assert [image["path"] for image in part.rows["image"]] == [
            f"{tmp_path}/{where}/{each}.png" for each in range(4)
        ]
        assert f"0.png is {where}/0.png" in caplog.text
    with pytest.raises(TinyTLError, match=r"0.png can be .*train.*/0.png and .*val.*/0.png in"):
        opened(tmp_path / "train.csv")


def test_files_that_hold_pictures_and_are_no_images_are_counted(tmp_path):
    folders(tmp_path)
    for name in ("cat/0.npy", "cat/1.npy", "dog/scan.pdf", "dog/film.mp4"):
        (tmp_path / name).write_bytes(b"0")
    for empty in ("emu", "fox"):
        (tmp_path / empty).mkdir()
    found = opened(tmp_path).found
    assert found.left_out == {".npy": 2, ".pdf": 1, ".mp4": 1, "folder without images": 2}
    assert "2 folders without images (emu)" in str(found) and "2 .npy (cat/0.npy)" in str(found)


def test_a_folder_of_arrays_alone_is_refused_by_their_name(tmp_path):
    for name in ("cat/0.npy", "dog/1.npy"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"0")
    with pytest.raises(TinyTLError, match=r"it holds no image and no table; left out: 2 .npy \(cat/0.npy\)"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("image", "mask", "told"),
    [
        ("{}/images/{}.png", "{}/masks/{}.png", True),
        ("{}/photos/{}.jpg", "{}/ground truth/{}_mask.png", True),
        ("{}/{}.png", "{}/segmentation/{}.png", True),
        ("train/{}/images/{}.png", "train/{}/masks/{}.png", True),
        ("{}/front/{}.png", "{}/back/{}.png", False),
        ("{}/images/{}.png", "{}/masks/x{}.png", False),
        ("{}_mask/{}.png", "{}/{}.png", False),  # of people, and each class numbers its images
    ],
)
def test_masks_in_folders_of_a_class_are_named(image, mask, told, tmp_path, caplog):
    for number in range(4):
        for seed, path in enumerate((image, mask)):
            write_image(
                tmp_path / path.format(("cat", "dog")[number % 2], number), size=(8, 8), seed=8 * seed + number
            )
    opened(tmp_path)
    beside = f"({mask.format('cat', 0)} beside {image.format('cat', 0)})"
    assert (f"4 images are called as masks of others are {beside}" in caplog.text) is told
    assert ("called as masks" in caplog.text) is told
