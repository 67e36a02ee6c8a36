# Two commands do everything: `make demo` and `make test`. Each installs what it needs first, in the versions of constraints.txt.
# `make test-long` runs what takes long: simulations, whole training runs, three ranks and more.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
PIP := $(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS)
# What the demo needs; and with that what tests, linting, types, docs and benchmarks need.
DEMO := $(VENV)/.installed-demo
ALL := $(VENV)/.installed-all

.PHONY: demo test test-long lint types docs benchmarks clean

$(DEMO): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "entropy-probe needs Python 3.11 or newer, found " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) hatchling editables
	$(PIP) --no-build-isolation torch --editable .
	touch $@

$(ALL): $(DEMO)
	$(PIP) --no-build-isolation --editable '.[lora,trl,dev]'
	touch $@

demo: $(DEMO)
	$(BIN)/entropy-probe demo

test: $(ALL)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not long"

test-long: $(ALL)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m long

lint: $(ALL)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(ALL)
	$(BIN)/mypy

# What is made from the source: pages of public names, the picture of the rooms, README's pictures.
docs: $(ALL)
	$(BIN)/python docs/api_pages.py
	$(BIN)/python docs/rooms.py
	$(BIN)/python docs/pictures.py

# Beside a training step, in some minutes; the other scripts of benchmarks/ say themselves how long they take.
benchmarks: $(ALL)
	$(BIN)/python benchmarks/probe_cost.py --quick

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
