import dataclasses
import shutil
import traceback
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from shared import write_image

from tinytl_hf import TinyTLError
from tinytl_hf.config.data import DataConfig
from tinytl_hf.data import sets
from tinytl_hf.data.batches import DecodedImages, ShuffledBatches, StreamedImages, make_loader, read_images
from tinytl_hf.data.columns import byte_sizes
from tinytl_hf.data.sets import has_hash, open_data, sha256, with_label_names


def config(dataset, **options):
    return DataConfig(dataset=str(dataset), **{"train_size": 32, **options})


def table(n=20, label=None, **columns):
    """A data set with an image column whose row i is all of value i."""
    features = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])}
    images = [Image.new("RGB", (8, 8), (i, i, i)) for i in range(n)]
    values = {"picture": images, "kind": [i % 2 for i in range(n)] if label is None else label, **columns}
    features.update({name: datasets.Value("string") for name in columns})
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def saved(tmp_path, dataset):
    dataset.save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def open_splits(options):
    """The splits to train on and to evaluate on."""
    return open_data(options)[:2]


def test_an_imagefolder_with_a_test_split(colour_folder):
    train, test = open_splits(config(colour_folder))
    assert train.label_names == ["blue", "red"] and len(train.labels) == 24 and len(test.labels) == 10
    assert test.labels.tolist() == [0] * 5 + [1] * 5
    images = read_images(test, config(colour_folder), 32)
    batch = images[[0, 9]] if not hasattr(images, "__getitems__") else images.__getitems__([0, 9])
    assert batch["labels"].tolist() == [0, 1] and batch["index"].tolist() == [0, 9]
    for channel, image, (height, width) in zip([2, 0], batch["pixels"], batch["sizes"].tolist(), strict=True):
        assert image[:, :height, :width].float().mean((1, 2)).argmax() == channel


def test_parquet_in_the_hubs_schema_by_file_pattern_and_folder(tmp_path):
    for split, n in (("train", 20), ("test", 6)):
        (tmp_path / "plain_text").mkdir(exist_ok=True)
        table(n).to_parquet(tmp_path / "plain_text" / f"{split}-00000-of-00001.parquet")
    train, test = open_splits(config(tmp_path))
    assert len(train.labels) == 20 and len(test.labels) == 6 and test.name == "test"
    train, held_out = open_splits(config(tmp_path / "plain_text" / "train-*.parquet"))
    assert len(train.labels) == 18 and len(held_out.labels) == 2


def test_saved_data_sets_with_and_without_splits(tmp_path):
    train, held_out = open_splits(config(saved(tmp_path, table()), eval_fraction=0.3))
    assert len(train.labels) == 14 and len(held_out.labels) == 6
    shutil.rmtree(tmp_path / "saved")
    splits = datasets.DatasetDict(train=table(), validation=table(4))
    train, held_out = open_splits(config(saved(tmp_path, splits)))
    assert len(train.labels) == 20 and held_out.name == "validation" and len(held_out.labels) == 4


def test_the_digits_are_real_and_the_held_out_part_is_stratified_and_seeded():
    train, held_out = open_splits(config("digits", eval_fraction=0.2))
    assert len(train.labels) == 1437 and len(held_out.labels) == 360
    counts = np.bincount(held_out.labels)
    assert counts.min() >= 34 and counts.max() <= 37
    again, _ = open_splits(config("digits", eval_fraction=0.2))
    other, _ = open_splits(config("digits", eval_fraction=0.2, split_seed=1))
    assert (again.labels == train.labels).all() and (other.labels != train.labels).any()
    images = read_images(train, config("digits"), 32)
    assert isinstance(images, DecodedImages) and images.images.shape == (1437, 3, 8, 8)
    assert images.images.max() == 255 and images.images.min() == 0


def test_a_split_can_be_named_or_held_out_though_there_is_a_test_split(tmp_path):
    splits = datasets.DatasetDict(train=table(), test=table(4), extra=table(6))
    path = saved(tmp_path, splits)
    assert open_splits(config(path))[1].name == "test"
    assert len(open_splits(config(path, eval_split="extra"))[1].labels) == 6
    train, held_out = open_splits(config(path, eval_split="holdout", eval_fraction=0.2))
    assert len(train.labels) == 16 and len(held_out.labels) == 4
    with pytest.raises(TinyTLError, match=r"data.eval_split=train: it is trained on; use test, extra, holdout"):
        open_splits(config(path, eval_split="train"))
    with pytest.raises(TinyTLError, match=r"data.eval_split=nope: use test, extra, holdout"):
        open_splits(config(path, eval_split="nope"))
    with pytest.raises(TinyTLError, match=r"data.train_split=nope: the data set has train, test, extra"):
        open_splits(config(path, train_split="nope"))


def test_subsets_are_random_seeded_and_keep_image_and_label_together(tmp_path):
    path = saved(tmp_path, table(200))
    options = config(path, max_train_samples=50, max_eval_samples=7)
    train, held_out = open_splits(options)
    assert len(train.labels) == 50 and len(held_out.labels) == 7
    values = read_images(train, options, 32).images[:, 0, 0, 0].numpy()
    assert values.max() > 100 and (values % 2 == train.labels).all()  # row i has value i and label i % 2


def test_string_labels_become_classes_in_both_splits(tmp_path):
    def words(names):
        return table(len(names), word=names).remove_columns("kind")

    splits = datasets.DatasetDict(train=words(["b", "a", "c", "a"]), test=words(["c", "a"]))
    train, test = open_splits(config(saved(tmp_path, splits)))
    assert train.label_names == test.label_names == ["a", "b", "c"]
    assert train.labels.tolist() == [1, 0, 2, 0] and test.labels.tolist() == [2, 0]


def test_number_labels_can_be_named(tmp_path):
    numbers = table(6).remove_columns("kind").add_column("digit", [7, 3, 7, 3, 7, 3])
    path = saved(tmp_path, numbers)
    with pytest.raises(TinyTLError, match=r"data.label_column: no column of picture, digit fits"):
        open_splits(config(path))
    train, _ = open_splits(config(path, label_column="digit", eval_fraction=0.34))
    assert train.label_names == ["3", "7"]


def test_columns_that_are_many_or_missing_are_named(tmp_path):
    two = table(8).cast_column("kind", datasets.ClassLabel(names=["x", "y"]))
    two = two.add_column("coarse", [0] * 4 + [1] * 4).cast_column("coarse", datasets.ClassLabel(names=["p", "q"]))
    path = saved(tmp_path, two)
    with pytest.raises(TinyTLError, match=r"data.label_column: kind, coarse all fit; name one"):
        open_splits(config(path))
    assert open_splits(config(path, label_column="coarse", eval_fraction=0.25))[0].label_names == ["p", "q"]
    with pytest.raises(TinyTLError, match=r"data.image_column=img: no such column; the data set has picture, kind"):
        open_splits(config(path, image_column="img", label_column="kind"))
    with pytest.raises(TinyTLError, match=r"data.image_column=kind: it holds ClassLabel"):
        open_splits(config(path, image_column="kind", label_column="coarse"))


def test_labels_that_cannot_be_trained_on_are_named(tmp_path):
    with pytest.raises(TinyTLError, match=r"row 3 of split train has label -1, outside 0 to 1"):
        open_splits(config(saved(tmp_path, table(5, label=[0, 1, 0, -1, 1]))))
    shutil.rmtree(tmp_path / "saved")
    with pytest.raises(TinyTLError, match=r"row 1 of split train has no label in word"):
        open_splits(config(saved(tmp_path, table(3, word=["a", None, "b"]).remove_columns("kind"))))
    shutil.rmtree(tmp_path / "saved")
    with pytest.raises(TinyTLError, match=r"split train has one class \(a\); use two or more"):
        open_splits(config(saved(tmp_path, table(3, word=["a"] * 3).remove_columns("kind"))))
    shutil.rmtree(tmp_path / "saved")
    with pytest.raises(TinyTLError, match=r"cannot hold out a part of 2 images"):
        open_splits(config(saved(tmp_path, table(2))))


@pytest.mark.parametrize("name", ["some-user/no-such-dataset", "no_such_folder", "nothing.parquet"])
def test_a_data_set_that_is_not_there_is_named_with_what_can_be_used(name, tmp_path):
    with pytest.raises(TinyTLError, match=rf"data.dataset={name}: cannot be loaded"):
        open_splits(config(name))


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(TinyTLError, match=r"data.dataset=.*cannot be loaded"):
        open_splits(config(tmp_path))


def test_other_class_orders_are_matched_by_name(colour_folder):
    train, _ = open_splits(config(colour_folder))
    turned = with_label_names(train, ["red", "green", "blue"])
    assert turned.labels.tolist() == [2 if label == 0 else 0 for label in train.labels]
    with pytest.raises(TinyTLError, match=r"has the class 'blue', which is not among"):
        with_label_names(train, ["red", "green"])


@pytest.fixture
def folder_with_corrupt_images(tmp_path):
    for i in range(8):
        write_image(tmp_path / "train" / "ab"[i % 2] / f"{i}.png", seed=i)
    (tmp_path / "train" / "a" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (tmp_path / "train" / "b" / "7.png").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(("memory_limit_mb", "workers"), [(2048, 0), (0, 0), (0, 1)])
def test_a_corrupt_image_is_named_or_left_out(folder_with_corrupt_images, memory_limit_mb, workers, caplog):
    options = config(folder_with_corrupt_images, eval_fraction=0.25, memory_limit_mb=memory_limit_mb, workers=workers)
    train, _ = open_splits(options)
    paths = [image["path"] for image in train.rows["image"]]
    broken = [path for path in paths if path.endswith(("2.png", "7.png"))]
    assert broken
    with pytest.raises(TinyTLError, match=rf"image {broken[0]} of split train cannot be read.*skip_corrupt"):
        images = read_images(train, options, 32)
        next(iter(make_loader(images, options, batch_size=6)))
    options = dataclasses.replace(options, skip_corrupt=True)
    state = torch.get_rng_state()
    images = read_images(train, options, 32)
    assert torch.equal(torch.get_rng_state(), state)  # the dropout of the run is that of images in memory
    assert len(images) == 6 - len(broken)
    assert f"left out {len(broken)} unreadable: {broken[0]}" in caplog.text
    batch = next(iter(make_loader(images, options, batch_size=6)))
    kept = [label for i, label in zip(paths, train.labels, strict=True) if i not in broken]
    assert batch["labels"].tolist() == kept


def test_streamed_images_are_those_in_memory(colour_folder):
    train, _ = open_splits(config(colour_folder))
    in_memory = read_images(train, config(colour_folder), 32)
    options = config(colour_folder, memory_limit_mb=0, workers=2)
    streamed = read_images(train, options, 32)
    assert isinstance(in_memory, DecodedImages) and isinstance(streamed, StreamedImages)
    loaders = [make_loader(images, options, batch_size=10) for images in (in_memory, streamed)]
    for ours, theirs in zip(*loaders, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ("pixels", "sizes", "labels", "index"))


def test_each_epoch_shows_every_image_in_a_new_order_and_full_batches():
    batches = ShuffledBatches(images=50, global_batch_size=16, accumulation_steps=2, seed=1)
    assert batches.batch_size == 8 and batches.optimizer_steps == 4 and len(batches) == 8
    first = list(batches)
    assert {len(batch) for batch in first} == {8} and {i for batch in first for i in batch} == set(range(50))
    assert list(batches) == first
    batches.epoch = 1
    assert list(batches) != first
    # The images of an optimizer step do not depend on how many passes it takes.
    whole = list(ShuffledBatches(images=50, global_batch_size=16, accumulation_steps=1, seed=1))
    assert [a + b for a, b in zip(first[::2], first[1::2], strict=True)] == whole


def test_a_set_smaller_than_a_batch_is_repeated():
    assert [sorted(set(batch)) for batch in ShuffledBatches(3, 8, 1, seed=0)] == [[0, 1, 2]]


def test_cifar10_reads_as_on_the_hub(shared_data):
    train, test = open_splits(config(shared_data / "cifar10", max_train_samples=256, max_eval_samples=100))
    assert train.label_names[3] == "cat" and len(train.labels) == 256 and len(test.labels) == 100
    assert read_images(train, config("unused"), 32).images.shape == (256, 3, 32, 32)


def test_a_class_of_which_no_image_can_be_read_is_named(tmp_path, caplog):
    for folder in ("cat", "dog"):
        for i in range(4):
            write_image(tmp_path / folder / f"{i}.png", seed=i)
    options = config(tmp_path, eval_fraction=0.5, skip_corrupt=True)
    train, _ = open_splits(options)
    for file in (tmp_path / "dog").iterdir():
        file.write_bytes(b"no image")
    assert len(read_images(train, options, 32)) == 2
    assert "split train: no image of dog is left" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_goes_while_images_stream_is_named(tmp_path, workers):
    for label in ("a", "b"):
        for number in range(20):
            write_image(tmp_path / label / f"{number}.png", seed=number)
    config = DataConfig(dataset=str(tmp_path), memory_limit_mb=0, skip_corrupt=True, workers=workers)
    images = read_images(open_data(config).train, config, 32)
    gone = next(path for path in (tmp_path / "a").iterdir() if str(path) in str(images.split.rows["image"]))
    gone.unlink()
    with pytest.raises(TinyTLError) as raised:
        list(make_loader(images, config, batch_size=8))
    raised.match(rf"{gone.name} of split train could be read at the start, and now it cannot")
    traceback.clear_frames(raised.tb)  # which hold the workers: collected with them, these are waited for


def test_other_files_of_the_same_names_and_labels_are_other_data(tmp_path):
    for number in range(100):
        write_image(tmp_path / f"{number % 2}" / f"{number:03}.png", seed=number)
    config = DataConfig(dataset=str(tmp_path))
    train = open_data(config).train
    before, files = sha256(train), [row["path"] for row in train.rows["image"]]
    assert has_hash(train, before)
    size = Path(files[1]).stat().st_size
    write_image(Path(files[1]), seed=1000)  # in no sample: every third is
    assert Path(files[1]).stat().st_size == size and not has_hash(open_data(config).train, before)


def test_of_a_large_set_the_sizes_of_files_tell(tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "READ_WHOLE", 1000)
    for number in range(100):
        write_image(tmp_path / f"{number % 2}" / f"{number:03}.png", seed=number)
    config = DataConfig(dataset=str(tmp_path))
    train = open_data(config).train
    before, files = sha256(train), [row["path"] for row in train.rows["image"]]
    write_image(Path(files[1]), seed=1000)
    assert has_hash(open_data(config).train, before)  # of the same size, and in no sample
    write_image(Path(files[1]), size=(40, 37))
    assert not has_hash(open_data(config).train, before)


def test_the_sizes_of_files_and_of_bytes_are_those_of_the_images(tmp_path):
    path = write_image(tmp_path / "a.png")
    content = path.read_bytes()
    held = [{"bytes": content, "path": None}, {"bytes": None, "path": str(path)}, {"bytes": None, "path": "gone.png"}]
    rows = datasets.Dataset.from_dict({"image": held}).cast_column("image", datasets.Image(decode=False))
    assert byte_sizes(rows).tolist() == [len(content), len(content), -1]
    assert byte_sizes(rows.select([2, 0])).tolist() == [-1, len(content)]
