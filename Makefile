# Everything installs into .venv; nothing but Python >= 3.11, git and make is needed beforehand.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup train test coverage reliability floors audit lint types docs bench bench-gpu kernels wheel clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  \1\t/' | expand -t 12

setup: $(READY)  ## create .venv with dyndet and its development tools

$(READY): pyproject.toml constraints.txt
	@if command -v uv >/dev/null 2>&1; then uv venv --quiet --allow-existing --python $(PYTHON) .venv; \
	else $(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet uv; fi
	@rm -rf dyndet.egg-info  # of installations before: their record would be found in place of the new one
	@uv=$$(command -v uv || echo $(BIN)/uv); \
	$$uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

train: $(READY)  ## train the dynamic detector on generated shapes (ARGS="key=value ..." overrides)
	$(BIN)/python -m dyndet.train +experiment=shapes_dyn $(ARGS)

test: $(READY)  ## run the tests (ARGS="-m 'not slow'" for a quick round, ARGS=-n0 in one process)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

coverage: $(READY)  ## run the tests and report the lines and branches of src that they reach
	rm -f .coverage .coverage.*
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal --cov --cov-report=term:skip-covered \
	  --cov-fail-under=90 $(ARGS)

reliability: $(READY)  ## inject faults, count what survives, write docs/reliability.md (ARGS="R2 R5.1" for single rows)
	$(BIN)/python scripts/reliability.py $(ARGS)

floors: $(READY)  ## install the oldest versions that pyproject.toml allows and run the quick tests with them
	$(BIN)/python scripts/check_floors.py $(ARGS)

audit: $(READY)  ## licences of all dependencies, and what public databases know of the pinned versions (needs a network)
	$(BIN)/python scripts/check_licences.py video wandb tensorboard sweep slurm
	uv=$$(command -v uv || echo $(BIN)/uv); $$uv tool run pip-audit --requirement constraints.txt --no-deps --disable-pip

lint: $(READY)  ## ruff: style and formatting
	$(BIN)/ruff check src kernels scripts tests
	$(BIN)/ruff format --check src kernels scripts tests

types: $(READY)  ## pyright
	$(BIN)/pyright

docs: $(READY)  ## build the pages of docs/ into site/; a broken link fails
	$(BIN)/zensical build --clean --strict
	@echo "open site/index.html"

bench: $(READY)  ## dense against sparse execution on this CPU, checked against the goals
	rm -f outputs/bench_cpu.jsonl
	$(BIN)/python scripts/bench_sparse.py --suite cpu --json outputs/bench_cpu.jsonl $(ARGS); measured=$$?; \
	$(BIN)/python scripts/check_goals.py outputs/bench_cpu.jsonl && exit $$measured

bench-gpu: $(READY)  ## the same on a GPU
	rm -f outputs/bench_gpu.jsonl
	$(BIN)/python scripts/bench_sparse.py --suite gpu --json outputs/bench_gpu.jsonl $(ARGS); measured=$$?; \
	$(BIN)/python scripts/check_goals.py outputs/bench_gpu.jsonl && exit $$measured

kernels: $(READY)  ## compile the Triton kernels for sm_80 and sm_90 (no GPU needed) and print their resources
	$(BIN)/python scripts/compile_kernels.py --sm 80 90

wheel: $(READY)  ## build the wheel into dist/
	rm -rf build
	$(BIN)/python -m build --wheel --installer uv

clean:  ## remove what make and runs have made, except outputs/
	rm -rf .venv build dist site .cache *.egg-info src/*.egg-info .pytest_cache .ruff_cache .hypothesis
