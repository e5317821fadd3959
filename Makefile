# `make train` and `make test` need Python 3.11 or newer and nothing else: each makes its own environment in .venv.
#   PYTHON=/path/to/python3.12   the Python that makes the environment
#   ARGS="--optim.lr 1e-3"       passed on to the command of train, test, test-all and bench
#   WORKERS=1                    processes that share the tests; one more than cores, and 8 at most, if not said

PYTHON ?= python3
ARGS ?=
WORKERS ?= auto

VENV := .venv
BIN := $(VENV)/bin
SHARED := -n $(WORKERS) --maxprocesses 8 --dist worksteal
REQUIREMENTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help train test test-fla test-all lint typecheck bench format clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:[^#]*## /\t/' | expand -t 12

train: $(VENV)/.installed ## train the example model on this machine's CPU (about three minutes)
	$(BIN)/python -m longspan train $(ARGS)

# The ranks of the tests are processes, each of which would compile the code anew where a shell forbids to keep what was compiled.
test test-all test-fla: export PYTHONDONTWRITEBYTECODE =

test: $(VENV)/.installed-dev ## run the tests, but for the slow ones
	$(BIN)/python -m pytest $(SHARED) $(ARGS)

# Where flash-linear-attention can be imported, Transformers takes its kernels, which need a GPU, and its models do not run on a CPU
# any more. So it has a folder of its own, which these tests alone see.
OF_FLA = $(addprefix tests/integrations/transformers/,test_fla.py test_fla_prefill.py)
test-fla: $(VENV)/.installed-fla ## run the tests with the models of flash-linear-attention
	PYTHONPATH=$(CURDIR)/$(VENV)/fla $(BIN)/python -m pytest -n 0 -m "" $(OF_FLA) $(ARGS)

test-all: $(VENV)/.installed-dev ## run all tests; with ARGS, without those of test-fla
	$(BIN)/python -m pytest $(SHARED) -m "" $(ARGS)
	$(if $(ARGS),,$(MAKE) test-fla)

lint: $(VENV)/.installed-dev ## check style and formatting
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

typecheck: $(VENV)/.installed-dev ## check types
	$(BIN)/python -m mypy

bench: $(VENV)/.installed-bench ## measure speed and memory and print the tables
	$(BIN)/python -m benchmarks $(ARGS)

format: $(VENV)/.installed-dev ## format the code and apply safe lint fixes
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean: ## remove the environment and all caches (runs/ stays)
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Commands run as `python -m`, so that a checkout may be moved together with its environment.

# An environment counts as made when its stamp is younger than the requirements. The stamp is written last. `.installing`
# stays behind only when an installation was cut off, and what that left cannot be trusted: the environment is made anew.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "longspan needs Python 3.11 or newer, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 || true)"; \
	    echo "Name another one: make $(firstword $(MAKECMDGOALS)) PYTHON=/path/to/python3.11"; exit 1; } >&2
	@if [ -e $(VENV)/.installing ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1 \
	    || ! $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	    echo "making $(VENV)"; $(PYTHON) -m venv --clear $(VENV); fi
	@touch $(VENV)/.installing
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e $(1) \
	    || { rm -f $(VENV)/.installing; exit 1; }
	@$(BIN)/python -c 'import torch; from importlib.metadata import version; version("longspan")'
	@rm -f $(VENV)/.installing
	@touch $@
endef

$(VENV)/.installed: $(REQUIREMENTS)
	$(call install,.)

# With the code that the tables compare with.
$(VENV)/.installed-bench: $(REQUIREMENTS)
	$(call install,".[bench]")
	@touch $(VENV)/.installed

$(VENV)/.installed-dev: $(REQUIREMENTS)
	$(call install,".[dev]")
	@touch $(VENV)/.installed

$(VENV)/.installed-fla: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --upgrade \
	    --target $(VENV)/fla flash-linear-attention fla-core einops
	@touch $@
