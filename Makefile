# make install     a virtual environment in .venv with everything
# make quickstart  the embedded study, end to end
# make quick       the tests but for the slow ones, in under a minute on two cores
# make test        the whole test suite
# make docs        the site, in site/, with warnings as errors
# make wheel       a wheel in dist/, installed into a clean environment, a small study run from there
# make cover       the tests, with the lines and branches that they reach
# make check       what CI runs: format, lint, types, docs, wheel, tests
# make release     the same, and the whole embedded study
PYTHON ?= python3
BIN := .venv/bin

SELDOM := '/(tests?|rllib|serve|llm|sklearn|nltk|chardet|databricks|debugpy|playwright|pip|lexers)/|transformers/models/|lm_eval/tasks/'

.PHONY: install quickstart quick test lint docs wheel cover check release clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt "$$(grep '^torch' constraints.txt)" -e '.[dev]'
	# on all cores, where pip uses one; without what is seldom imported; some packages have templates that are no Python
	$(BIN)/python -m compileall -qq -j 0 -x $(SELDOM) .venv/lib || true
	touch $@

quickstart: install
	$(BIN)/stillroom run quickstart

quick: install
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

# more processes than cores: half of the time, a slow test waits; the longest files first (tests/own_time.py)
test: install
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff format --check src tests benchmarks tools
	$(BIN)/ruff check src tests benchmarks tools
	$(BIN)/mypy

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# every stage of the embedded study, with two trials of an epoch; `make release` runs it whole
SMOKE := --set 'groups=[task_only, combined]' --set 'sweep.seeds=[0]' --set training.epochs=1 --set training.warmup_steps=0 \
	--set teacher.fine_tune.training.epochs=1 --set signals.minimum_coverage=0 --set evaluation.max_new_tokens=8 \
	$(foreach task,sentiment quiz arithmetic,--set corpus.tasks.$(task).examples=60 \
		--set evaluation.test_splits.$(task).examples=20)

# The clean environment sees the packages of .venv by path, so that torch is not fetched twice; pip still refuses a
# declared dependency that is not there, and the package itself can only come from the wheel.
wheel: install
	rm -rf build dist
	$(BIN)/python -m build --quiet --wheel
	$(PYTHON) -m venv --without-pip build/clean
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$(build/clean/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/dependencies.pth"
	$(BIN)/python -m pip --python build/clean/bin/python install --quiet --no-index --force-reinstall --no-deps dist/*.whl
	$(BIN)/python -m pip --python build/clean/bin/python check
	# on a terminal, as who installs it runs it
	cd build && TERM=xterm script -qec "stty cols 80; clean/bin/stillroom run quickstart $(SMOKE)" /dev/null

cover: install
	$(BIN)/python -m pytest --cov --cov-report=term

check: test lint docs wheel

release: check quickstart

clean:
	rm -rf results offline_teacher_data* build dist site
