# Each target does its own set-up: a virtual environment in .venv, made once and again when pyproject.toml changes.
# PYTHON chooses the interpreter (3.11 or newer): make test PYTHON=python3.12

PYTHON ?= $(shell .ci/find-python 3.12 3.13 3.14 3.11)
VENV := .venv
BIN := $(VENV)/bin
OTHER_VENV := .venv-other
AOT_VENV := .venv-aot
OTHER_PYTHON ?= $(shell .ci/find-python --other-than $(BIN)/python 3.11 3.12)
# What fails first where a Python or a JAX differs: starting, the command, and the bundled model from end to end.
SMOKE ?= tests/test_imports.py tests/test_config.py tests/metrics tests/run tests/e2e

.PHONY: demo test test-slow lint test-other-python aot aot-kernels aot-models clean

demo: $(VENV)/installed-serve
	mkdir -p out
	$(BIN)/python -m jaxinfer.run --input examples/prompts.jsonl --output out/demo.jsonl --overwrite

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

# Every layout on eight devices, four processes, kernels simulated with race detection.
test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test-other-python: $(VENV)/installed-test
	@test -n "$(OTHER_PYTHON)" || { echo "error: no Python 3.11 or 3.12 other than $(BIN)/python; set OTHER_PYTHON=..." >&2; exit 2; }
	$(MAKE) --no-print-directory $(OTHER_VENV)/installed-test VENV=$(OTHER_VENV) PYTHON=$(OTHER_PYTHON)
	$(OTHER_VENV)/bin/python -m pytest -n 2 --dist loadfile -m "not slow" $(SMOKE) -p no:cacheprovider

# The TPU and GPU compilers get an environment of their own: where they are installed, every JAX process looks for chips.
# ARGS of `make aot` are both scripts': none, or --quick.
aot: aot-kernels aot-models

aot-kernels aot-models:
	$(MAKE) --no-print-directory $(AOT_VENV)/installed-aot VENV=$(AOT_VENV)
	$(AOT_VENV)/bin/python scripts/$(if $(filter aot-models,$@),aot_models,aot.py) $(ARGS)

$(VENV)/installed-%: pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer here; install one, or set PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and f"error: $(PYTHON) is Python {v}; use 3.11 or newer: make PYTHON=...")'
	@echo "installing into $(VENV) with $$($(PYTHON) --version); the first time takes some minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[$*]'
	@touch $@

clean:
	rm -rf $(VENV) $(OTHER_VENV) $(AOT_VENV) out
