"""Links in a folder of images, and what cannot be read there."""

import os

import pytest
from test_folders import each, make, opened, paths_by_class


def test_links_to_folders_and_files_are_followed_but_not_in_circles(tmp_path):
    make(tmp_path / "elsewhere", each("cat"))
    root = make(tmp_path / "data", each("dog"))
    (root / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    (root / "dog" / "again").symlink_to(root)
    (root / "dog" / "linked.png").symlink_to(tmp_path / "elsewhere" / "cat" / "0.png")
    train, held_out = opened(root)[:2]
    assert {k: len(v) for k, v in paths_by_class(root, train, held_out).items()} == {"cat": 4, "dog": 5}


def test_links_are_classes_and_splits_whatever_their_names_sort_by(tmp_path, caplog):
    root = make(tmp_path, each("seg_train/cat", "seg_train/dog", "seg_test/cat", "seg_test/dog"))
    for split in ("train", "test"):
        (root / split).symlink_to(root / f"seg_{split}")
    train, test, _, found = opened(root)[:4]
    assert train.label_names == ["cat", "dog"] and test.name == "test"
    assert found.left_out == {"beside the splits": 16} and "test, train: a link makes this folder" in caplog.text


def test_links_to_one_another_end(tmp_path):
    root = make(tmp_path, each(*"abcdef"))
    for one in "abcdef":
        for other in "abcdef":
            (root / one / f"to_{other}").symlink_to(root / other)
    found = opened(root).found
    assert len(found.classes) == 6 and found.images["train"] == 6 * (4 + 5 * 4)


def test_a_link_that_leads_nowhere_is_counted(tmp_path):
    root = make(tmp_path, each("cat", "dog"))
    (root / "loop").symlink_to(root / "loop")
    (root / "emu").symlink_to(tmp_path / "not mounted")
    (root / "cat" / "loop.png").symlink_to(root / "cat" / "loop.png")
    assert opened(root).found.left_out == {"broken link": 3}


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser reads every folder")
def test_a_folder_that_cannot_be_read_is_counted(tmp_path):
    root = make(tmp_path, each("cat", "dog", "lost"))
    (root / "lost").chmod(0)
    try:
        assert opened(root).found.left_out == {"folder that cannot be read": 1}
    finally:
        (root / "lost").chmod(0o700)
