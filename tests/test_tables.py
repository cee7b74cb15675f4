"""Tables of images and labels: every source of the same images gives the same rows, and what is no table is named."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from shared import run_cli, small_run, write_image

from tinytl_hf import TinyTLError
from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.sets import open_data, sha256

CLASSES = ("cat", "dog", "no label")


def png(value=0):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def opened(dataset, **options):
    return open_data(DataConfig(dataset=str(dataset), **{"eval_fraction": 0.5, **options}))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with three classes of six images."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(18):
        write_image(root / CLASSES[number // 6] / f"{number % 6}.png", size=(8, 8), seed=number)
    return root


def rows_of(photos):
    return [(path, path.parent.name) for path in sorted(photos.rglob("*.png"))]


def as_folder(photos, root, _):
    return photos


def as_metadata(photos, root, _):
    names = [f"{number:02}.png" for number in range(18)]
    for (path, _), name in zip(rows_of(photos), names, strict=True):
        shutil.copy(path, root / name)
    lines = [f"{name},{label}" for name, (_, label) in zip(names, rows_of(photos), strict=True)]
    (root / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    return root


def as_parquet(photos, root, _):
    table = {"image": [path.read_bytes() for path, _ in rows_of(photos)], "label": [n for _, n in rows_of(photos)]}
    pd.DataFrame(table).to_parquet(root / "table.parquet")
    return root / "table.parquet"


def as_csv(photos, root, _):
    table = {"path": [str(path) for path, _ in rows_of(photos)], "label": [label for _, label in rows_of(photos)]}
    pd.DataFrame(table).to_csv(root / "table.csv", index=False)
    return root / "table.csv"


def as_json(photos, root, _):
    shutil.copytree(photos, root / "images")
    lines = [{"file": f"images/{path.relative_to(photos)}", "label": label} for path, label in rows_of(photos)]
    (root / "table.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root / "table.jsonl"


def hub_table(photos):
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)))
    rows = [({"bytes": path.read_bytes(), "path": path.name}, CLASSES.index(label)) for path, label in rows_of(photos)]
    images, labels = zip(*rows, strict=True)
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def as_saved(photos, root, _):
    datasets.DatasetDict(train=hub_table(photos)).save_to_disk(str(root / "saved"))
    return root / "saved"


def as_hub_layout(photos, root, _):
    (root / "data").mkdir()
    hub_table(photos).to_parquet(root / "data" / "train-00000-of-00001.parquet")
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n"
    )
    return root


def as_url(photos, root, file_server):
    as_parquet(photos, root, file_server)
    return f"{file_server(root)}/table.parquet"


SOURCES = [as_folder, as_metadata, as_parquet, as_csv, as_json, as_saved, as_hub_layout, as_url]


def content(split):
    """The bytes of each image with the name of its class."""
    images = [image["bytes"] or Path(image["path"]).read_bytes() for image in split.rows["image"]]
    return [(image, split.label_names[label]) for image, label in zip(images, split.labels, strict=True)]


@pytest.mark.parametrize("write", SOURCES)
def test_every_source_gives_the_same_rows_for_the_same_images(write, photos, tmp_path, file_server):
    expected = opened(photos)
    found = opened(write(photos, tmp_path, file_server))
    assert found.train.label_names == list(CLASSES) and found.found.images == {"train": 18}
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert content(ours) == content(theirs) and sha256(ours) == sha256(theirs)


def test_an_adapter_knows_its_images_in_another_kind_of_source(photos, tmp_path):
    done = run_cli(*small_run(photos, tmp_path / "run", "--method", "FT-Last", "--data.eval_fraction", "0.34"))
    assert done.returncode == 0, done.stderr
    adapter = tmp_path / "run" / "adapter"
    done = run_cli("eval", "--adapter", adapter, "--data.dataset", as_parquet(photos, tmp_path, None))
    assert "evaluating on 7 images" in done.stderr and "trained on none of them" in done.stderr, done.stderr
    # The training part alone, as a data set of its own.
    train, _ = open_data(DataConfig(dataset=str(photos), eval_fraction=0.34))[:2]
    columns = zip(*content(train), strict=True)
    pd.DataFrame(dict(zip(("image", "label"), columns, strict=True))).to_parquet(tmp_path / "part.parquet")
    done = run_cli("eval", "--adapter", adapter, "--data.dataset", tmp_path / "part.parquet")
    assert "evaluating on 11 images" in done.stderr and "it was trained on 11 of them" in done.stderr, done.stderr


IMAGE_KINDS = {
    "bytes": [png(i) for i in range(8)],
    "bytes and path": [{"bytes": png(i), "path": f"{i}.png"} for i in range(8)],
    "paths": [f"{i}.png" for i in range(8)],
}


@pytest.mark.parametrize("named", [None, "picture"])
@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_images_are_bytes_or_paths(kind, named, tmp_path):
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    pd.DataFrame({"picture": IMAGE_KINDS[kind], "label": [0, 1] * 4}).to_parquet(tmp_path / "table.parquet")
    train, held_out = opened(tmp_path / "table.parquet", image_column=named)[:2]
    numbers = np.concatenate([train.numbers, held_out.numbers])
    assert [image for image, _ in content(train) + content(held_out)] == [png(number) for number in numbers]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        *(([7, 10, 9] * 4, ["7", "9", "10"]), ([True, False] * 6, ["False", "True"])),
        *(
            (["b", "a"] * 6, ["a", "b"]),
            ([1.0, 0.0] * 6, ["0", "1"]),
            (["001", "NA", "null"] * 4, ["001", "NA", "null"]),
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_numbers_truths_and_texts_are_classes(values, names, suffix, tmp_path):
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    table = pd.DataFrame({"path": [f"{i}.png" for i in range(12)], "label": values, "size": range(12)})
    file = tmp_path / f"table{suffix}"
    if suffix == ".parquet":
        table.to_parquet(file)
    elif suffix == ".csv":
        table.astype({"label": int} if names == ["0", "1"] else {}).to_csv(file, index=False)
    else:
        table.to_json(file, orient="records", lines=True)
    train, held_out = opened(file)[:2]
    assert train.label_names == names
    numbers = np.concatenate([train.numbers, held_out.numbers])
    given = [str(int(value)) if isinstance(value, float) else str(value) for value in values]
    assert [label for _, label in content(train) + content(held_out)] == [given[number] for number in numbers]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [0.5, 1] * 4}, r"data.label_column=label: it holds 0.5, and a class is a text"),
        ({"a": list("xy" * 4), "b": list("xy" * 4)}, r"data.label_column: a, b all fit; name one"),
        ({"number": [0, 1] * 4}, r"no column of image, number fits by its type"),
        ({"label": [0, None] * 4}, r"row 1 of split train has no label in label"),
        ({"label": ["a"] * 8}, r"split train has one class \(a\); use two or more"),
        ({"label": [[0], [1]] * 4}, r"data.label_column=label: it holds List"),
    ],
)
def test_labels_that_say_nothing_are_named(columns, message, tmp_path):
    pd.DataFrame({"image": IMAGE_KINDS["bytes"], **columns}).to_parquet(tmp_path / "table.parquet")
    with pytest.raises(TinyTLError, match=message):
        opened(tmp_path / "table.parquet")


def test_captions_are_no_classes(tmp_path):
    texts = [f"a photo, number {number}" for number in range(40)]
    pd.DataFrame({"image": [png()] * 40, "caption": texts}).to_parquet(tmp_path / "table.parquet")
    with pytest.raises(TinyTLError, match=r"no column of image, caption fits"):
        opened(tmp_path / "table.parquet")


def test_a_label_in_capitals_comes_before_other_texts(tmp_path):
    rows = {"image": [png(number) for number in range(8)], "Label": [0, 1] * 4, "author": list("xxyyzzww")}
    pd.DataFrame(rows).to_parquet(tmp_path / "x.parquet")
    data = opened(tmp_path / "x.parquet")
    assert data.train.label_names == ["0", "1"] and data.found.labels == "Label"


def test_images_that_have_a_class_each_are_told_so(tmp_path):
    pd.DataFrame({"image": [png(i) for i in range(8)], "label": list("abcdefgh")}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(TinyTLError, match=r"cannot hold out a part of 8 images, as each has a class of its own"):
        opened(tmp_path / "x.parquet")


def test_a_column_that_is_guessed_is_said(tmp_path, caplog):
    caplog.set_level("INFO")
    pd.DataFrame({"image": [png()] * 8, "species": ["a", "b"] * 4}).to_parquet(tmp_path / "table.parquet")
    assert opened(tmp_path / "table.parquet").train.label_names == ["a", "b"]
    assert "labels are from column species" in caplog.text


def test_a_webdataset_has_its_labels_in_cls(tmp_path):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for number in range(8):
            for suffix, data in (("png", png(number)), ("cls", str(number % 2).encode())):
                entry = tarfile.TarInfo(f"{number:03}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    train, held_out = opened(tmp_path)[:2]
    assert train.label_names == ["0", "1"] and len(train.labels) + len(held_out.labels) == 8


def test_a_tar_of_class_folders_is_told_to_be_unpacked(tmp_path):
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for number in range(8):
            entry = tarfile.TarInfo(f"{['cat', 'dog'][number % 2]}/{number}.png")
            entry.size = len(png(number))
            tar.addfile(entry, io.BytesIO(png(number)))
    with pytest.raises(TinyTLError, match=r"in a .tar the class of an image is in a .cls file .* unpack it and name"):
        opened(tmp_path / "photos.tar")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/folder", r"cannot be loaded \(there is no /.*/no/such/folder\)"),
        ("table.csv", r"cannot be loaded \(there is no /.*/table.csv\)"),
        ("./plain", r"cannot be loaded \(there is no /.*/plain\)"),
        ("*.parquet", r"cannot be loaded \(there is no "),
        ("", r"data.dataset: missing; name a folder of images"),
        ("photo.png", r"photo.png is no .parquet, .* file; name the folder of the images"),
        ("photos.zip", r"photos.zip is no .* file; unpack it, and name the folder"),
        ("http://127.0.0.1:9/photos.zip", r"not the address of a .parquet, .* file; download it"),
        ("https://huggingface.co/datasets/a/b/tree/main", r"is a page of the Hub; name .* as --data.dataset a/b$"),
        ("https://huggingface.co/datasets/a/b/blob/main/x.parquet", r"name the file, .*/a/b/resolve/main/x.parquet"),
        ("https://github.com/a/b/blob/main/x.csv", r"is a page about a file; name .*//github.com/a/b/raw/main/x.csv"),
        ("http://127.0.0.1:9/table.csv", r"cannot be loaded \(.*[Cc]onnect"),
        ("broken.csv", r"cannot be loaded \(.*Error"),
        ("nowhere.csv", r"column path names .*/gone/0.png and 7 more, and there is no such file"),
        ("web.csv", r"it holds https://x.org/0.png, and images must be in the table or files on this disk"),
    ],
)
def test_what_cannot_be_loaded_is_named_at_once(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", None)  # what asks the Hub
    for file, text in (("photo.png", "x"), ("photos.zip", "PK"), ("broken.csv", 'a,b\n"x')):
        (tmp_path / file).write_text(text)
    for file, folder in (("nowhere.csv", "gone"), ("web.csv", "https://x.org")):
        table = pd.DataFrame({"path": [f"{folder}/{i}.png" for i in range(8)], "label": [0, 1] * 4})
        table.to_csv(tmp_path / file, index=False)
    with pytest.raises(TinyTLError, match=message):
        opened(name)


def test_rows_without_a_file_can_be_left_out(tmp_path):
    write_image(tmp_path / "0.png")
    table = pd.DataFrame({"path": [f"{i % 2}.png" for i in range(8)], "label": [0, 1] * 4})
    table.to_csv(tmp_path / "t.csv", index=False)
    assert len(opened(tmp_path / "t.csv", skip_corrupt=True).train.labels) == 4


def test_the_cause_that_datasets_hides_is_shown(photos, tmp_path):
    path = as_parquet(photos, tmp_path, None)
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)
    path.write_bytes(content)
    with pytest.raises(TinyTLError, match=r"cannot be loaded \(An error occurred while generating the dataset; \w"):
        opened(path)


def test_a_flat_folder_beside_a_table_is_told_to_name_the_table(tmp_path):
    write_image(tmp_path / "0.png")
    (tmp_path / "labels.csv").write_text("path,label\n0.png,a\n")
    with pytest.raises(
        TinyTLError, match=r"lie in no class folder \(0.png\); if labels.csv has .* name .*/labels.csv$"
    ):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["plain", "photos [2024]", "what?"])
def test_table_files_of_a_folder_are_its_splits_by_their_names(name, tmp_path):
    root = tmp_path / name
    root.mkdir()
    for split, count in (("train", 8), ("val", 4), ("test", 2), ("other", 2)):
        pd.DataFrame({"image": [png(i) for i in range(count)], "label": [0, 1] * (count // 2)}).to_parquet(
            root / f"{split}-0.parquet"
        )
    train, validation, test, found, _, _ = opened(root)
    assert [len(split.labels) for split in (train, validation, test)] == [8, 4, 2]
    assert found.left_out == {".parquet": 1}


def saved(root, **splits):
    def table(labels):
        return datasets.Dataset.from_dict(
            {"image": [{"bytes": png(i), "path": None} for i in range(len(labels))], "label": labels},
            features=datasets.Features(image=datasets.Image(), label=datasets.Value("string")),
        )

    datasets.DatasetDict({name: table(labels) for name, labels in splits.items()}).save_to_disk(str(root / "saved"))
    return root / "saved"


def test_the_sets_of_the_hub_that_are_here_open_as_before(shared_data):
    train, test = opened(shared_data / "caltech101")[:2]
    assert (len(train.labels), len(test.labels), len(train.label_names)) == (2730, 1441, 100)
    train, test = opened(shared_data / "cifar10")[:2]
    assert (len(train.labels), len(test.labels), train.label_names[3]) == (50_000, 10_000, "cat")


def test_a_table_at_a_url_that_has_changed_is_read_again(tmp_path, file_server):
    url = f"{file_server(tmp_path)}/table.parquet"
    for names in (["cat", "dog"], ["apple", "pear"]):
        pd.DataFrame({"image": [png(i) for i in range(8)], "label": names * 4}).to_parquet(tmp_path / "table.parquet")
        assert opened(url).train.label_names == names


def test_classes_that_only_their_column_names_are_said_to_have_no_images(tmp_path, caplog):
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog", "emu", "fox"]))
    rows = {"image": [{"bytes": png(number), "path": None} for number in range(8)], "label": [0, 1] * 4}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    assert len(opened(tmp_path).train.label_names) == 4
    assert "emu, fox have no training images" in caplog.text
