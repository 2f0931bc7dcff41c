# `make demo` and `make test` do everything from a fresh clone; `make help` lists the rest.
# Variables: PYTHON (3.10 or newer), JOBS (tests at a time), ARGS (added to pytest), PIP_EXTRA_INDEX_URL and pip's other own
# variables.
PYTHON ?= python3
JOBS ?= 2
ARGS ?=
TORCH := torch==2.13.0
VENV := .venv
LEG_TESTS := tests/adapters tests/patching
PYTEST := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
# a file's tests go to one process, so that what they share is made once
PARALLEL := -n $(JOBS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo test slow bench lint format legs clean distclean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z][a-z0-9%-]*:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed ## make .venv, pinned by .ci/constraints.txt

demo: setup ## load the embedded model, decompose some of it, ask it questions
	$(VENV)/bin/tl-paramdecomp demo

test: setup ## the tests, without the slow ones and the benchmarks
	$(PYTEST) $(VENV)/bin/python -m pytest $(PARALLEL) $(ARGS)

slow: setup ## the slow tests
	$(PYTEST) $(VENV)/bin/python -m pytest -m "slow and not benchmark" $(ARGS)

bench: setup ## the benchmarks: they print, and assert nothing about time
	$(PYTEST) $(VENV)/bin/python -m pytest -o addopts= -m benchmark -q -s --timeout=0 tests/benchmarks $(ARGS)

lint: setup ## ruff (lint and format) and pyright
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

format: setup ## let ruff fix and format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

legs: leg-tl4 leg-tl2 ## adapters and patching on the other versions of transformer-lens

leg-%: .venv-%/.installed ## one of them: leg-tl4, leg-tl2
	$(PYTEST) .venv-$*/bin/python -m pytest $(LEG_TESTS) $(PARALLEL) $(ARGS)

# torch comes first and by itself, so that a local CPU build (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL) is taken where there is one.
define install
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed; set PYTHON") if sys.version_info < (3, 10) else None'
	test -x $(1)/bin/pip || $(PYTHON) -m venv $(1)
	$(1)/bin/pip install --quiet -c $(2) $(TORCH)
	$(1)/bin/pip install --quiet -c $(2) -e '.[$(3)]'
	@touch $(1)/.installed
endef

$(VENV)/.installed: pyproject.toml .ci/constraints.txt
	$(call install,$(VENV),.ci/constraints.txt,dev$(,)plots)

.PRECIOUS: .venv-%/.installed
.venv-%/.installed: pyproject.toml .ci/constraints-%.txt
	$(call install,.venv-$*,.ci/constraints-$*.txt,test)

, := ,

clean: ## remove caches and build products
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find tl_paramdecomp tests examples docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## and the environments
	rm -rf .venv .venv-tl4 .venv-tl2
