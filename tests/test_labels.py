"""What a column of labels may hold, alike in every source, and what is said of labels that are no single class."""

import json
import re

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shared import write_image
from test_tables import opened

from tinytl_hf import TinyTLError

NAMES = [f"{number}.png" for number in range(8)]
LABELS = ["cat", "dog"] * 4


@pytest.fixture
def root(tmp_path):
    """A folder of eight images."""
    for number, name in enumerate(NAMES):
        write_image(tmp_path / "data" / name, size=(8, 8), seed=number)
    return tmp_path / "data"


def frame(labels, **columns):
    return pd.DataFrame({"file_name": NAMES[: len(labels)], "label": labels, **columns})


def write(table, file):
    if file.suffix == ".parquet":
        table.to_parquet(file)
    elif file.suffix == ".jsonl":
        table.to_json(file, orient="records", lines=True)
    elif file.suffix == ".json":
        table.to_json(file, orient="records")
    else:
        table.to_csv(file, index=False, sep="\t" if file.suffix == ".tsv" else ",")
    return file


FILES = ["x.parquet", "x.csv", "x.tsv", "x.jsonl", "x.json", "metadata.csv", "metadata.jsonl", "metadata.parquet"]
SOURCES = [*FILES, "saved", "hub", "url.parquet"]  # at a URL, images must be in the table


def source_of(table, root, kind, file_server):
    """A data set of that kind with a table's labels."""
    with_images = pd.DataFrame({"image": [(root / name).read_bytes() for name in table["file_name"]], **table})
    with_images = with_images.drop(columns="file_name")
    if kind == "saved":
        datasets.Dataset.from_pandas(with_images).save_to_disk(str(root / "saved"))
        return root / "saved"
    if kind == "hub":
        (root / "hub" / "data").mkdir(parents=True)
        write(with_images, root / "hub" / "data" / "train-0.parquet")
        config = (
            "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n"
        )
        (root / "hub" / "README.md").write_text(config)
        return root / "hub"
    if kind.startswith("url"):
        write(with_images, root / kind)
        return f"{file_server(root)}/{kind}"
    write(table, root / kind)
    return root if kind.startswith("metadata") else root / kind


@pytest.mark.parametrize("kind", SOURCES)
def test_numbers_are_classes_where_they_are_whole_in_every_source(kind, root, file_server):
    said = (
        r"data.label_column=label: it holds 0\.5, and a class is a text, a whole number, or true or false; round such"
    )
    with pytest.raises(TinyTLError, match=f"^{said} numbers, or write names, as v0.5 for 0.5$"):
        opened(source_of(frame([0.5, 1.0, 1.5, 2.0] * 2), root, kind, file_server))


@pytest.mark.parametrize("kind", SOURCES)
def test_whole_numbers_are_the_same_classes_with_and_without_a_point(kind, root, file_server):
    assert opened(source_of(frame([10.0, 2.0] * 4), root, kind, file_server)).found.classes == ["2", "10"]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["1.000000000000000000e+00", "0.000000000000000000e+00"], ["0", "1"]),  # as numpy.savetxt has them
        (["v1.0", "v1.5"], ["v1.0", "v1.5"]),
        (["1.5.0", "1.6.0"], ["1.5.0", "1.6.0"]),
        (["0.5", "half"], ["0.5", "half"]),
        (["1e5", "2f3"], ["1e5", "2f3"]),
        (["001", "002"], ["001", "002"]),
        (["inf", "nan"], ["inf", "nan"]),
        (['"1,000"', '"2,000"'], ["1,000", "2,000"]),  # a thousand
        (['"cat, dog"', '"1,5"'], ["1,5", "cat, dog"]),
    ],
)
@pytest.mark.parametrize("file", ["x.csv", "metadata.csv"])
def test_texts_of_a_csv_file_that_are_no_numbers_stay_as_they_are(labels, classes, file, root):
    lines = [f"{name},{label}\n" for name, label in zip(NAMES, labels * 4, strict=True)]
    (root / file).write_text("".join(["file_name,label\n", *lines]))
    assert opened(root if file == "metadata.csv" else root / file).found.classes == classes


@pytest.mark.parametrize("labels", [["0.5", "nan"], [".5", "1"], ["1e-05", "1.0"], ["1.0", "inf"], ["0.5 ", "1.0"]])
@pytest.mark.parametrize("file", ["x.csv", "metadata.csv"])
def test_numbers_of_a_csv_file_are_known_in_each_spelling(labels, file, root):
    write(frame(labels * 4), root / file)
    with pytest.raises(TinyTLError, match=r"it holds (0\.5|1e-05|inf), and a class is a text, a whole number"):
        opened(root if file == "metadata.csv" else root / file)


@pytest.mark.parametrize("name", ["x.csv", "metadata.csv"])
def test_numbers_with_a_comma_are_those_with_a_point(name, root):
    dataset = root if name == "metadata.csv" else root / name
    frame(["0,5", "1,0"] * 4).to_csv(root / name, sep=";", index=False)
    with pytest.raises(TinyTLError, match=r"it holds 0\.5, and a class is a text"):
        opened(dataset)
    frame(["0,0", "1,0"] * 4).to_csv(root / name, sep=";", index=False)
    assert opened(dataset).found.classes == ["0", "1"]


def test_texts_that_look_like_numbers_are_classes_where_a_source_tells_them_from_numbers(root, tmp_path):
    for kind in ("x.parquet", "x.jsonl", "metadata.jsonl"):
        assert opened(source_of(frame(["0.5", "1.0"] * 4), root, kind, None)).found.classes == ["0.5", "1.0"]
        (root / kind).unlink()
    for number in range(8):
        write_image(tmp_path / "folders" / ["0.5", "1.0"][number % 2] / f"{number}.png", seed=number)
    assert opened(tmp_path / "folders").found.classes == ["0.5", "1.0"]


def test_numbers_of_a_test_split_are_judged_too(root):
    write(frame([0, 1] * 4), root / "train.csv")
    write(frame([0.5, 1] * 4), root / "test.csv")
    with pytest.raises(TinyTLError, match=r"it holds 0\.5, and a class is a text"):
        opened(root / "*.csv")


def test_labels_beside_class_folders_are_compared_as_numbers(tmp_path, caplog):
    paths = [f"{label}/{number}.png" for label in ("1.0", "2.0") for number in range(4)]
    for number, path in enumerate(paths):
        write_image(tmp_path / path, size=(8, 8), seed=number)
    labels = [path.split("/")[0] for path in paths]
    pd.DataFrame({"path": paths, "label": labels}).to_csv(tmp_path / "x.csv", index=False)
    assert opened(tmp_path).found.classes == ["1.0", "2.0"]
    pd.DataFrame({"path": paths, "label": labels[::-1]}).to_csv(tmp_path / "x.csv", index=False)
    with pytest.raises(TinyTLError, match=r"is 1.0 by its folder, and 2 by column label of x.csv"):
        opened(tmp_path)


MIXED = [
    ([1, "1"], 'numbers and texts (1 in {0}, "1" in {1})'),
    ([1, 1, 1, "cat"], 'numbers and texts (1 in {0}, "cat" in {3})'),
    ([True, 1], "truths and numbers (true in {0}, 1 in {1})"),
    ([1.5, False], "numbers and truths (1.5 in {0}, false in {1})"),
    (["true", True], 'texts and truths ("true" in {0}, true in {1})'),
    ([None, "cat", None, 2], 'texts and numbers ("cat" in {1}, 2 in {3})'),
    (["cat", {"name": "dog"}], 'texts and objects ("cat" in {0}, {{"name": "dog"}} in {1})'),
    (["cat", ["dog"]], 'texts and lists ("cat" in {0}, ["dog"] in {1})'),
]


@pytest.mark.parametrize(("labels", "said"), MIXED)
@pytest.mark.parametrize("kind", ["x.jsonl", "x.json", "metadata.jsonl"])
def test_labels_of_several_kinds_are_named_with_two_of_them(labels, said, kind, root):
    rows = [{"file_name": name, "label": label} for name, label in zip(NAMES[: len(labels)], labels, strict=True)]
    text = json.dumps(rows) if kind == "x.json" else "\n".join(map(json.dumps, rows))
    (root / kind).write_text(text)
    places = NAMES if kind == "metadata.jsonl" else [f"row {row} of split train" for row in range(8)]
    message = f"data.label_column=label: it holds {said.format(*places)}, and the classes of a column are of one kind"
    with pytest.raises(TinyTLError, match=f"^{re.escape(message)}; write all of them as texts$"):
        opened(root if kind == "metadata.jsonl" else root / kind)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([{"name": "cat"}, {"name": "dog"}], 'objects ({"name": "cat"}), .*; write what names the class (name) into'),
        ([{"name": "cat"}, {"id": 1}], '"cat".*; write what names the class (name'),
        ([["cat"], ["dog"]], 'List.*; take the one item of each list, as df["label"].str[0] of pandas does'),
        ([[1], ["dog"]], 'List.*; take the one item of each list, as df["label"].str[0] of pandas does'),
        ([["cat", "dog"], ["dog"]], "List.*; an image has one class here, not several"),
    ],
)
@pytest.mark.parametrize("kind", ["x.jsonl", "metadata.jsonl"])
def test_objects_and_lists_are_no_classes(labels, said, kind, root):
    rows = [{"file_name": name, "label": label} for name, label in zip(NAMES, labels * 4, strict=True)]
    (root / kind).write_text("\n".join(map(json.dumps, rows)))
    pattern = r".*".join(re.escape(part) for part in said.split(".*"))
    with pytest.raises(
        TinyTLError, match=f"data.label_column=label: it holds {'.*' if said[0] == chr(34) else ''}{pattern}"
    ):
        opened(root if kind == "metadata.jsonl" else root / kind)


@pytest.mark.parametrize("kind", ["x.jsonl", "metadata.jsonl"])
def test_other_columns_may_hold_values_of_several_kinds(kind, root):
    rows = [
        {
            "file_name": name,
            "label": LABELS[number],
            "width": [640, "640"][number % 2],
            "tags": [None, ["x", 1]][number % 2],
        }
        for number, name in enumerate(NAMES)
    ]
    (root / kind).write_text("\n".join(map(json.dumps, rows)))
    data = opened(root if kind == "metadata.jsonl" else root / kind)
    assert data.found.classes == ["cat", "dog"] and data.found.images == {"train": 8}


def test_values_of_several_kinds_that_the_library_reads_are_refused_too(root):
    """A README names the files, and the library datasets reads the text "1" as the number."""
    rows = [{"file_name": name, "label": [1, "1"][number % 2]} for number, name in enumerate(NAMES)]
    rows = [{**row, "file_name": str(root / row["file_name"])} for row in rows]
    (root / "hub").mkdir()
    (root / "hub" / "train-0.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train-*\n---\n"
    (root / "hub" / "README.md").write_text(config)
    with pytest.raises(
        TinyTLError, match=r'it holds values of several kinds, such as 1 and "1", and a class is .* texts'
    ):
        opened(root / "hub")


def test_a_column_of_several_kinds_that_may_be_the_labels_is_named(root):
    rows = [{"file_name": name, "breed": [1, "cat"][number % 2]} for number, name in enumerate(NAMES)]
    (root / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        TinyTLError, match=r"no column of file_name, breed fits by its type \(breed with values of sev"
    ):
        opened(root / "x.jsonl")
    with pytest.raises(
        TinyTLError, match=r'label_column=breed: it holds numbers and texts \(1 in row 0 of split train, "cat"'
    ):
        opened(root / "x.jsonl", label_column="breed")


@pytest.mark.parametrize("kind", FILES)
def test_a_column_for_each_class_is_told_how_to_become_one(kind, root):
    yes = [[int(label == name) for label in LABELS] for name in ("cat", "dog", "e u")]
    table = pd.DataFrame({"file_name": NAMES, **dict(zip(("cat", "dog", "e u"), yes, strict=True))})
    write(table, root / kind)
    dataset = root if kind.startswith("metadata") else root / kind
    with pytest.raises(
        TinyTLError, match="cat, dog, e u are a column for each class, with one yes in each row"
    ) as error:
        opened(dataset)
    line = re.search(r'df\["label"\] = .*\)', str(error.value))[0]
    read = {".csv": pd.read_csv, ".tsv": lambda file: pd.read_csv(file, sep="\t"), ".parquet": pd.read_parquet}
    file = root / kind
    df = read.get(file.suffix, lambda file: pd.read_json(file, lines=file.suffix == ".jsonl"))(file)
    exec(line, {"df": df})
    write(df, file)
    assert opened(dataset).found.classes == ["cat", "dog"]


@pytest.mark.parametrize("yes", [1, 1.0, True])
@pytest.mark.parametrize("kind", ["x.csv", "x.parquet", "x.jsonl", "metadata.csv"])
def test_several_yes_in_a_row_are_several_classes(kind, yes, root):
    columns = {name: [type(yes)(number % 3 in (place, 2)) for number in range(8)] for place, name in enumerate("abc")}
    write(pd.DataFrame({"file_name": NAMES, **columns}), root / kind)
    said = "a, b, c say yes or no, and row 2 says yes in a, b, c, but an image has one class here, not several"
    with pytest.raises(TinyTLError, match=f"{said}; name one of them, as --data.label_column a"):
        opened(root if kind == "metadata.csv" else root / kind)
    assert len(opened(root if kind == "metadata.csv" else root / kind, label_column="a").found.classes) == 2


@pytest.mark.parametrize("kind", ["x.csv", "x.parquet", "x.jsonl"])
def test_a_text_beside_a_column_for_each_class_is_not_taken_in_silence(kind, root):
    columns = {name: [int(label == name) for label in LABELS] for name in ("cat", "dog")}
    file = write(pd.DataFrame({"file_name": NAMES, "site": list("xxyyxxyy"), **columns}), root / kind)
    with pytest.raises(TinyTLError, match=r"cat, dog are a column for each class.*, as --data.label_column site"):
        opened(file)
    assert opened(file, label_column="site").found.classes == ["x", "y"]
    parts = {"is_train": [1, 0] * 4, "is_test": [0, 1] * 4}
    file = write(pd.DataFrame({"file_name": NAMES, "site": list("xxyyxxyy"), **parts}), root / f"parts-{kind}")
    if kind != "x.csv":  # where 0 and 1 are texts, and may be labels
        assert opened(file).found.classes == ["x", "y"]


@pytest.mark.parametrize(
    ("column", "labels", "said"),
    [
        ("tags", ["haze primary", "clear primary", "clear primary water", "cloudy"], "clear primary"),
        ("labels", ["scab", "scab rust complex", "rust", "complex"], "scab rust complex"),
        ("Finding Labels", ["Edema", "Edema|Mass", "Mass", "Mass"], r"Edema\|Mass"),
        ("attributes", ["red, round", "red, square", "blue, round", "blue, square"], "blue, round"),
    ],
)
@pytest.mark.parametrize("kind", ["x.csv", "x.parquet", "metadata.csv"])
@pytest.mark.parametrize("times", [2, 8])
def test_texts_of_several_classes_are_called_so(column, labels, said, kind, times, root):
    for number in range(8, 4 * times):
        write_image(root / f"{number}.png", size=(8, 8), seed=number)
    names = [f"{number}.png" for number in range(4 * times)]
    write(pd.DataFrame({"file_name": names, column: labels * times}), root / kind)
    dataset = root if kind == "metadata.csv" else root / kind
    with pytest.raises(
        TinyTLError, match=rf"{column} has several classes in a row \('{said}'\), and an image has one"
    ):
        opened(dataset)
    assert set(opened(dataset, label_column=column).found.classes) == set(labels)


@pytest.mark.parametrize(
    ("column", "labels"),
    [
        ("labels", ["polar bear", "brown bear"]),
        ("categories", ["bear", "polar bear"]),
        ("tags", ["red", "blue"]),
        ("tags", ["great dane", "labrador"]),
        ("breed", ["hot", "dog", "hot dog", "dog"]),
    ],
)
def test_classes_of_several_words_are_classes(column, labels, root):
    write(pd.DataFrame({"file_name": NAMES, column: (labels * 4)[:8]}), root / "x.csv")
    assert set(opened(root / "x.csv").found.classes) == set(labels)


@pytest.mark.parametrize("kind", ["x.parquet", "x.jsonl", "metadata.jsonl"])
def test_a_column_of_lists_of_classes_is_called_so(kind, root):
    write(pd.DataFrame({"file_name": NAMES, "labels": [["cat"], ["cat", "dog"]] * 4}), root / kind)
    with pytest.raises(TinyTLError, match=r"data.label_column: labels holds lists, and an image has one class here"):
        opened(root if kind == "metadata.jsonl" else root / kind)


@pytest.mark.parametrize("kind", [pa.string_view(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_texts_are_texts_however_arrow_keeps_them(kind, root):
    columns = {"image": pa.array(NAMES).cast(kind), "label": pa.array(LABELS).cast(kind)}
    pq.write_table(pa.table(columns), root / "x.parquet")
    assert opened(root / "x.parquet").found.classes == ["cat", "dog"]


def test_labels_of_bytes_are_told_how_to_become_texts(root):
    df = frame([b"cat", b"dog"] * 4)
    df.to_parquet(root / "x.parquet")
    with pytest.raises(TinyTLError, match="it holds binary, and a class is a text") as error:
        opened(root / "x.parquet")
    df["label"] = eval(re.search(r"df\[.*\)", str(error.value))[0], {"df": df})
    df.to_parquet(root / "x.parquet")
    assert opened(root / "x.parquet").found.classes == ["cat", "dog"]


def test_classes_that_marks_without_a_picture_tell_apart_are_said(root, caplog):
    write(frame(["cat", "dog", "cat\u200b", "\ufeffdog"] * 2), root / "x.parquet")
    opened(root / "x.parquet", eval_fraction=0.5)
    assert "'cat', 'cat\\u200b' are classes of their own, though only capitals, spaces or zeros" in caplog.text
    assert "'dog', '\\ufeffdog' are classes of their own" in caplog.text


@pytest.mark.parametrize("suffix", [".xlsx", ".XLS", ".ods"])
def test_a_sheet_is_told_to_be_saved_as_csv(suffix, root):
    (root / f"labels{suffix}").write_bytes(b"PK")
    with pytest.raises(TinyTLError, match=r"save it as a .csv file, and name that"):
        opened(root / f"labels{suffix}")


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
@pytest.mark.parametrize(("name", "values"), [("width", [8, 16]), ("sold", [True, False])])
def test_numbers_and_truths_are_no_classes_unless_their_column_is_called_so(name, values, kind, tmp_path):
    paths = [str(write_image(tmp_path / f"{number}.png", size=(8, 8), seed=number)) for number in range(24)]
    table = pd.DataFrame({"image": paths, name: values * 12, "number": range(24)})
    file = tmp_path / f"x.{kind}"
    write = {
        "csv": lambda table: table.to_csv(file, index=False),
        "parquet": lambda table: table.to_parquet(file),
        "jsonl": lambda table: table.to_json(file, orient="records", lines=True),
    }[kind]
    write(table)
    fix = f"if the numbers or truths of {name} are classes, name the column, as --data.label_column {name}"
    with pytest.raises(TinyTLError, match=f"data.label_column: no column of image, {name}, number fits.*; {fix}"):
        opened(file)
    assert opened(file, label_column=name).found.classes == [str(value) for value in sorted(values)]
    write(table.assign(kind=["cat", "dog"] * 12))
    assert opened(file).found.classes == ["cat", "dog"]


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
@pytest.mark.parametrize("name", ["class", "class_id", "Target", "y"])
def test_numbers_called_classes_are_asked_about_beside_texts_of_another_name(name, kind, tmp_path):
    def write(**columns):
        table, file = pd.DataFrame({"image": paths, name: [0, 1] * 12, **columns}), tmp_path / f"x.{kind}"
        options = {"csv": {"index": False}, "jsonl": {"orient": "records", "lines": True}}.get(kind, {})
        getattr(table, "to_json" if kind == "jsonl" else f"to_{kind}")(file, **options)
        return file

    paths = [f"{number}.png" for number in range(24)]
    for number, path in enumerate(paths):
        write_image(tmp_path / path, size=(8, 8), seed=number)
    cameras = ["a", "b", "b", "a"] * 6
    with pytest.raises(TinyTLError, match=f"data.label_column: camera, {name} all fit; name one"):
        opened(write(camera=cameras))
    with pytest.raises(TinyTLError, match=f"data.label_column: camera, {name} all fit; name one"):
        opened(write(camera=cameras, **{name: [True, False] * 12}))
    assert opened(write(camera=cameras), label_column=name).found.classes == ["0", "1"]
    assert opened(write(animal=["cat", "dog"] * 12)).found.classes == ["cat", "dog"]  # the names of those numbers
    assert opened(write(species=cameras)).found.classes == ["a", "b"]
