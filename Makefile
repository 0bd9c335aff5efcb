# Two commands for a new user: `make demo` and `make test`. Both create the environment themselves;
# the machine needs Python 3.11, git and make, nothing else.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Two OpenMP threads on a half-busy machine are slower than one.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all lint docs clean

demo: $(INSTALLED)
	$(BIN)/compress --criterion relevance --model resnet18 --data digits --sparsity 0.6 --out runs/demo --overwrite

# One worker a core: tests are one-threaded, see OMP_NUM_THREADS. By files, whose tests share runs that take long.
test: $(INSTALLED) lint
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-all: $(INSTALLED) lint
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m ""

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Pages of docs/ and of the docstrings as a site, in site/index.html.
docs: $(INSTALLED)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:
	rm -rf $(VENV) runs site .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.5"
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable ".[dev]"
	touch $@
