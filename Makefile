# `make demo` and `make test` work on a fresh clone; both set up .venv first. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

# Every recipe sees the environment's own commands, and no tool phones home.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
# Stages are processes of their own: what Python has compiled is kept between them.
unexport PYTHONDONTWRITEBYTECODE
export DO_NOT_TRACK := true
export DVC_NO_ANALYTICS := 1
export GX_ANALYTICS_ENABLED := false
export HF_HUB_DISABLE_TELEMETRY := 1
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test unit gpu families up down status serve-check lint format clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1	\2/' | expand -t 14

setup: $(READY) ## Create .venv and install what constraints.txt pins (done by demo and test)

demo: $(READY) ## Run the whole pipeline on the target of params.yaml, then print what it gained
	deepspec demo

# A file's tests share what they set up, so they stay together, and the long files of e2e come first; tiny models use one
# thread each.
test: lint ## Check style and types, and run every test
	OMP_NUM_THREADS=1 python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations=25

unit: $(READY) ## Run the tests that need no pipeline, no server and no serving engine
	OMP_NUM_THREADS=1 python -m pytest -n auto --maxprocesses 4 --dist loadfile -m "not e2e and not engine" --durations=25

families: $(READY) ## Try every decoder-only family of transformers as a target; writes docs/targets.md (20 minutes)
	OMP_NUM_THREADS=1 python -m benchmarks.families --output docs/targets.md

serve-check: $(READY) ## Serve the exported drafts of the pipeline in vLLM and compare it with our engine
	deepspec serve-check

# GPU is what the steps are given beside, as --target DIR; without a device every step runs small.
gpu: $(READY) ## Prove the GPU path in six steps of 8 minutes, on the CPU as a dry run (docs/gpu.md)
	python -m benchmarks.gpu $(GPU) $$(python -c 'import torch; print("" if torch.cuda.is_available() else "--dry-run")')

up: $(READY) ## Start Prefect with a worker and MLflow on this machine, with a run every night
	python -m flows.services up

down: $(READY) ## Stop them; what they keep stays in .deepspec/services
	python -m flows.services down

status: $(READY) ## Say which of them run
	python -m flows.services status

lint: $(READY) ## Check style and types alone
	ruff check .
	ruff format --check .
	mypy

format: $(READY) ## Rewrite the code in the project's style
	ruff check --fix .
	ruff format .

clean: ## Remove .venv and caches; data/, reports/, .dvc/cache, runs and what the services keep stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .dvc/tmp *.egg-info
	[ ! -d .deepspec ] || find .deepspec -mindepth 1 -maxdepth 1 ! -name services ! -name runs -exec rm -rf {} +
	find deepspec flows tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone: asked for by name and version, a CPU build that pip is configured to find is taken,
# where a range would fetch the newest one with gigabytes of CUDA.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: DeepSpec needs Python 3.11 or newer, found $$($(PYTHON) --version 2>&1); try: make PYTHON=python3.11" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
