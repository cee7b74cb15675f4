"""Frames of a video, or pictures of one person, on both sides of a split: told by the names."""

import pytest
from test_beside import folders
from test_tables import opened

CLASSES = ("cat", "dog")
FRAMES = [f"{{}}/{series:05d}_{frame:05d}.png" for series in range(5) for frame in range(6)]  # as GTSRB has them


def places(*names):
    return [name.format(label) for label in CLASSES for name in names]


@pytest.mark.parametrize(
    "names",
    [
        FRAMES,
        [f"{{}}/person{person}_front_{number}.png" for person in range(8) for number in range(1, 4)],
        [f"{{}}/clip{clip}/{frame:04d}.png" for clip in range(4) for frame in range(0, 60, 10)],
        [f"{{}}/clip{clip}/frame{frame}_png.rf.{clip}a{frame}b.png" for clip in range(4) for frame in range(6)],
        [name for name in FRAMES if "03." not in name],  # one in six is gone
    ],
)
def test_images_to_evaluate_on_of_series_that_are_trained_on_are_counted(names, tmp_path, caplog):
    folders(tmp_path, places(*names))
    data = opened(tmp_path, eval_fraction=0.25)
    held_out = len(data.evaluation.labels)
    assert (
        f"{held_out} of the {held_out} images of holdout are, by the names, of series that are trained" in caplog.text
    )


def test_series_on_both_sides_of_splits_of_their_own_are_counted(tmp_path, caplog):
    parts = {"train": FRAMES[::2], "val": FRAMES[1::2]}
    folders(tmp_path, [f"{split}/{place}" for split, names in parts.items() for place in places(*names)])
    opened(tmp_path)
    assert "30 of the 30 images of validation are, by the names, of series that are trained on" in caplog.text
    assert f"({tmp_path}/val/cat/00000_00001.png and {tmp_path}/train/cat/00000_0000" in caplog.text


def test_whole_series_in_a_split_are_not_told(tmp_path, caplog):
    parts = {"train": FRAMES[:24], "val": FRAMES[24:]}
    folders(tmp_path, [f"{split}/{place}" for split, names in parts.items() for place in places(*names)])
    opened(tmp_path)
    assert "series" not in caplog.text


@pytest.mark.parametrize(
    "names",
    [
        [f"{{}}/image_{number:04d}.png" for number in range(30)],
        [f"{{}}/{source}_{number}.png" for source in ("bing", "google", "own") for number in range(10)],
        [f"{{}}/{folder}/{number}.png" for folder in ("indoor", "outdoor") for number in range(15)],
        [
            f"{{}}/IMG_2020010{day}_{hour}{(hour * 37 + day * 11) % 60:02d}59.png"
            for day in range(5)
            for hour in (9, 10, 17)
        ],
        [f"{{}}/Albatross_{number:04d}_{number * 7919 % 100_000}.png" for number in range(30)],  # CUB's
        [f"{{}}/{number * 2654435761 % 2**32:08x}.png" for number in range(30)],
        [f"{{}}/{10**25 + number * 7919**3}.png" for number in range(30)],
    ],
)
def test_other_numbers_are_no_series(names, tmp_path, caplog):
    folders(tmp_path, places(*names))
    opened(tmp_path, eval_fraction=0.25)
    assert "series" not in caplog.text
