# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS := datasets,demo,fsspec,gguf,images,onnx,openai,lora,mlflow,serve,tensorboard,video,wandb
DEV_GROUPS := --group dev --group peers
STAMP := $(VENV)/.installed

.PHONY: demo test test-minimum gpu-wheels lint docs format clean

demo: $(STAMP)
	$(BIN)/llava-run recipes/tiny.toml --resume

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# The tests with the oldest libraries that pyproject.toml admits, for maintainers: Python 3.11.
test-minimum:
	mkdir -p $(VENV)-minimum
	$(PYTHON) tests/minimum.py > $(VENV)-minimum/constraints.txt
	PIP_CONSTRAINT=$(abspath $(VENV)-minimum/constraints.txt) $(MAKE) test VENV=$(VENV)-minimum DEV_GROUPS="--group dev"

# What a machine with a GPU and no network lacks, in .wheels: see docs/benchmarks.md.
gpu-wheels: $(STAMP)
	$(BIN)/python tests/benchmarks/gpu_wheels.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The documentation site, in docs/_build; every warning is an error, and so is a link that leads nowhere.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build
	@echo "docs/_build/index.html"

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --group docs
	touch $(VENV)/.docs

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]" $(DEV_GROUPS)
	$(BIN)/python -m compileall -q core kernels plugins  # as pip does with all else
	touch $(STAMP)

clean:
	rm -rf $(VENV) $(VENV)-minimum runs docs/_build
