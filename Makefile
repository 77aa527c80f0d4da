# Every user-facing command; `make` alone prints this list.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell $(p) -c 'import sys; sys.exit(not (3,11) <= sys.version_info[:2] <= (3,13))' 2>/dev/null && echo $(p))))
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CLI := $(BIN)/crystalformer
TARGET ?= shear
IMAGE ?= $(shell sed -n 's/.* -t \(crystalformer:[^ ]*$(if $(EXTRA_INDEX_URL),-cpu,-cu)\) .*/\1/p' k8s/Dockerfile)
flag = $(if $(2),--$(1) $(2))

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 on PATH; set PYTHON=/path/to/python" >&2; exit 2; }
	@echo "Installing the pinned environment into $(VENV) (once; a few minutes) ..."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

.PHONY: help setup train tune data predict test check lint types bench manifests image dashboard submit down

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## the environment in .venv, from pinned versions

train: $(READY) ## train and test: TARGET=shear [DATASET=..] [EPOCHS=..] [WORKERS=..] [ARGS="--lr 0.001 .."]
	@$(CLI) train --target $(TARGET) $(call flag,dataset,$(DATASET)) $(call flag,epochs,$(EPOCHS)) $(call flag,num_workers,$(WORKERS)) $(ARGS)

tune: $(READY) ## search for the best settings: TARGET=shear [DATASET=..] [TRIALS=..] [EPOCHS=..] [ARGS="--max_minutes 60 .."]
	@$(CLI) tune --target $(TARGET) $(call flag,dataset,$(DATASET)) $(call flag,num_trials,$(TRIALS)) $(call flag,epochs,$(EPOCHS)) $(ARGS)

# Two of the paper's sets are pickles: who names one asks for it, and the unpickler admits nothing but structures.
data: $(READY) ## download and preprocess a data set: DATASET=jarvis__megnet-shear
	@$(CLI) prepare $(DATASET) $(if $(filter jarvis__megnet-% megnet-%,$(DATASET)),--allow_pickle) $(ARGS)

predict: $(READY) ## predictions as a table: MODEL=runs/../model FILES="a.cif POSCAR .."
	@$(CLI) predict $(MODEL) $(FILES) $(ARGS)

manifests: $(READY) ## render every overlay of k8s/ into build/ and validate it; needs kubectl
	@$(BIN)/python k8s/check.py

image: ## build the image: IMAGE=name:tag [EXTRA_INDEX_URL=<torch CPU wheels>]; needs docker
	docker build -f k8s/Dockerfile -t $(IMAGE) $(if $(EXTRA_INDEX_URL),--build-arg EXTRA_INDEX_URL=$(EXTRA_INDEX_URL)) .

dashboard: $(READY) ## a local Ray head with the dashboard, on loopback: [PORT=8265]
	@$(BIN)/python -m cluster.head up $(call flag,port,$(PORT))

submit: $(READY) ## ray job submit to RAY_API_SERVER_ADDRESS or that head: JOB="train --target shear"
	@$(BIN)/python -m cluster.head submit "$(JOB)"

down: $(READY) ## stop what make dashboard started
	@$(BIN)/python -m cluster.head down

test: $(READY) ## the tests; more files at once on a larger machine: ARGS="-n 4 --dist loadfile"
	@$(BIN)/python -m pytest $(ARGS)

lint: $(READY) ## ruff: its rules and its layout
	@$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet .

types: $(READY) ## mypy, strict
	@$(BIN)/mypy

check: lint types test ## what CI runs: lint, types, import direction, tests

bench: $(READY) ## the benchmarks, as tables and JSON; minutes each
	@for name in attention step data predict; do $(CLI) bench $$name || exit; done
