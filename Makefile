# `make demo` and `make test` set up everything they need, once, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := setup.py $(wildcard csrc/*.* csrc/cpu/*.* csrc/cuda/*.*)
# pytest's workers share the cores; each alone on one thread is faster than all on all
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo test lint format docs gpu-check bench-cpu clean

demo: $(VENV)/built
	$(BIN)/fastmargin demo

test: $(VENV)/built
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -q

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

docs: $(VENV)/built
	$(BIN)/python docs/plot_margins.py

bench-cpu: $(VENV)/built
	$(BIN)/python benchmarks/cpu_head.py

# On a machine with a GPU, with the Python that has its torch: make gpu-check GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python
gpu-check: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/built)
	$(GPU_PYTHON) benchmarks/gpu_check.py

$(VENV)/installed: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch triton
	$(PIP) install -q -c constraints.txt numpy setuptools wheel ninja pybind11
	FASTMARGIN_EXTENSION=0 $(PIP) install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

clean:
	rm -rf build *.egg-info fastmargin/*.so .pytest_cache .ruff_cache
