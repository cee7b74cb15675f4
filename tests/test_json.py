"""JSON files as people and their programs write them: rows of any values, and what is said where they are none."""

import json

import pytest
from shared import write_image
from test_tables import opened

from tinytl_hf import TinyTLError

LABELS = ["cat", "dog"] * 4


@pytest.fixture
def root(tmp_path):
    for number in range(8):
        write_image(tmp_path / f"{number}.png", size=(8, 8), seed=number)
    return tmp_path


def lines(**columns):
    return [
        json.dumps(
            {"file_name": f"{number}.png", "label": LABELS[number], **{key: columns[key][number] for key in columns}}
        )
        for number in range(8)
    ]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
@pytest.mark.parametrize("at_url", [False, True])
def test_a_file_that_is_not_utf_8_is_told_so(at_url, name, encoding, root, file_server):
    text = "\n".join(lines()).replace("cat", "café")
    (root / name).write_text(text if name == "x.jsonl" else f"[{','.join(text.splitlines())}]", encoding=encoding)
    place = f"{file_server(root)}/{name}" if at_url else str(root / name)
    with pytest.raises(TinyTLError, match=rf"^{place}: is not in UTF-8 \(.*\); save it as JSON in UTF-8$"):
        opened(place)


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ('{"file_name": "7.png", "la', r"line 8: Unterminated string starting at"),
        ('{"file_name": "7.png", "label": "cat", "label": "dog"}', r"line 8: it has label twice"),
        ("{'file_name': '7.png', 'label': 'dog'}", r"line 8: Expecting property name"),
    ],
)
def test_a_line_that_is_no_row_is_named(last, said, root):
    (root / "metadata.jsonl").write_text("\n".join([*lines()[:7], last]))
    with pytest.raises(TinyTLError, match=rf"metadata.jsonl: cannot be loaded \({said}"):
        opened(root)
    (root / "metadata.jsonl").unlink()
    (root / "train-0.jsonl").write_text("\n".join(lines()))
    (root / "train-1.jsonl").write_text("\n".join([*lines()[:7], last]))
    with pytest.raises(TinyTLError, match=rf"train-1.jsonl: cannot be loaded \({said}"):
        opened(root / "*.jsonl")


@pytest.mark.parametrize("name", ["x.jsonl", "metadata.jsonl", "x.csv"])
def test_texts_that_look_like_dates_are_classes(name, root):
    days = ["2020-01-01", "2021-01-01"] * 4
    text = [json.dumps({"file_name": f"{number}.png", "label": day}) for number, day in enumerate(days)]
    text = (
        text if name != "x.csv" else ["file_name,label", *(f"{number}.png,{day}" for number, day in enumerate(days))]
    )
    (root / name).write_text("\n".join(text))
    assert opened(root if name == "metadata.jsonl" else root / name).found.classes == days[:2]


def test_values_that_change_their_kind_far_into_a_file_are_read_and_named(root):
    """The library datasets reads 10 MB at a time; in later ones it put texts beside numbers into quotes."""
    rows = [
        {"file_name": f"{n % 8}.png", "label": LABELS[n % 8], "width": 640, "note": "x" * 6_000} for n in range(2_000)
    ]
    rows[-1]["width"] = "640"
    file = root / "x.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert file.stat().st_size > 11e6
    assert opened(file).found.images == {"train": 2_000}
    rows[-1]["label"] = 5
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(TinyTLError, match=r'texts and numbers \("cat" in row 0 of split train, 5 in row 1999'):
        opened(file)


@pytest.mark.parametrize("name", ["x.jsonl", "metadata.jsonl"])
@pytest.mark.parametrize("value", [2**70, "\ud800", {}, [], [[1], "a"]])
def test_values_that_no_table_takes_change_nothing_beside_the_labels(value, name, root):
    (root / name).write_text("\n".join(lines(other=[value] * 8)))
    assert opened(root if name == "metadata.jsonl" else root / name).found.classes == ["cat", "dog"]
