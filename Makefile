# `make demo` and `make test` set up everything they need, once, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := setup.py $(wildcard csrc/*.* csrc/cpu/*.* csrc/cuda/*.*)
# pytest's workers share the cores; each alone on one thread is faster than all on all
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo test lint format docs gpu-check bench-cpu results clean

demo: $(VENV)/built
	$(BIN)/fastmargin demo

test: $(VENV)/built
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

# Plots, and the tables of README.md and docs/benchmarks.md from the committed results.
docs: $(VENV)/built
	$(BIN)/python docs/plot_margins.py
	$(BIN)/python -m benchmarks.publish

# The working tree against another version, in two minutes: make bench-cpu REF=v0.1.0
REF ?=
bench-cpu: $(VENV)/built
	$(BIN)/python -m benchmarks.regression $(if $(REF),--ref $(REF))

# The committed results of this CPU anew, half an hour on a machine that does nothing else.
results: $(VENV)/peers
	$(BIN)/fastmargin bench --suite cpu --suite cpu-large --repeats 15 --seconds 90 \
		--output bench --json benchmarks/results/cpu.json
	$(BIN)/python -m benchmarks.sampling --repeats 21
	$(BIN)/python -m benchmarks.publish

# On a machine with a GPU, with the Python that has its torch: make gpu-check GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python
gpu-check: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/built)
	$(GPU_PYTHON) -m benchmarks.gpu_check

$(VENV)/installed: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch triton
	$(PIP) install -q -c constraints.txt numpy setuptools wheel ninja pybind11
	FASTMARGIN_EXTENSION=0 $(PIP) install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

# What can be compared with on a CPU; all of them: pip install '.[peers]'
$(VENV)/peers: $(VENV)/built
	$(PIP) install -q -c constraints.txt pytorch-metric-learning
	touch $@

clean:
	rm -rf build *.egg-info fastmargin/*.so .pytest_cache .ruff_cache
