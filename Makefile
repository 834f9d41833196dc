# Two commands matter: `make demo` and `make test`. Both create .venv and install into it first.
#   PYTHON=/path/to/python3.11   the interpreter of .venv, 3.11 or newer (found automatically on PATH)
#   TORCH_INDEX=URL              where to take torch from instead, e.g. the CPU-only builds:
#                                make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   ARGS="-k fedmd"              passed on to the demo or to pytest
#   PIP_CONSTRAINT=.ci/constraints.txt   (pip's own) the locked versions, as CI installs them

VENV := .venv
BIN := $(VENV)/bin
PYTHON = $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-slow check format install lock clean

help:
	@echo "make demo    install, then distil centrally and in a federation on the same images"
	@echo "make test    install, then run the test suite without the slow tests"
	@echo "make test-slow    tests that take minutes: every case of the fuzzer, a deployment, Ray broken on purpose"
	@echo "make check   lint, format, types, layers, dependencies: what CI checks besides the tests"
	@echo "make format  fix what lint and format can fix automatically"
	@echo "make lock    write the versions that are in .venv to .ci/constraints.txt, for CI"
	@echo "make clean   remove .venv and all caches (runs/ and data/ stay)"

demo: $(VENV)/.installed
	$(BIN)/python simulations/quickstart.py $(ARGS)

test: install
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-slow: install
	$(BIN)/python -m pytest -m slow $(ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.installed-dev

# Packages that each build of torch pins itself stay out of the lock: see its head.
lock: | $(VENV)/.installed-dev
	$(BIN)/python -m pip freeze --exclude-editable > $(VENV)/freeze
	grep '^#' .ci/constraints.txt > $(VENV)/lock
	grep -Ev '^(nvidia|cuda|triton)' $(VENV)/freeze | sed 's/+[^ ]*$$//' >> $(VENV)/lock
	mv $(VENV)/lock .ci/constraints.txt
	rm $(VENV)/freeze

# The stamps make an installation happen once, and again when pyproject.toml has changed.
$(VENV)/.installed: pyproject.toml | $(BIN)/pip
	@echo "Installing fedkd and what it needs into $(VENV): once, several minutes."
	@echo "With a CUDA build of torch that is a download of about 3 GB (TORCH_INDEX: see the Makefile)."
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the development tools into $(VENV)."
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@

# pip is installed last into a new environment: if it is there, the environment is complete.
$(BIN)/pip:
	$(if $(PYTHON),,$(error fedkd needs Python 3.11 or newer: none on PATH; set PYTHON=/path/to/python3.11))
	@echo "Creating $(VENV) with $(PYTHON)."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedkd needs Python 3.11 or newer: PYTHON=$(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) .ci/data dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find fedkd strategies simulations tests -name __pycache__ -type d -prune -exec rm -rf {} +
