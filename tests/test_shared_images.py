"""Processes of one machine decode each image once, and have it in memory once."""

import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from shared import write_image
from started_runs import CONTEXT, free_port

from tinytl_hf.config.data import DataConfig
from tinytl_hf.data import batches, shared
from tinytl_hf.data.sets import open_data
from tinytl_hf.errors import TinyTLError


def read(rank, port, machines, config, folder):
    """As process ``rank`` of two: read the training images, and note what came out."""
    local = {"LOCAL_RANK": rank // machines, "LOCAL_WORLD_SIZE": 2 // machines}
    values = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **local}
    os.environ.update({key: str(value) for key, value in values.items()}, ACCELERATE_USE_CPU="1")
    tempfile.tempdir = str(folder / "temporary")
    PartialState(cpu=True)
    split, _ = open_data(config)[:2]
    decoded, decode = [], batches.decode
    batches.survey(split, config, 32)
    batches.survey = lambda *_: batches.Survey(0, (1, 1))  # a sample that all decode to see whether it fits
    batches.decode = lambda encoded, size: decoded.append(encoded["path"]) or decode(encoded, size)
    try:
        images = batches.read_images(split, config, 32)
        kept = [image.clone() for image in images.images]
        maps = Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else None
        torch.save((decoded, kept, images.labels, maps), folder / f"{rank}.pt")
    except TinyTLError as error:
        torch.save(str(error), folder / f"{rank}.pt")
    dist.destroy_process_group()


def read_by_two(config, folder, machines=1):
    (folder / "temporary").mkdir()
    port = free_port()
    processes = [CONTEXT.Process(target=read, args=(rank, port, machines, config, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert list((folder / "temporary").iterdir()) == []
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("size", [None, (40, 36)])
def test_each_image_is_decoded_by_one_process_and_mapped_by_both(size, tmp_path):
    for i in range(11):
        write_image(tmp_path / "data" / "train" / "ab"[i % 2] / f"{i}.png", size=size or (40 + i, 36), seed=i)
    (tmp_path / "data" / "train" / "a" / "4.png").write_bytes(b"damaged")
    config = DataConfig(dataset=str(tmp_path / "data"), eval_fraction=0.2, skip_corrupt=True)
    alone = batches.read_images(open_data(config)[:2][0], config, 32)
    (ours, first, labels, maps), (theirs, second, other_labels, _) = read_by_two(config, tmp_path)
    assert len(ours) + len(theirs) == len(set(ours + theirs)) in (8, 9) and abs(len(ours) - len(theirs)) <= 1
    assert len(first) == len(alone) and torch.equal(labels, alone.labels) and torch.equal(other_labels, alone.labels)
    for image, one, two in zip(alone.images, first, second, strict=True):
        assert torch.equal(one, image) and torch.equal(two, image)
    assert maps is None or maps.count("tinytl-images") == 2


def test_a_machine_of_its_own_decodes_all(colour_folder, tmp_path):
    (ours, *_), (theirs, *_) = read_by_two(DataConfig(dataset=str(colour_folder)), tmp_path, machines=2)
    assert len(ours) == 24 and ours == theirs


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_named_with_what_to_do():
    with Path("/dev/full").open("wb", buffering=0) as full:
        shapes, error = shared._write(full, [None, torch.zeros(3, 4, 4, dtype=torch.uint8)])
    assert shapes == [None, (3, 4, 4)] and "No space left" in str(error) and "TMPDIR" in str(error)


def test_an_image_that_one_process_cannot_read_is_an_error_of_all(tmp_path):
    for i in range(80):
        write_image(tmp_path / "data" / "train" / "ab"[i % 2] / f"{i:02}.png", size=(8, 8), seed=i)
        write_image(tmp_path / "data" / "test" / "ab"[i % 2] / f"{i:02}.png", size=(8, 8), seed=i)
    (tmp_path / "data" / "train" / "a" / "74.png").write_bytes(b"damaged")
    ours, theirs = read_by_two(DataConfig(dataset=str(tmp_path / "data")), tmp_path)
    assert ours == theirs and "74.png of split train cannot be read" in ours


def test_a_temporary_folder_that_is_not_there_is_named_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(TinyTLError, match=r"written to .*/gone \(\[Errno 2\] No such file.*name a folder with more"):
        shared.decode_in_shares(1, lambda index: [])


def test_where_python_finds_no_temporary_folder_at_all_it_says_so(monkeypatch):
    def find_none(**_: str) -> None:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "mkstemp", find_none)
    with pytest.raises(TinyTLError, match=r"written to a temporary folder \(No usable temporary directory found"):
        shared.decode_in_shares(1, lambda index: [])
