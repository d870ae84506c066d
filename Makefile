# Two commands for a fresh clone: `make demo` and `make test`. Both set up .venv first, once.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test lint bench build clean

demo: $(VENV)/demo
	$(BIN)/fastrlhf run --output demo --resume

test: $(VENV)/dev
	$(BIN)/python -m pytest

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/dev
	$(BIN)/python -m benchmarks --save

build: $(VENV)/dev
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist *.egg-info fastrlhf/*.so

# torch first and alone, so that the requirement torch>=2.11 is met by it and brings nothing more
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install "$(TORCH)"
	touch $@

$(VENV)/demo $(VENV)/dev: $(VENV)/%: $(VENV)/torch setup.py pyproject.toml $(wildcard csrc/*.h csrc/*/*)
	$(BIN)/python -m pip install -e ".[$*]"
	touch $@
