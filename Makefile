# make install  .venv with everything that training needs
# make train    learn the built-in pictures by heart, then sample every caption and print how many come back
# make test     the tests          make lint  style          make schema  configs/schema.json
# make docs     the documentation as a site, in build/site
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.7.1
MDS    ?= mosaicml-streaming==0.13.0

.PHONY: install train test lint schema docs clean
install: $(VENV)/.installed

# torch first: DeepSpeed's build looks for it, and a plain resolution would fetch another torch with all of CUDA.
# DS_BUILD_OPS=0: no operation of DeepSpeed is compiled, none is needed.
$(VENV)/.installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/pip install --quiet "$(TORCH)" "$(TRITON)" numpy
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-build-isolation deepspeed==0.19.8
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev,docs]"
	touch $@

# What the tests need besides: DALI and other people's formats and loaders (half a gigabyte, so not for `train`).
# --no-deps: the list of mosaicml-streaming caps numpy below 2.2 and transformers below 5 and asks for torchvision,
# which has no build for a torch without CUDA, and for five cloud SDKs; the extra `mds` has what it imports.
$(VENV)/.installed-data: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev,docs,data,mds,peers]"
	$(BIN)/pip install --quiet --no-deps "$(MDS)"
	touch $@

train: install
	$(BIN)/python engine/train.py --config configs/quickstart.json --resume auto
	$(BIN)/python engine/sample.py --checkpoint runs/quickstart --recall --grid runs/quickstart/recall.png

# The second run takes the Triton kernels through Triton's interpreter, on the CPU.
test: $(VENV)/.installed-data
	$(BIN)/pytest
	TRITON_INTERPRET=1 $(BIN)/pytest -m interpreter

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

schema: install
	$(BIN)/python engine/train.py --print-schema > configs/schema.json

# The pictures in docs/ are committed, for those who read it in the repository; all else is made for the site alone.
docs: install
	$(BIN)/python docs/generator/pictures.py
	$(BIN)/python docs/generator/stage.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "written to build/site/index.html"

clean:
	rm -rf $(VENV) build runs
