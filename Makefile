# The only things needed are make and a Python of 3.10 or newer; choose another one with `make PYTHON=python3.12 …`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Fails on a link or an anchor that leads nowhere, a page without a place, and a public name without a docstring.
SITE = $(BIN)/python -m docsite.names && NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

.PHONY: help demo bench docs test test-versions test-upstream check clean

help:
	@echo "make demo    a real Celery worker runs a few thousand real jobs from an embedded SQL table"
	@echo "make bench   measure the brokers that can be reached, half an hour; OPTIONS=--small to see that it runs"
	@echo "make test    the test suite; brings its own PostgreSQL"
	@echo "make test-versions   tests with real workers on the lowest Celery, on the oldest and the newest Python found"
	@echo "make test-upstream   Celery's and kombu's own tests on Redis, SQLite and PostgreSQL, hours; see tests/upstream.py"
	@echo "make docs    the documentation as a site in the folder site/, with search and the reference; works offline"
	@echo "make check   ruff, mypy --strict, layer contracts, links of the documentation, docstrings of public names"
	@echo "make clean   remove the virtual environment and the caches"

demo: $(VENV)/.installed
	@$(BIN)/python -B examples/demo/run.py

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks $(OPTIONS)

docs: $(VENV)/.installed-docs
	@$(SITE)
	@echo "Open site/index.html."

test: $(VENV)/.installed-dev
	@$(BIN)/python -m tests.support.browsers
	$(BIN)/python -m pytest -n 3 --dist loadgroup

test-versions:
	@$(PYTHON) -B -m tests.versions $(OPTIONS)

test-upstream: $(VENV)/.installed-dev
	@$(BIN)/python -B -m tests.upstream $(OPTIONS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict kathikon_celery
	$(BIN)/lint-imports
	$(SITE)

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "kathikon-celery needs Python 3.10 or newer, '$(PYTHON)' is not: say which one, as in make PYTHON=python3.12" >&2; exit 1; }
	@echo "Building the environment in $(VENV), once ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Adding what tests and checks need ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	@echo "Adding what the site needs ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

clean:
	rm -rf site $(VENV) .venv-lowest-* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist *.egg-info
