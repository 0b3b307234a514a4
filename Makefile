# `make quickstart`: from nothing to a GPT that writes Python. `make test`: the quick, complete proof.
# Files are targets too: `make runs/NAME/latest` trains recipes/NAME.yaml, in any Makefile of yours as well.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
GPT    := $(BIN)/gpt
# What trains on all cores, and so alone.
ALONE  := tests/test_quality.py tests/stages/test_tweets.py
# Tiny models are fastest on one thread, and tests side by side do not fight for cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help setup quickstart tour test test-all lint format bench clean

help:
	@echo "make quickstart   set up, train on the Python standard library, compare with gzip and xz, write a sample"
	@echo "make tour         the whole life: that model learns to write functions, by sft, a reward model, PPO and GRPO"
	@echo "make test         set up, lint, type-check, test (minutes)"
	@echo "make test-all     the same and the slow proofs: kills, quality, peers (an hour)"
	@echo "make runs/NAME/latest   train recipes/NAME.yaml, or do nothing if that is done"
	@echo "make bench        race the training step and decoding against their peers"

setup: $(VENV)/.installed

# pip takes a CPU build of torch where one lies on the machine; the constraints give every machine the same versions.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(VENV)/.installed
	@$(BIN)/python data/quickstart.py

tour: $(VENV)/.installed
	@$(BIN)/python data/tour.py

runs/%/latest: recipes/%.yaml | $(VENV)/.installed
	$(GPT) pretrain --recipe $< -s run.name=$*

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(PYTEST) -n 2

test-all: lint
	$(PYTEST) -n 2 -m "slow or not slow" $(ALONE:%=--ignore %)
	$(PYTEST) -m slow -rP $(ALONE)

bench: $(VENV)/.installed
	$(BIN)/python tests/bench/train_speed.py
	$(BIN)/python tests/bench/decode_speed.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
