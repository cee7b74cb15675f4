"""The source distribution: all that `make test` takes, for whoever unpacks it."""

import shutil
import subprocess
import sys
import tarfile

import pytest
import torch
from shared import ROOT, pytest_collection_modifyitems

FILES = ("pyproject.toml", "MANIFEST.in", "Makefile", "README.md", "CHANGELOG.md", "LICENSE")
FOLDERS = ("tinytl_hf", "configs", "tests", "model_cards")
MADE = ("__pycache__", "*.so", "*.egg-info")  # by Python and compilers


def test_it_holds_every_file_that_the_tests_take(tmp_path):
    pytest.importorskip("setuptools", "77")
    tree = tmp_path / "tree"
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns(*MADE))
    for file in FILES:
        shutil.copy(ROOT / file, tree / file)
    expected = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=tree, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert expected - held == set() and {"tests/shared.py", "configs/demo.yaml", "model_cards/runs"} <= held


@pytest.mark.parametrize(("mark", "left_out"), [(None, False), ("gpu", not torch.cuda.is_available())])
def test_the_name_of_the_folder_that_it_lies_in_leaves_no_test_out(mark, left_out, request):
    item = pytest.Function.from_parent(request.node.parent, name="test_nothing", callobj=lambda: None)
    item.keywords["gpu"] = True  # as pytest does for each folder above it
    if mark is not None:
        item.add_marker(mark)
    pytest_collection_modifyitems([item])
    assert (item.get_closest_marker("skip") is not None) == left_out
