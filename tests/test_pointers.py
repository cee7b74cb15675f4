"""Pointers of Git LFS and web pages in place of tables, on this disk and at addresses: called what they are."""

import json
import tarfile

import datasets
import pandas as pd
import pytest
from shared import write_image
from test_tables import opened, png

from tinytl_hf import TinyTLError
from tinytl_hf.data.pointers import check_start

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
PAGE = "\n<!DOCTYPE html>\n<html><body>Sign in, please</body></html>\n"
KINDS = ["parquet", "csv", "tsv", "json", "jsonl", "arrow", "tar"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("query", ["", "?download=true"])
def test_an_address_that_serves_a_pointer_or_a_page_is_told_so(kind, query, file_server, tmp_path):
    url = f"{file_server(tmp_path)}/x.{kind}{query}"
    for text, said in (
        (POINTER, "is not the file, but a pointer to it; clone the repository, download the file with git lfs pull"),
        (PAGE, "is a web page, not the file; download the file itself"),
    ):
        (tmp_path / f"x.{kind}").write_text(text)
        with pytest.raises(TinyTLError) as error:
            opened(url)
        assert str(error.value).startswith(f"{url}: {said}")
        with pytest.raises(TinyTLError) as error:
            opened(tmp_path / f"x.{kind}")
        assert str(error.value).startswith(f"{tmp_path}/x.{kind}: {said.split(';')[0]}")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_metadata_that_is_a_pointer_is_called_so(suffix, tmp_path):
    write_image(tmp_path / "0.png")
    (tmp_path / f"metadata.{suffix}").write_text(POINTER)
    with pytest.raises(TinyTLError, match=rf"metadata.{suffix}: is not the file, but a pointer to it; git lfs pull"):
        opened(tmp_path)


def test_saved_and_configured_data_that_are_pointers_are_called_so(tmp_path):
    columns = {"image": [png(number) for number in range(8)], "label": ["cat", "dog"] * 4}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.write_text(POINTER)
    with pytest.raises(TinyTLError, match=rf"{arrow}: is not the file, but a pointer to it"):
        opened(tmp_path / "saved")
    config = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train-*\n---\n"
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "README.md").write_text(config)
    (tmp_path / "hub" / "train-0.parquet").write_text(POINTER)
    with pytest.raises(TinyTLError, match=r"hub/train-0.parquet: is not the file, but a pointer to it"):
        opened(tmp_path / "hub")


def test_of_a_file_on_github_the_address_of_its_content_is_given():
    url = "https://raw.githubusercontent.com/ann/photos/main/data/train.parquet"
    with pytest.raises(
        TinyTLError, match=r"is at https://media.githubusercontent.com/media/ann/photos/main/data/train"
    ):
        check_start(POINTER.encode(), url)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_damaged_table_at_an_address_is_called_by_that(kind, file_server, tmp_path):
    (tmp_path / f"x.{kind}").write_bytes(b"junk, and no table")
    url = f"{file_server(tmp_path)}/x.{kind}"
    with pytest.raises(TinyTLError) as error:
        opened(url)
    assert url in str(error.value) and "huggingface/datasets" not in str(error.value)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "tar"])
def test_tables_at_an_address_are_read_as_on_this_disk(kind, file_server, tmp_path):
    columns = {"image": [png(number) for number in range(8)], "label": ["cat", "dog"] * 4}
    if kind == "parquet":
        pd.DataFrame(columns).to_parquet(tmp_path / "x.parquet")
    elif kind == "arrow":
        features = datasets.Features(image=datasets.Image(), label=datasets.Value("string"))
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
        next((tmp_path / "saved").glob("*.arrow")).rename(tmp_path / "x.arrow")
    else:
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for number in range(8):
                for suffix, content in (("png", png(number)), ("cls", str(number % 2).encode())):
                    file = tmp_path / f"{number}.{suffix}"
                    file.write_bytes(content)
                    tar.add(file, arcname=file.name)
    here, there = opened(tmp_path / f"x.{kind}"), opened(f"{file_server(tmp_path)}/x.{kind}")
    assert here.found.to_json() == there.found.to_json() and here.train.label_names == there.train.label_names
    assert json.dumps(there.found.to_json()["images"]) == '{"train": 8}'
