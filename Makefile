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

.PHONY: environment demo test test-optimum test-browser bench figures lint aot-full aot-table digests models clean

demo: $(INSTALLED)
	$(BIN)/fastattn demo $(ARGS)

environment: $(INSTALLED)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(ARGS)

bench: $(INSTALLED)
	$(BIN)/python -m pytest benchmarks/ --benchmark-only $(ARGS)

# The README's figures, docs/figures.md and the plots, from benchmarks/results: make figures ARGS=--check
figures: $(INSTALLED)
	$(BIN)/python benchmarks/figures.py $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Kernels compiled ahead of time on every Triton that is supported, against the committed table (`aot-full`) or into
# it (`aot-table`, after a kernel was changed on purpose). No GPU is needed; minutes. The other Tritons go into folders
# of their own, first on PYTHONPATH.
TRITONS := 3.6.0 3.7.1 3.9.0
AOT_FOLDERS := $(TRITONS:%=.venv-triton/%)

aot-full: AOT := --check
aot-table: AOT := --table
aot-full aot-table: $(INSTALLED) $(AOT_FOLDERS)
	@failed=; for folder in $(AOT_FOLDERS); do \
	    PYTHONPATH=$$folder:kernels $(BIN)/python -m fastattn_kernels.aot $(AOT) --jobs 2 $(ARGS) || failed=1; \
	done; test -z "$$failed"

$(AOT_FOLDERS): .venv-triton/%: | $(INSTALLED)
	$(PIP) install --quiet --no-deps --target $@ triton==$*

# Every supported transformers in a folder of its own, first on PYTHONPATH. `digests` records the methods our layers
# replace as each version has them, and each torch's, after a change in them was read (fastattn/models/drift.py);
# `models` runs the test of all families with the oldest and the newest and renews docs/models.md.
TRANSFORMERS := 5.17.0 5.18.0 5.19.0 5.20.0 5.20.1 5.20.2 5.21.0 5.21.1 5.22.0 5.22.1 5.22.2 5.23.0
TRANSFORMERS_FOLDERS := $(TRANSFORMERS:%=.venv-transformers/%)
MODELS_TESTED := $(firstword $(TRANSFORMERS)) $(lastword $(TRANSFORMERS))

TORCHES := 2.11.0 2.12.0 2.12.1 2.13.0 2.14.0 2.14.1 2.15.0
TORCH_FOLDERS := $(TORCHES:%=.venv-torch/%)

digests: $(INSTALLED) $(TRANSFORMERS_FOLDERS) $(TORCH_FOLDERS)
	rm -f fastattn/models/digests.json
	for folder in $(TRANSFORMERS_FOLDERS); do \
	    PYTHONPATH=$$folder:kernels $(BIN)/python -m fastattn.models.drift --record || exit 1; \
	done
	for folder in $(TORCH_FOLDERS); do $(BIN)/python -m fastattn.models.drift --torch $$folder || exit 1; done

models: $(INSTALLED) $(MODELS_TESTED:%=.venv-transformers/%)
	for version in $(MODELS_TESTED); do \
	    PYTHONPATH=.venv-transformers/$$version:kernels $(BIN)/python -m pytest tests/models/test_families.py -q \
	        --junitxml=.venv-transformers/$$version.xml $(ARGS); \
	done
	$(BIN)/python benchmarks/models_page.py --record $(MODELS_TESTED:%=.venv-transformers/%.xml)

$(TRANSFORMERS_FOLDERS): .venv-transformers/%: | $(INSTALLED)
	$(PIP) install --quiet --no-deps --target $@ transformers==$*

# What fastattn exports, read by others. optimum, sentence-transformers and onnxruntime-genai live in an environment
# of their own, .venv-optimum, without fastattn; transformers.js in headless Chromium, from .venv-browser. .venv makes
# the folders and the answers that are right. SERVING is where they go; Chromium is looked for, or BROWSER_PATH.
SERVING ?= .venv-serving
OPTIMUM := .venv-optimum/.installed
BROWSER := .venv-browser/.installed

test-optimum: $(INSTALLED) $(OPTIMUM)
	rm -rf $(SERVING)/optimum
	$(BIN)/python tests/serving/export_cases.py $(SERVING)/optimum optimum
	PYTHONPATH= .venv-optimum/bin/python tests/serving/optimum_answers.py $(SERVING)/optimum
	PYTHONPATH= .venv-optimum/bin/python tests/serving/genai_answers.py $(SERVING)/optimum

test-browser: $(INSTALLED) $(BROWSER)
	rm -rf $(SERVING)/browser
	$(BIN)/python tests/serving/export_cases.py $(SERVING)/browser browser
	node tests/serving/browser/run.mjs $(SERVING)/browser .venv-browser/node_modules $(SERVING)/screenshots
	@echo "screenshots are in $(SERVING)/screenshots"

$(OPTIMUM): constraints/serve-optimum.txt | $(INSTALLED)
	$(BIN)/python -m venv --clear .venv-optimum
	.venv-optimum/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(BROWSER): tests/serving/browser/package.json
	@for tool in node npm; do command -v $$tool > /dev/null || { \
	    echo "make test-browser needs $$tool: install Node.js 20 or newer (nodejs.org, or your system's packages)" >&2; \
	    exit 1; }; done
	mkdir -p .venv-browser
	cp $< .venv-browser/
	npm install --prefix .venv-browser --ignore-scripts --no-audit --no-fund --no-package-lock
	@touch $@

# Only its Python sources are read: macOS's wheel is the smallest.
$(TORCH_FOLDERS): .venv-torch/%: | $(INSTALLED)
	$(PIP) install --quiet --no-deps --only-binary=:all: --python-version 3.11 --platform macosx_11_0_arm64 \
	    --platform macosx_14_0_arm64 --target $@ torch==$*

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
	rm -rf $(VENV) .venv-triton .venv-transformers .venv-torch .venv-optimum .venv-browser .venv-serving build dist *.egg-info demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
