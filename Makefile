# make train   environment, pinned packages, one Forward-Forward run on the embedded digits
# make test    the same environment with the test tools; lint, import rules, every test
# make ui      open the MLflow UI over the runs     make docs        write docs/ from what is on disk
# make clean   remove environment and caches         make benchmark   speed and memory beside bare loops

PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
ARGS   ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -qq -c constraints.txt

# One thread per process: on nets this small more threads only wait for each other.
export OMP_NUM_THREADS ?= 1

.DELETE_ON_ERROR:
.PHONY: train test lint ui docs benchmark clean environment

train: $(VENV)/.runs
	$(BIN)/python train.py algo=forward_forward model=mlp $(ARGS)

test: $(VENV)/.tests lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not benchmark" $(ARGS)

lint: $(VENV)/.tests
	$(BIN)/ruff check .
	$(BIN)/lint-imports

ui: $(VENV)/.runs
	$(BIN)/python scripts/ui.py $(ARGS)

docs: $(VENV)/.tests
	$(BIN)/python scripts/docs.py $(ARGS)

benchmark: $(VENV)/.runs
	$(BIN)/python scripts/benchmark.py $(ARGS)

environment: $(VENV)/.tests

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .import_linter_cache
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and by its exact version: a range would take a newer build with gigabytes of CUDA beside it.
# PyTorch's index has the small CPU builds; where pip is told of local files (find-links), those are enough.
$(VENV)/.runs: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("onward needs Python 3.11 or newer; make PYTHON=python3.12 chooses one" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing pinned packages into $(VENV), torch first (a few minutes once)"
	$(PIP) torch==2.13.0 $$($(BIN)/python -m pip config list | grep find-links >/dev/null || \
	    echo --extra-index-url https://download.pytorch.org/whl/cpu)
	$(PIP) hatchling
	$(PIP) --no-build-isolation -e .
	@touch $@

$(VENV)/.tests: $(VENV)/.runs
	$(PIP) --no-build-isolation -e '.[test,launchers]'
	@touch $@
