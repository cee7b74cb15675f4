"""The environment of tests. What they share is in shared.py, which imports torch: it is for those that run tests."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
# Tests are of CPUs, where there is a GPU too, but for those marked `gpu`: `make test-gpu` sets this variable.
if os.environ.get("TINYTL_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Tests run side by side, one on each core: one thread each, and where there are more they do not wait by spinning.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"


@pytest.hookimpl(trylast=True)  # after xdist's
def pytest_configure(config):
    if not config.pluginmanager.has_plugin("dsession"):  # it hands tests to workers, who wait for it
        config.pluginmanager.import_plugin("shared")
