# `make demo` and `make test` set everything up on a fresh Debian or Ubuntu with Python 3.11 or later.

# On a machine with few cores, OpenMP threads that spin while they wait slow down the loader's threads.
export OMP_WAIT_POLICY ?= passive
# Let Python cache bytecode: with --no-compile, packages are compiled at their first import, not at installation.
unexport PYTHONDONTWRITEBYTECODE
PYTHON ?= python3
BIN := .venv/bin
# Test processes: more than cores, since tests also wait. Each takes up to 4 GB of memory, most of them 1 GB.
WORKERS ?= $(shell expr $$(nproc) + 3)
SYSTEM := libopencv-dev libturbojpeg0-dev libjpeg-dev pkg-config g++ python3-dev python3-venv
SUDO := $(shell if [ "$$(id -u)" = 0 ]; then true; elif sudo -n true 2>/dev/null; then echo sudo; else echo none; fi)

BUILDS_FFCV = pkg-config --exists opencv4 libturbojpeg 2>/dev/null && command -v g++ >/dev/null && \
    $(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null

# uv takes a quarter of pip's time, but does not read pip's configuration (a mirror, say): if it fails, pip tries.
INSTALL := sh -c '{ [ -x $(BIN)/uv ] && $(BIN)/uv pip install -q --python $(BIN)/python "$$@"; } || \
    $(BIN)/pip install -q --no-compile --disable-pip-version-check "$$@"' install

.PHONY: demo test fast lint style types pytest docs warm env gpu clean

demo: env  ## train and distil a small DeiT on scikit-learn's digits
	$(BIN)/python -m fastdeit.commands.demo runs/demo

test: env dataset style  ## lint, types, tests: 10 minutes on two cores
	@$(MAKE) --no-print-directory -j2 types pytest

fast: warm  ## the tests that are not marked slow: 2 minutes on two cores
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

pytest: warm
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# Otherwise each test process would compile the pipelines' code, half a minute each.
warm: env
	$(BIN)/python -m tests.helpers.warm

lint: style types

style: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/pyright

docs: env  ## the documentation site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open build/site/index.html, or serve it, with its search: python -m http.server -d build/site"

gpu: env  ## GPU tests and benchmarks: five parts of at most 9 minutes, 36 in all
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
	@echo "installing PyTorch and other packages into .venv (downloads about 3 GB)"
	@$(BIN)/pip install -q --disable-pip-version-check uv || echo "uv did not install: pip takes minutes longer"
	@$(INSTALL) -e '.[demo,dev]'
	@if ! { $(BUILDS_FFCV); }; then \
	    echo "FFCV is not installed, since it needs $(SYSTEM): the other loaders work without it"; \
	elif ! $(INSTALL) -e '.[ffcv]'; then \
	    echo "FFCV did not build: the other loaders work without it (fastdeit-doctor shows why)"; \
	fi
	@$(INSTALL) -e '.[dali]' || \
	    echo "DALI did not install (it needs Linux on x86-64 or aarch64): the other loaders work without it"
	@touch $@

# A few tests use Fashion-MNIST if it is installed.
.PHONY: dataset
dataset:
	@if [ -d /usr/share/datasets/fashion-mnist ]; then true; \
	elif [ "$(SUDO)" = none ] || ! command -v apt-get >/dev/null || \
	    ! $(SUDO) apt-get install -qq -y dataset-fashion-mnist >/dev/null; then \
	    echo "Fashion-MNIST is not installed (apt-get install dataset-fashion-mnist): its tests are skipped"; \
	fi

clean:
	rm -rf .venv runs/demo
