"""Folders that are neither classes nor splits, though they can be taken for such."""

import pytest
from test_folders import each, images_of, make, opened

from tinytl_hf import TinyTLError


@pytest.mark.parametrize("masks", ["masks", "annotations", "Labels", "GT", "train_masks", "SegmentationClass"])
@pytest.mark.parametrize("ending", ["", "_mask"])
@pytest.mark.parametrize("splits", [("",), ("train/", "val/")])
def test_masks_are_no_class(masks, ending, splits, tmp_path):
    for split in splits:
        make(tmp_path, images_of(f"{split}images"))
        make(tmp_path, [f"{split}{masks}/{number}{ending}.png" for number in range(4)])
    with pytest.raises(TinyTLError, match=f"{masks}/ has files of the same names as images/.* these are no classes"):
        opened(tmp_path)


@pytest.mark.parametrize("classes", [("mask", "no_mask"), ("images", "labels"), ("images", "photos")])
def test_masks_that_people_wear_and_labels_of_bottles_are_classes(classes, tmp_path):
    make(tmp_path, images_of(classes[0]))
    make(tmp_path, [f"{classes[1]}/{'a' if classes[1] == 'labels' else ''}{number}.png" for number in range(4)])
    assert opened(tmp_path).train.label_names == sorted(classes)


@pytest.mark.parametrize("names", [("trainval", "test"), ("trainset", "testset"), ("train_images", "TestImages")])
def test_splits_with_more_behind_their_names_are_asked_about(names, tmp_path, caplog):
    make(tmp_path, each(*(f"{name}/{label}" for name in names for label in ("cat", "dog"))))
    with pytest.raises(TinyTLError, match=r"if they are splits, name the two with --data.train_split and"):
        opened(tmp_path)
    data = opened(tmp_path, train_split=names[0], eval_split=names[1])
    assert (data.train.name, data.evaluation.name) == names and data.train.label_names == ["cat", "dog"]


def test_folders_of_metadata_that_are_almost_splits_are_said(tmp_path, caplog):
    files = make(tmp_path, each("training_set", "test_set")) and each("training_set", "test_set")
    rows = [f"{file},{'cat' if number % 2 else 'dog'}" for number, file in enumerate(files)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    assert opened(tmp_path).found.images == {"train": 8}
    assert "test_set, training_set: not read as splits, which are called train, validation and test" in caplog.text


def test_of_two_folders_of_one_split_the_one_that_was_named_is_taken(tmp_path):
    make(tmp_path, each("train/a", "train/b", "val/a", "val/b", "dev/a"))
    with pytest.raises(TinyTLError, match=r"dev/ and val/ are both .* or name one with --data.eval_split dev"):
        opened(tmp_path)
    for name, count in (("val", 8), ("dev", 4)):
        data = opened(tmp_path, eval_split=name)
        assert data.found.evaluation == ("validation", count)
        assert data.found.left_out == {f"beside {name}/, which was named": 12 - count}


def test_the_default_asks_for_no_split(tmp_path):
    make(tmp_path, each("train/a", "train/b", "training/a", "training/b"))
    fix = "put them together, or name one with --data.train_split training"
    with pytest.raises(TinyTLError, match=rf"train/ and training/ are both the train split; {fix}$"):
        opened(tmp_path, train_split="train")
    data = opened(tmp_path, train_split="training")
    assert data.found.left_out == {"beside training/, which was named": 8}


def test_masks_of_splits_inside_are_no_class(tmp_path):
    make(tmp_path, each("images/training", "images/validation", "annotations/training", "annotations/validation"))
    with pytest.raises(TinyTLError, match=r"annotations/ has files of the same names as images/"):
        opened(tmp_path)


def test_masks_beside_their_images_are_said(tmp_path, caplog):
    make(tmp_path, each("cat", "dog", "train_mask"))
    assert opened(tmp_path).found.classes and "masks" not in caplog.text
    make(tmp_path, ["cat/0_mask.png", "cat/0_mask_1.png", "dog/1_mask.png", "dog/left_mask.png"])
    opened(tmp_path)
    assert "3 images are called as masks of others are (cat/0_mask" in caplog.text


@pytest.mark.parametrize(
    "names",
    [
        ("HR", "LR"),
        ("DIV2K_train_HR", "DIV2K_train_LR_x4"),
        ("rgb", "depth"),
        ("images", "depth"),
        ("noisy", "clean"),
        ("visible", "thermal"),
        ("frames", "frames_gt"),
        ("benign", "benign mask"),
    ],
)
@pytest.mark.parametrize("splits", [("",), ("train/", "test/")])
def test_pictures_of_the_same_things_are_said_to_be_taken_as_classes(names, splits, tmp_path, caplog):
    for split in splits:
        make(tmp_path, [f"{split}{name}/{number}.png" for name in names for number in (3, 7, 20)])
    assert opened(tmp_path, eval_fraction=0.4).train.label_names == sorted(names)
    one, other = sorted(names)
    said = [line for line in caplog.messages if "of the same names (3 of 3), and are taken as two classes" in line]
    assert len(said) == len(splits) and said[0].startswith((f"{one}/ and {other}/ hold", f"{other}/ and {one}/ hold"))


def test_flat_splits_beside_their_annotations_are_said_to_be_pairs(tmp_path, caplog):
    make(
        tmp_path, [f"{name}{more}/{n}{name}.png" for name in ("train", "val") for more in ("", "annot") for n in "abc"]
    )
    assert opened(tmp_path, eval_fraction=0.4).found.classes == ["train", "trainannot", "val", "valannot"]
    said = [line for line in caplog.messages if "hold files of the same names (3 of 3)" in line]
    assert [line.split(" hold")[0] for line in said] == ["train/ and trainannot/", "val/ and valannot/"]


@pytest.mark.parametrize(
    "names",
    [("cat", "dog"), ("mask", "no_mask"), ("with_mask", "without_mask"), ("images", "photos"), ("rgb", "sepia")],
)
def test_classes_whose_images_are_numbered_alike_are_no_pairs(names, tmp_path, caplog):
    make(tmp_path, [f"{name}/{number}.png" for name in names for number in range(4)])
    assert opened(tmp_path).train.label_names == sorted(names) and "same names" not in caplog.text


def test_depths_and_images_of_other_names_are_no_pairs(tmp_path, caplog):
    make(tmp_path, [f"rgb/{number}.png" for number in range(10)] + [f"depth/{number}.png" for number in range(2, 12)])
    assert opened(tmp_path).train.label_names == ["depth", "rgb"] and "same names" not in caplog.text


def test_classes_that_hold_the_same_folders_are_said(tmp_path, caplog):
    make(tmp_path, each("color/apple", "color/grape", "gray/apple", "gray/grape"))
    assert opened(tmp_path).found.classes == ["color", "gray"]
    assert "the classes color, gray hold the same folders (apple, grape): if those are the classes" in caplog.text


def test_images_of_boxes_in_splits_lie_in_no_class_folder(tmp_path):
    make(tmp_path, each("images/train", "images/val"))
    for split in ("train", "val"):
        (tmp_path / "labels" / split).mkdir(parents=True)
        (tmp_path / "labels" / split / "0.txt").write_text("0 0.5 0.5 0.1 0.1")
    with pytest.raises(TinyTLError, match=r"lie in splits and in no class folder \(images/train/0.png\)"):
        opened(tmp_path)


@pytest.mark.parametrize("inner", ["Plants", "augmented"])
@pytest.mark.parametrize("splits", [("",), ("train/", "val/")])
def test_a_class_folder_that_holds_the_other_classes_is_refused(inner, splits, tmp_path):
    for split in splits:
        make(tmp_path, each(*(f"{split}{name}" for name in ("rose", "tulip", f"{inner}/rose", f"{inner}/tulip"))))
    with pytest.raises(TinyTLError, match=rf"{inner}/ holds folders that are called as classes .*\(rose, tulip; "):
        opened(tmp_path)


@pytest.mark.parametrize("names", [("wild/cat", "wild/lion"), ("wild/cat",), ("wild/cat", "wild/dog", "wild")])
def test_a_class_folder_with_other_things_or_one_class_in_it_is_a_class(names, tmp_path):
    make(tmp_path, each("cat", "dog", *names))
    assert opened(tmp_path).train.label_names == ["cat", "dog", "wild"]


@pytest.mark.parametrize(("third", "said"), [("trainingSet", True), ("tram", False)])
def test_of_classes_two_that_are_called_as_different_splits_are_named(third, said, tmp_path, caplog):
    make(tmp_path, each("testSet", third, "sample"))
    assert opened(tmp_path).train.label_names == sorted(["testSet", third, "sample"])
    assert ("testSet, trainingSet: read as classes" in caplog.text) is said


@pytest.mark.parametrize(
    "folders", [("photo/cat", "photo/dog", "sketch/dog", "art/cat"), ("a/x/cat", "a/x/dog", "b/x/cat")]
)
@pytest.mark.parametrize("splits", [("",), ("train/", "val/")])
def test_domains_that_hold_most_of_the_same_classes_are_said(folders, splits, tmp_path, caplog):
    make(tmp_path, each(*(f"{split}{name}" for split in splits for name in folders)))
    names = sorted({name.split("/")[0] for name in folders})
    assert opened(tmp_path).train.label_names == names
    said = [line for line in caplog.messages if "hold the same folders" in line]
    assert len(said) == 1 and said[0].startswith(f"the classes {', '.join(names)} hold the same folders (cat, ")


def test_folders_of_dates_are_not_said_to_be_classes_and_deeper_folders_are(tmp_path, caplog):
    caplog.set_level("INFO")
    make(tmp_path, each("cat/2023/01", "cat/2023/02", "dog/2023/01", "dog/2023/02"))
    assert opened(tmp_path).train.label_names == ["cat", "dog"]
    assert "hold the same folders" not in caplog.text
    assert "in folders of their class folders (cat/2023/01/0.png): the class is the first folder" in caplog.text


def test_a_test_split_beside_the_classes_is_refused_with_the_way_to_make_it_one(tmp_path):
    make(tmp_path, each("cat", "dog", "test/cat", "test/dog"))
    with pytest.raises(TinyTLError, match=r"if it is a split, put the folders beside it into one called train$"):
        opened(tmp_path)
