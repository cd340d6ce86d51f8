# Each target makes .venv when it is missing. Settings: make probe RUN=runs/x DATA=cifar10 EPS=8 SIZE=small
PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready
RUN     ?= runs/default
SIZE    ?= tiny
DATA    ?= digits
EPS     ?= 1
FLAGS   ?=

.DEFAULT_GOAL := help
.PHONY: help setup generate pretrain probe finetune report demo test test-slow mutate lint bench bench-quick clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(READY)  ## make .venv and install dprandp with its test tools

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $(READY)

# Finished stages are skipped, so each target may name the one before it.
generate: $(READY)  ## Phase I: synthetic images
	$(BIN)/dprandp generate --run $(RUN) --size $(SIZE) $(FLAGS)

pretrain: generate  ## Phase I: the feature extractor
	$(BIN)/dprandp pretrain --run $(RUN) --size $(SIZE) --data $(DATA) $(FLAGS)

probe: pretrain  ## Phase II: a private head
	$(BIN)/dprandp probe --run $(RUN) --size $(SIZE) --data $(DATA) --eps $(EPS) $(FLAGS)

finetune: probe  ## Phase III: everything, privately
	$(BIN)/dprandp finetune --run $(RUN) --size $(SIZE) $(FLAGS)

report: $(READY)  ## the page about a run
	$(BIN)/dprandp report --run $(RUN)

demo: finetune report  ## all of it on real handwritten digits, with a report at the end
	@$(BIN)/dprandp status --run $(RUN)
	@echo "report: $(RUN)/report.html"

test: $(READY)  ## the fast tests, under five minutes on two cores
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile

test-slow: $(READY)  ## the slow tests
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -m slow -n 2 --dist loadfile

mutate: $(READY)  ## do the tests notice mistakes in what privacy rests on? Three quarters of an hour; FLAGS="--sample 0.2"
	$(BIN)/python scripts/mutate.py $(FLAGS)

lint: $(READY)  ## ruff
	$(BIN)/ruff check .

bench: $(READY)  ## speed of each stage against what else could be used: a quarter of an hour
	$(BIN)/python scripts/bench.py

bench-quick: $(READY)  ## the same in two minutes; fails if a ratio regressed
	$(BIN)/python scripts/bench.py --quick

clean:  ## remove runs and caches; .venv and data stay
	rm -rf runs .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find dprandp tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
