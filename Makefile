# robustft: every target makes .venv first if it is missing, and does nothing twice.
#
#   make demo                    the main job on the embedded data, about 5 minutes on two cores
#   make test ARGS="-k rift"     ARGS goes to pytest (test), or to the experiment (demo)
#   make test JOBS=8             processes for the tests; 2 unless given, 0 for a debugger
#   make PYTHON=python3.12 test  another interpreter, 3.11 to 3.13
#
# Paths are relative on purpose: the folder may have a space in its name.

PYTHON ?= python3
ARGS ?=
JOBS ?= 2
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt --editable

.DEFAULT_GOAL := help
.PHONY: help demo test test-cluster test-browser check bench ui clean

help:
	@echo "make demo          run experiments/rift_sweep.py on the embedded data"
	@echo "make test          run the tests (offline, two cores)"
	@echo "make test-cluster  run the tests that start a Ray cluster"
	@echo "make test-browser  run the tests that look at pages in Chromium or Chrome"
	@echo "make check         format, lint, types, import direction, and the wheel"
	@echo "make bench         run every script in benchmarks/"
	@echo "make ui            open MLflow on the runs made here"
	@echo "make clean         remove caches and build output (keeps .venv and runs)"

# --- the environment: a stamp inside .venv says what has been installed -----------------------

$(VENV)/made.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	  || { echo "robustft needs Python 3.11, 3.12 or 3.13, and '$(PYTHON)' is not one of them:" \
	       "name one, e.g. make PYTHON=python3.11" >&2; exit 1; }
	@echo "environment: making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/run.stamp: $(VENV)/made.stamp pyproject.toml constraints.txt
	@echo "environment: installing robustft with the tested versions (the first time: a few GB)"
	@$(INSTALL) .
	@touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp
	@echo "environment: installing what the tests need"
	@$(INSTALL) '.[test,search,text,deepspeed]'
	@touch $@

$(VENV)/browser.stamp: $(VENV)/test.stamp
	@echo "environment: installing what the tests in a browser need"
	@$(INSTALL) '.[test,browser]'
	@touch $@

$(VENV)/dev.stamp: $(VENV)/test.stamp
	@echo "environment: installing what the checks need"
	@$(INSTALL) '.[dev]'
	@touch $@

# --- what one does with it ---------------------------------------------------------------------

demo: $(VENV)/run.stamp
	@echo "demo: RiFT sweep on the embedded Fashion-MNIST; report and plots go to runs/"
	@$(RUN) experiments/rift_sweep.py $(ARGS)

test: $(VENV)/test.stamp
	@echo "test: the default set (not slow, gpu, network, browser, cluster)"
	@$(RUN) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-cluster: $(VENV)/test.stamp
	@echo "test-cluster: the tests that start a Ray cluster of their own"
	@$(RUN) -m pytest -n $(JOBS) --dist loadfile --durations 10 \
	  -m 'cluster and not slow and not gpu and not network and not browser' $(ARGS)

test-browser: $(VENV)/browser.stamp
	@echo "test-browser: the tests that look at pages; skipped where there is no Chromium or Chrome"
	@$(RUN) -m pytest -n $(JOBS) --dist loadfile --durations 10 -m browser $(ARGS)

check: $(VENV)/dev.stamp
	@echo "check: format"
	@$(RUN) -m ruff format --check .
	@echo "check: lint"
	@$(RUN) -m ruff check .
	@echo "check: types"
	@$(RUN) -m mypy
	@echo "check: import direction"
	@$(VENV)/bin/lint-imports
	@echo "check: the wheel builds, and works away from this folder"
	@rm -rf build
	@$(PIP) wheel --quiet --no-deps --wheel-dir build/wheel .
	@$(PIP) install --quiet --no-deps --target build/installed build/wheel/robustft-*.whl
	@cd build/installed && ../../$(RUN) ../../.ci/check_wheel.py

bench: $(VENV)/test.stamp
	@for script in benchmarks/*.py; do \
	  echo "bench: $$script"; $(RUN) "$$script" $(ARGS) || exit 1; done

ui: $(VENV)/run.stamp
	@echo "ui: MLflow on the runs made here; stop it with Ctrl-C"
	@$(RUN) -m robustft.cli ui $(ARGS)

clean:
	@echo "clean: removing caches and build output"
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find library experiments tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
