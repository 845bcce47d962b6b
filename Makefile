# Every target sets up what it needs: a virtual environment in the checkout with the package and its extras.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := $(VENV)/.peers
DOCS := $(VENV)/.docs
# The release of torch that test-core installs, and the tests that it runs: those of all that works without Composer.
TORCH ?= 2.13.0
CORE_VENV := .venv-core-$(TORCH)
CORE := averages settings spans stream sharding sharded kernels layout naming offload custom shadow following buffers \
	loan lazy sharded_format sharded_folders sharded_device sharded_doors updates merge snapshots functional wrapper \
	optimizer optimizer_entries optimizer_stepping optimizer_state optimizer_swapping batchnorm interchange package \
	compiled profiles shares \
	fit target reconstruct shadow_models rounding arguments beside
# What the hostile trials draw their inputs from; another seed is another trial.
SEED ?= 0
# Threads of torch while something is measured on the CPU; empty: as many as torch takes by itself.
BENCH_THREADS ?=
BENCH := $(BIN)/python -m benchmarks
BENCH_CPU := --device cpu $(addprefix --threads ,$(BENCH_THREADS))

.DEFAULT_GOAL := help
.PHONY: help train test test-slow test-sharded test-core trials lint types format docs table seeds clean \
	bench bench-update bench-step bench-scaling bench-host bench-memory bench-reconstruct bench-gpu

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[composer,doors,dev]'
	@touch $@

train: $(READY) ## train Fashion-MNIST with EMA from yamls/fashion_mnist.yaml
	$(BIN)/composer-ema train yamls/fashion_mnist.yaml

# Each process has one thread of torch; a file's tests share fixtures, so one process runs them all.
test: $(READY) ## run the tests, under 10 minutes on 2 cores
	$(BIN)/python -m pytest -m 'not slow' --numprocesses 2 --dist loadfile

test-slow: $(READY) ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

test-sharded: $(READY) ## run the tests of sharded models, on 1, 2 and 4 processes over gloo
	$(BIN)/python -m pytest $(wildcard tests/test_shard*.py tests/test_composer_fsdp2.py)

# Each ends with a line of what it tried and what failed. All are run, whatever the first ones find.
trials: export OMP_NUM_THREADS = 1
trials: $(READY) ## attack the package: damaged files, kills, simultaneous starts, absurd recipes and arguments; SEED=0
	@failed=0; for trial in $(wildcard tests/scripts/trial_*.py); do \
		$(BIN)/python $$trial --seed $(SEED) || failed=1; done; exit $$failed

# A suffix names the CPU build of torch, which pip finds where PIP_EXTRA_INDEX_URL gives PyTorch's index of them.
# Without it the ordinary build is taken.
$(CORE_VENV)/.ready: setup.cfg
	$(PYTHON) -m venv $(CORE_VENV)
	$(CORE_VENV)/bin/python -m pip install --quiet 'torch==$(TORCH)+cpu' \
		|| $(CORE_VENV)/bin/python -m pip install --quiet 'torch==$(TORCH)'
	$(CORE_VENV)/bin/python -m pip install --quiet --editable . numpy 'pytest>=8' 'hypothesis>=6.100'
	@touch $@

test-core: $(CORE_VENV)/.ready ## run the tests that need no Composer, on the torch of TORCH=2.13.0
	$(CORE_VENV)/bin/python -m pytest --noconftest --hypothesis-profile=ci $(CORE:%=tests/test_%.py)

lint: $(READY) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(READY) ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(DOCS): $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[composer,doors,dev,docs]'
	@touch $@

# Without --quiet, which lets mkdocs overlook its own warnings: a strict build would not fail.
docs: $(DOCS) ## build the documentation into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --config-file docs/mkdocs.yml
	@echo 'Open site/index.html.'

# One thread: so small a network gains little from two, which lose much where something else wants the cores.
table: export OMP_NUM_THREADS ?= 1
table: $(READY) ## the published Fashion-MNIST runs with an average, into method_cards/fashion_mnist.md; resumes
	$(BENCH).published yamls/fashion_mnist --published yamls/fashion_mnist/published.csv \
		--into method_cards/fashion_mnist.md

seeds: $(READY) ## the three-seed table of method_cards/ema.md
	$(BIN)/composer-ema train yamls/fashion_mnist.yaml --seeds 1,2,3

$(PEERS): $(READY) benchmarks/peers.txt
	$(BIN)/python -m pip install --quiet --editable '.[composer,bench]'
	$(BIN)/python -m pip install --quiet --no-deps -r benchmarks/peers.txt
	@touch $@

bench: bench-update bench-host bench-memory bench-reconstruct ## what can be measured on the CPU in minutes

bench-update: $(PEERS) ## one update, beside every peer's and the limit
	$(BENCH).update $(BENCH_CPU)

bench-step: $(PEERS) ## a training iteration with and without an average
	$(BENCH).step $(BENCH_CPU)

bench-scaling: $(PEERS) ## cost against tensors, parameters, averages and processes
	$(BENCH).scaling $(BENCH_CPU)

bench-host: $(PEERS) ## what the Composer algorithm costs the host per batch
	$(BENCH).host $(BENCH_CPU)

bench-memory: $(PEERS) ## what an average keeps, and the peaks beyond it
	$(BENCH).memory $(BENCH_CPU)

bench-reconstruct: $(PEERS) ## averages made after a run, beside the peers': error, disk, time
	$(BENCH).reconstruct $(BENCH_CPU)

bench-gpu: ## what a GPU can show, in 10 minutes; needs only Python, torch, torchvision and this checkout
	bash benchmarks/gpu.sh "$(PYTHON)"

clean: ## remove the virtual environment and the caches, never the runs
	rm -rf $(VENV) .venv-core-* .pytest_cache .ruff_cache .hypothesis *.egg-info
