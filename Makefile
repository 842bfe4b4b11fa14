# make install     a virtual environment in .venv with everything
# make quickstart  the embedded study, end to end
# make test        the whole test suite
# make check       what CI runs: format, lint, types, tests
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install quickstart test lint check clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt "$$(grep '^torch' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

quickstart: install
	$(BIN)/stillroom run quickstart

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy

check: lint test

clean:
	rm -rf results offline_teacher_data*
