# Two commands do everything: `make demo` and `make test`. Each installs what it needs first.
# `make test-long` runs what takes long: simulations, whole training runs, three ranks and more.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-long lint types clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "entropy-probe needs Python 3.11 or newer, found " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch --editable '.[lora,trl,dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/entropy-probe demo

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not long"

test-long: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m long

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
