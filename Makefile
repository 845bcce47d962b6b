# Every target sets up what it needs: a virtual environment in the checkout with the package and its extras.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help train test test-slow lint types format table clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[composer,dev]'
	@touch $@

train: $(READY) ## train Fashion-MNIST with EMA from yamls/fashion_mnist.yaml
	$(BIN)/composer-ema train yamls/fashion_mnist.yaml

test: $(READY) ## run the tests, under 10 minutes on 2 cores
	$(BIN)/python -m pytest -m 'not slow'

test-slow: $(READY) ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

lint: $(READY) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(READY) ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

table: $(READY) ## the three-seed table of method_cards/ema.md
	$(BIN)/composer-ema train yamls/fashion_mnist.yaml --seeds 1,2,3

clean: ## remove the virtual environment and the caches, never the runs
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis *.egg-info
