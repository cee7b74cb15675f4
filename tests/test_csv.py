"""CSV files, metadata and the names of classes as people and their programs write them."""

import pytest
from shared import write_image

from tinytl_hf import TinyTLError
from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.sets import open_data

LABELS = ["cat", "dog"] * 4


def images(root):
    """Eight images in a folder of the root, by their paths relative to that."""
    names = [f"img/{number}.png" for number in range(8)]
    for number, name in enumerate(names):
        write_image(root / name, size=(8, 8), seed=number)
    return names


def write(file, names, labels=LABELS, separator=",", header=("file_name", "label"), encoding="utf-8"):
    rows = [header, *zip(names, labels, strict=True)] if header else list(zip(names, labels, strict=True))
    file.write_text("".join(f"{separator.join(row)}\n" for row in rows), encoding=encoding)
    return file


def opened(dataset, **options):
    return open_data(DataConfig(dataset=str(dataset), **{"eval_fraction": 0.5, **options}))


def assert_labelled(data, root):
    """Cats are the images of even numbers, and all images are there."""
    found = {
        (image["path"], split.label_names[label])
        for split in data[:2]
        for image, label in zip(split.rows["image"], split.labels, strict=True)
    }
    assert found == {(f"{root}/img/{number}.png", LABELS[number]) for number in range(8)}


@pytest.fixture(params=["metadata.csv", "labels.csv"])
def file(request, tmp_path):
    """A file to write, which is found beside the images or is named."""
    return tmp_path / request.param


def dataset_of(file):
    return file.parent if file.name == "metadata.csv" else file


@pytest.mark.parametrize(("separator", "word"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_columns_that_something_else_than_commas_separates_are_read_and_said(separator, word, file, tmp_path, caplog):
    caplog.set_level("INFO")
    write(file, images(tmp_path), separator=separator)
    assert_labelled(opened(dataset_of(file)), tmp_path)
    assert f"{file}: read as having {word} between its columns" in caplog.text


def test_a_tsv_file_with_commas_is_read(tmp_path):
    assert_labelled(opened(write(tmp_path / "labels.tsv", images(tmp_path))), tmp_path)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_file_that_is_not_utf_8_is_told_so(encoding, file, tmp_path):
    write(file, images(tmp_path), ["café", "thé"] * 4, encoding=encoding)
    with pytest.raises(TinyTLError, match=rf"{file}: is not in UTF-8 \(.*\); save it as CSV in UTF-8"):
        opened(dataset_of(file))


def test_a_first_line_that_is_a_row_is_not_lost(file, tmp_path):
    write(file, images(tmp_path), header=None)
    with pytest.raises(TinyTLError, match=rf"{file}: its first line names an image \(img/0.png\), not the columns"):
        opened(dataset_of(file))


def test_metadata_that_names_nothing_is_named(tmp_path):
    images(tmp_path)
    write(tmp_path / "metadata.csv", [], [])
    with pytest.raises(TinyTLError, match=r"metadata.csv: names no image"):
        opened(tmp_path)


def test_metadata_that_is_not_used_tells_the_columns_that_it_has(tmp_path, caplog):
    write(tmp_path / "metadata.csv", images(tmp_path), header=("filename", "label"))
    with pytest.raises(TinyTLError, match=r"has one class \(img\)"):
        opened(tmp_path)
    assert "metadata.csv: not used, as it has no column file_name (but filename, label)" in caplog.text


@pytest.mark.parametrize(
    "spelling", ["img\\{}.png", "{root}/img/{}.png", "{link}/img/{}.png", "file://{root}/img/{}.png"]
)
def test_a_path_means_its_image_however_it_is_written(spelling, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "data")
    root = tmp_path / "data"
    images(root)
    names = [spelling.format(number, root=root, link=tmp_path / "link") for number in range(8)]
    file = write(root / "metadata.csv", names)
    assert_labelled(opened(root), root)
    if "{link}" not in spelling:  # which a table may well mean
        assert_labelled(opened(file.rename(root / "x.csv")), root)


def test_a_path_elsewhere_is_named_as_it_is_written(tmp_path):
    images(tmp_path)
    write(tmp_path / "metadata.csv", ["/content/drive/img/0.png"], ["cat"])
    with pytest.raises(TinyTLError, match=r"metadata.csv: names /content/drive/img/0.png, and there is no such image"):
        opened(tmp_path)


@pytest.mark.parametrize("other", ["cat ", "Cat", "CAT"])
def test_classes_that_only_spaces_or_capitals_tell_apart_are_said(other, tmp_path, caplog):
    file = write(tmp_path / "x.csv", images(tmp_path), ["cat", other] * 4)
    assert sorted(opened(file).train.label_names) == sorted(["cat", other])
    names = ", ".join(repr(name) for name in sorted(["cat", other]))
    assert f"{names} are classes of their own, though only capitals, spaces or zeros tell them apart" in caplog.text


def test_columns_and_texts_without_end_are_not_listed_to_the_end(tmp_path):
    (tmp_path / "x.csv").write_text(
        ",".join(["label", *(f"pixel{i}" for i in range(784))]) + "\n" + "1," * 784 + "0\n"
    )
    with pytest.raises(
        TinyTLError,
        match=r"no column of label, pixel0, .* and 765 more fits.*; if pixel0, pixel1 and 782 more are the pixels",
    ) as error:
        opened(tmp_path / "x.csv")
    assert len(str(error.value)) < 500
    (tmp_path / "z.csv").write_text("emotion,pixels\n" + f"1,{' '.join(['70'] * 2304)}\n" * 8)
    with pytest.raises(
        TinyTLError, match=r"no column of emotion, pixels fits.*; if pixels are the pixels of images, wr"
    ):
        opened(tmp_path / "z.csv")
    write(tmp_path / "y.csv", ["iVBORw0KGgo" * 1000] * 8)
    with pytest.raises(TinyTLError, match=r"column file_name names .*iVBORw0KGgo.*\.\.\..* and 7 more") as error:
        opened(tmp_path / "y.csv", image_column="file_name")
    assert len(str(error.value)) < 600


def test_rows_that_a_person_emptied_are_no_rows(file, tmp_path):
    write(file, images(tmp_path))
    file.write_text(file.read_text() + ",\n,\n")  # as Excel writes them
    assert_labelled(opened(dataset_of(file)), tmp_path)


@pytest.mark.parametrize(("separator", "word"), [(";", "semicolons"), ("\t", "tabs")])
def test_rows_that_are_not_separated_as_their_header_are_named(separator, word, file, tmp_path):
    write(file, images(tmp_path), separator=separator)
    file.write_text(file.read_text().replace(f"file_name{separator}label", "file_name,label"))
    with pytest.raises(TinyTLError, match=rf"{file}: has {word} in its rows, and others between the names"):
        opened(dataset_of(file))


def test_labels_of_no_image_in_metadata_are_counted(tmp_path):
    file = write(tmp_path / "metadata.csv", images(tmp_path))
    file.write_text(file.read_text() + ",cat\n,\n,dog\n")
    data = opened(tmp_path)
    assert data.found.left_out == {"line without a file_name": 2} and data.found.images == {"train": 8}
