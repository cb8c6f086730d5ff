# `make demo` and `make test` need Python 3.11 to 3.13, git and make; each installs into .venv on first use.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS := constraints/test.txt
INSTALLED := $(VENV)/.fastattn-installed
TORCH := $(shell sed -n 's/^torch==/&/p' $(CONSTRAINTS))

# The interpreter that makes .venv: make demo PYTHON=/usr/local/bin/python3.12
PYTHON ?= python3.11 python3.12 python3.13 python3
# Arguments for the command behind a target: make demo ARGS="--query 'How do I bake bread?'"
ARGS ?=

USABLE := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

.PHONY: demo test bench lint clean

demo: $(INSTALLED)
	$(BIN)/fastattn demo $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(ARGS)

bench: $(INSTALLED)
	$(BIN)/python -m pytest benchmarks/ --benchmark-only $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# torch goes first and alone: resolved together with everything else, pip may settle on the newest torch, whose GPU
# build asks for another triton than the one pinned.
$(INSTALLED): setup.py pyproject.toml $(CONSTRAINTS)
	@test -x $(BIN)/python || { \
	    found=; \
	    for candidate in $(PYTHON); do \
	        if "$$candidate" -c '$(USABLE)' 2>/dev/null; then found="$$candidate"; break; fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo "fastattn needs Python 3.11, 3.12 or 3.13 with its venv module; tried: $(PYTHON)." >&2; \
	        echo "On Debian and Ubuntu that module is in python3-venv. Name another interpreter with PYTHON=..." >&2; \
	        exit 1; \
	    fi; \
	    echo "Making $(VENV) with $$("$$found" --version)"; \
	    "$$found" -m venv $(VENV); }
	$(PIP) install "$(TORCH)" -c $(CONSTRAINTS)
	$(PIP) install -e ".[all]" -c $(CONSTRAINTS)
	@touch $@

# Removes what the targets above made, the environment and the demo's report included.
clean:
	rm -rf $(VENV) build dist *.egg-info demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
