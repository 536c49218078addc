# `make demo` and `make test` need git, make and Python 3.11 or newer, nothing else:
# the first of them makes `.venv` and installs there.

PYTHON ?= python3
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# One thread a process: the tests are many small ones, run side by side.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

.PHONY: demo test test-slow test-parity lint format clean

demo: $(INSTALLED)
	$(BIN)/python tools/demo.py

test: $(INSTALLED)
	$(PYTEST)

test-slow: $(INSTALLED)
	$(PYTEST) -m slow

# Needs MMB_REFERENCE_DIR, a folder with the original repositories.
test-parity: $(INSTALLED)
	$(PYTEST) -m parity -rs

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) *.egg-info

$(INSTALLED): setup.py requirements/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo 'Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=/path/to/it'; exit 1; }
	@echo 'Installing into $(VENV), once (a minute or two) ...'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check \
	    -c requirements/constraints.txt -e '.[dev]'
	@touch $@
