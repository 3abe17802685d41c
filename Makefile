# make demo and make test set everything up by themselves: a virtual environment in .venv with the tested versions.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup test test-gpu lint demo bench bench-compare report clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	@touch $@

setup: $(READY)  ## create .venv and install the package with its test and demo extras

test: $(READY)  ## CPU tests
	$(BIN)/python -m pytest -m 'not gpu' -n auto --dist loadfile

test-gpu:  ## GPU tests, in the current Python environment (needs an NVIDIA GPU, torch with CUDA, pip install -e '.[test]')
	$(PYTHON) -m pytest -m gpu

lint: $(READY)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

demo: $(READY)  ## train tokenizer, HMAR and VAR on digits, write reports/demo
	$(BIN)/hmar demo

bench:  ## attention benchmarks, in the current Python environment (needs an NVIDIA GPU); ARGS="--impl triton ..."
	$(PYTHON) -m pytest bench --benchmark-only $(ARGS)

bench-compare:  ## kernels of the working tree against those of a commit: make bench-compare BASE=<git ref>; ARGS="--impl triton ..."
	$(PYTHON) -m bench.compare "$(BASE)" $(ARGS)

report: $(READY)  ## tables and plots from reports/data, pictures of masks and tiles
	$(BIN)/python reports/build.py
	$(BIN)/python -m reports.plan_pictures

clean:  ## remove the environment and build output
	rm -rf $(VENV) build
