# make install       .venv with everything that training needs
# make train         learn the built-in pictures by heart, then sample every caption and print how many come back
# make test          the tests          make lint  style          make schema  configs/schema.json
# make docs          the documentation as a site, in build/site
# make torch-versions  the tests of the kernels with torch 2.11, 2.12 and 2.13
# make constraints   constraints.txt: the newest versions that pyproject.toml allows, of every package
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

# Every version is pinned in constraints.txt, those of dependencies of dependencies too. setuptools says of every
# editable installation that it is one.
CONSTRAINTS := constraints.txt
PIP = PYTHONWARNINGS=ignore $(BIN)/pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

.PHONY: install train test lint schema docs torch-versions constraints clean
install: $(VENV)/.installed

# Python first, because the rest downloads gigabytes. Then torch: DeepSpeed's build imports it. On Linux, PyPI has
# torch with CUDA's libraries; a CPU build of the same version fits as well, if pip is told where to find one.
# DS_BUILD_OPS=0: no operation of DeepSpeed is compiled, none is needed.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "error: Millrace needs Python 3.11 \
	or newer, $(PYTHON) is %d.%d; name another one: make install PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools wheel
	$(PIP) torch triton numpy
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	$(PIP) --no-build-isolation --editable ".[dev,docs]"
	touch $@

# What the tests need besides: torchao, DALI, other people's formats and loaders, and what drives a browser (a gigabyte,
# so not for `train`).
# --no-deps: the list of mosaicml-streaming caps numpy below 2.2 and transformers below 5 and asks for torchvision
# and five cloud SDKs; the extra `mds` has what it imports.
$(VENV)/.installed-tests: $(VENV)/.installed
	$(PIP) --no-build-isolation --editable ".[dev,docs,data,mds,peers,fp8,browser]"
	$(PIP) --no-deps mosaicml-streaming
	touch $@

train: install
	$(BIN)/millrace train --config configs/quickstart.json --resume auto
	$(BIN)/millrace sample --checkpoint runs/quickstart --recall --grid runs/quickstart/recall.png

# Two workers of one thread each. The tests of a file stay together: they share what its fixtures have trained.
# The second run takes the Triton kernels through Triton's interpreter, on the CPU.
WORKERS ?= 2
test: $(VENV)/.installed-tests
	$(BIN)/pytest -n $(WORKERS) --dist loadfile
	TRITON_INTERPRET=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile -m interpreter

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

schema: install
	$(BIN)/millrace train --print-schema > configs/schema.json

docs: install
	$(BIN)/python docs/generator/stage.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "written to build/site/index.html"

# The kernels on every release of torch that pyproject.toml admits, each in an environment of its own.
TORCH ?= 2.11 2.12 2.13
torch-versions:
	for version in $(TORCH); do \
	    $(PYTHON) -m venv build/torch-$$version && \
	    build/torch-$$version/bin/pip install --quiet "torch==$$version.*" triton numpy pytest pytest-timeout \
	        "setuptools>=77,<82" && \
	    build/torch-$$version/bin/pip install --quiet --no-deps --no-build-isolation --editable . && \
	    build/torch-$$version/bin/python -m pytest -q tests/kernels tests/csrc || exit 1; done

# An environment of its own without constraints, and what pip put there. `+cpu` and the like are builds of a version.
constraints:
	rm -rf build/constraints
	$(MAKE) VENV=build/constraints CONSTRAINTS= build/constraints/.installed-tests
	build/constraints/bin/pip list --format=freeze --exclude-editable | sed 's/+.*//' > constraints.txt

clean:
	rm -rf $(VENV) build runs
