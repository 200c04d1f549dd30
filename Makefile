# Every command of the project. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED)  ## make .venv with pipetrain in it

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "pipetrain needs Python 3.11 to 3.13; try: make install PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: install  ## train the default Transformer on two stages for some minutes
	$(BIN)/pipetrain experiment=demo

test: install  ## all tests
	$(BIN)/python -m pytest -n 2 -m 'not dist'
	$(BIN)/python -m pytest -n 2 -m dist

test-quick: install  ## the tests that are quick and start no processes
	$(BIN)/python -m pytest -n 2 -m 'not dist and not slow'

lint: install  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## types
	$(BIN)/mypy

bench: install  ## measure the engine beside others, into bench/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python scripts/bench

.PHONY: help install demo test test-quick lint types bench
