# Two commands do all the set-up on a fresh Debian or Ubuntu with Python >= 3.11: `make demo` and `make test`.

# OpenMP threads that spin while they wait starve the loader's on a machine of few cores.
export OMP_WAIT_POLICY ?= passive
PYTHON ?= python3
BIN := .venv/bin
# Processes that share the tests. Each takes up to 4 GB of memory.
WORKERS ?= 2
SYSTEM := libopencv-dev libturbojpeg0-dev libjpeg-dev pkg-config g++ python3-dev python3-venv
SUDO := $(shell if [ "$$(id -u)" = 0 ]; then true; elif sudo -n true 2>/dev/null; then echo sudo; else echo none; fi)

BUILDS_FFCV = pkg-config --exists opencv4 libturbojpeg 2>/dev/null && command -v g++ >/dev/null && \
    $(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null

.PHONY: demo test fast lint style types pytest env gpu clean

demo: env  ## train and distil a small DeiT on scikit-learn's digits
	$(BIN)/python -m fastdeit.commands.demo runs/demo

test: env dataset style  ## lint, types, tests; under ten minutes on two cores
	@$(MAKE) --no-print-directory -j2 types pytest

fast: env  ## the tests that are not marked slow; under two minutes on two cores
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

pytest: env
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: style types

style: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/pyright

gpu: env  ## on a machine with a GPU: its tests and its figures, in eight minutes
	$(BIN)/python -m benchmarks gpu

env: .venv/.stamp

.venv/.stamp: pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: $(PYTHON) is older than 3.11: run make PYTHON=python3.11"; exit 1; }
	@if $(BUILDS_FFCV) && $(PYTHON) -c 'import ensurepip' 2>/dev/null; then true; \
	elif [ "$(SUDO)" != none ] && command -v apt-get >/dev/null; then \
	    echo "installing system packages: $(SYSTEM)"; \
	    $(SUDO) apt-get update -qq; \
	    $(SUDO) env DEBIAN_FRONTEND=noninteractive \
	        apt-get install -qq -y --no-install-recommends $(SYSTEM) >/dev/null || echo "apt-get failed"; \
	fi
	@$(PYTHON) -m venv .venv || { echo "error: $(PYTHON) cannot make a .venv: apt-get install python3-venv"; exit 1; }
	@echo "installing PyTorch and friends into .venv, about 3 GB to fetch"
	@$(BIN)/pip install -q --disable-pip-version-check -e '.[demo,dev]'
	@if ! { $(BUILDS_FFCV); }; then \
	    echo "FFCV is left out, since it needs $(SYSTEM): other loaders decode instead"; \
	elif ! $(BIN)/pip install -q --disable-pip-version-check -e '.[ffcv]'; then \
	    echo "FFCV did not build: other loaders decode instead (fastdeit-doctor tells more)"; \
	fi
	@$(BIN)/pip install -q --disable-pip-version-check -e '.[dali]' || \
	    echo "DALI did not install (NVIDIA has it for Linux on x86-64 and aarch64 alone): other loaders decode instead"
	@touch $@

# Fashion-MNIST, which a few tests use where it is there.
.PHONY: dataset
dataset:
	@if [ -d /usr/share/datasets/fashion-mnist ]; then true; \
	elif [ "$(SUDO)" = none ] || ! command -v apt-get >/dev/null || \
	    ! $(SUDO) apt-get install -qq -y dataset-fashion-mnist >/dev/null; then \
	    echo "Fashion-MNIST (apt-get install dataset-fashion-mnist) is not there: its tests are skipped"; \
	fi

clean:
	rm -rf .venv runs/demo
