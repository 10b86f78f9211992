# Every target sets up its own environment first; nothing has to be prepared.
#   make test VENV=/some/where      use (or create) that environment instead of .venv
#   make test PYTEST_ARGS='-k wire' pass arguments to pytest
#   make explore EXPLORE_SECONDS=60 explore for another time than 5 minutes
VENV ?= .venv
PYTEST_ARGS ?=
EXPLORE_SECONDS ?= 300
PIP_ARGS ?=
DEMO_ARGS ?=

PY = $(abspath $(VENV))/bin/python
FIND_PYTHON = \
	for python in $${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11 python; do \
	  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && break; \
	  python=; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "flower_mcepl needs Python 3.11 or newer; found: $$(python3 --version 2>&1)." >&2; \
	  echo "Install one, or name it: make $(or $(firstword $(MAKECMDGOALS)),test) PYTHON=/path/to/python3.11" >&2; \
	  exit 1; \
	fi

.PHONY: help setup demo test test-slow lint types version check docs build clean explore lowest types-elsewhere
.DEFAULT_GOAL := help
export PYTHON

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

# The stamp holds what the installation depends on: the package metadata and the place of this checkout.
setup: ## create the environment and install everything into it, unless that is done
	@set -e; stamp="$(abspath $(VENV))/.flower_mcepl"; now=$$( (cat pyproject.toml; pwd -P) | cksum); \
	if [ -x "$(PY)" ] && [ "$$(cat "$$stamp" 2>/dev/null)" = "$$now" ]; then exit 0; fi; \
	if ! [ -x "$(PY)" ]; then \
	  $(FIND_PYTHON); \
	  "$$python" -m venv "$(abspath $(VENV))" || { \
	    rm -f "$(PY)"; echo "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; \
	fi; \
	"$(PY)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "flower_mcepl needs Python 3.11 or newer; $(VENV) has an older one: remove it, or name another VENV." >&2; \
	  exit 1; }; \
	echo "Installing flower_mcepl and what it needs into $(VENV) (minutes, the first time) ..."; \
	"$(PY)" -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e '.[all,dev]'; \
	echo "$$now" > "$$stamp"

demo: setup ## run the quickstart for real; results go under runs/
	"$(PY)" -m flower_mcepl.launch examples/quickstart $(DEMO_ARGS)

test: setup ## run the fast tests, on all cores; the same examples every time
	"$(PY)" -m pytest -n auto $(PYTEST_ARGS)

test-slow: setup ## run the tests that train for long, start Flower, or play long in other processes
	"$(PY)" -m pytest -m slow $(PYTEST_ARGS)

explore: setup ## search for new examples that break a property, for EXPLORE_SECONDS
	"$(PY)" -m tests.explore --seconds $(EXPLORE_SECONDS) -n auto $(PYTEST_ARGS)

lowest: setup ## run quickstart and fast tests with the oldest versions allowed
	VENV="$(abspath $(VENV))" .ci/lowest

lint: setup ## check style and formatting
	"$(PY)" -m ruff check .
	"$(PY)" -m ruff format --check .

types: setup ## check types
	"$(PY)" -m mypy

types-elsewhere: setup ## check types as Windows and macOS see them
	"$(PY)" -m mypy --platform win32
	"$(PY)" -m mypy --platform darwin

version: setup ## check that the newest entry of CHANGELOG.md is the version of the package
	@"$(PY)" -c "import re, sys, tomllib; \
	version = tomllib.load(open('pyproject.toml', 'rb'))['project']['version']; \
	entry = re.search(r'^## \[(\d[^\]]*)\]', open('CHANGELOG.md').read(), re.M); \
	top = entry.group(1) if entry else 'nothing'; \
	sys.exit(None if top == version else f'pyproject.toml says {version}, the top of CHANGELOG.md {top}')"

check: lint types version test ## all of the above that is fast: run it before you push

docs: setup ## build the site into build/docs/index.html; a warning is an error
	@"$(PY)" -c 'import furo, myst_parser, sphinx' 2>/dev/null || \
	  "$(PY)" -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	"$(PY)" -m sphinx -q -W --keep-going -b html -c docs -d build/doctrees . build/docs
	@echo "Open build/docs/index.html"

build: setup ## make the wheel and the source distribution in dist/
	"$(PY)" -m pip install --quiet --disable-pip-version-check build
	"$(PY)" -m build

clean: ## remove what building and testing leave behind (not the environment, not runs/)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find flower_mcepl tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
