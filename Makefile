# Everything runs in a virtual environment of its own; `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/installed
EXTRAS := demo,docs,export,hf,look,peers,test,vision
# One thread a test process: two processes with two threads each on two cores wait for one another.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help install demo bench-cpu gpu-check test test-fast test-long test-distributed test-kernels compatibility lint types format docs docs-serve clean
.DEFAULT_GOAL := help
# A virtual environment that could not be made is no virtual environment the next time either.
.DELETE_ON_ERROR:

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20
	@echo "  Variables: PYTHON=$(PYTHON) VENV=$(VENV) JOBS=$(JOBS) PYTEST_ARGS=..."

install: $(STAMP) ## create the virtual environment and install the package with everything the tests need

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch is fixed in the same command as everything that depends on it, so that pip never replaces it.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

demo: $(STAMP) ## convert a small GPT-2, check it, train it beside the original (about 3 minutes on two cores)
	$(BIN)/python demos/convert_gpt.py

bench-cpu: $(STAMP) ## the designs of a site's operators on this CPU, beside a copy (about 2 minutes)
	$(BIN)/python demos/cpu_kernels.py

gpu-check: $(STAMP) ## check and time the operators on a GPU, or check them on the CPU where there is none
	$(BIN)/python demos/gpu_check.py

test: lint types ## lint, type check and the tests (within 20 minutes)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not long" $(PYTEST_ARGS)

test-fast: $(STAMP) ## the tests that are not marked slow (about 8 minutes)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow and not long" $(PYTEST_ARGS)

test-long: $(STAMP) ## the tests that the others leave out
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m long $(PYTEST_ARGS)

# One at a time: each starts processes of its own.
test-distributed: $(STAMP) ## the tests in several processes, those that `make test` leaves out too
	$(TEST_ENV) $(BIN)/python -m pytest -n 0 --durations=15 tests/test_distributed*.py tests/test_pipeline_overlap.py $(PYTEST_ARGS)

test-kernels: $(STAMP) ## Triton: every size, dtype and configuration, interpreted and compiled (many hours)
	$(TEST_ENV) MHC_WHOLE_GRID=1 $(BIN)/python -m pytest -n $(JOBS) tests/test_kernels_interpreted.py tests/test_kernel_compile.py $(PYTEST_ARGS)

compatibility: ## the fast tests with the oldest versions, the newest and the usual build of torch (`pip install nox`)
	nox

lint: $(STAMP) ## ruff: lint and format, without changing anything
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMP) ## mypy
	$(BIN)/mypy

format: $(STAMP) ## let ruff rewrite the files
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(STAMP) ## the documentation as pages in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(STAMP) ## the same on http://127.0.0.1:8000, built anew when a page changes
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

clean: ## remove the virtual environment, caches and demo output
	rm -rf $(VENV) build dist site demo-output *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
