# Two commands matter: `make run` and `make test`. Both set up .venv on first use.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
# The package holds compiled code: a change to it installs the package again.
NATIVE := $(wildcard thinslice/kernels/cpu/*)

# Two processes, each a module at a time.
TWO := --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: run serve test check lint types docs bench-peers bench-memory bench-memory-32b bench-engine bench-serving bench-streaming bench-cuda soak mutants check-long clean

run: $(VENV)/.run
	$(BIN)/thinslice run smollm2 --memory 1GiB --temperature 0 "Explain in two sentences why the sky is blue."

serve: $(VENV)/.serve
	$(BIN)/thinslice serve smollm2 --memory 1GiB

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(TWO)

check: lint types docs test

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

docs: $(VENV)/.dev
	$(BIN)/python tools/make_docs.py --check

# Beside other programs, which are fetched and built at the first use; hours and tens of GB.
bench-peers: $(VENV)/.run
	$(BIN)/python benchmarks/peers.py

bench-memory: $(VENV)/.run
	$(BIN)/python benchmarks/memory.py

# A 32B model in 8 GiB; 20 GB of disk.
bench-memory-32b: $(VENV)/.run
	$(BIN)/python benchmarks/memory.py --shape qwq-32b --written-packed --budgets 8GiB --prompt-tokens 256 --new-tokens 8

bench-engine: $(VENV)/.run
	$(BIN)/python benchmarks/engine.py

bench-serving: $(VENV)/.serve
	$(BIN)/python benchmarks/serving.py

bench-streaming: $(VENV)/.run
	$(BIN)/python benchmarks/streaming.py

# Needs a CUDA card, and a torch built for it in .venv.
bench-cuda: $(VENV)/.dev
	$(BIN)/python -m benchmarks.cuda_card

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("thinslice needs Python 3.11 or newer") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(VENV)/bin/python pyproject.toml constraints.txt $(NATIVE)
	@echo "installing what thinslice needs, and compiling its kernels: some minutes, this once"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.serve: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[serve]'
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt $(NATIVE)
	@echo "installing what thinslice and its tests need, and compiling its kernels: some minutes, this once"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/.run $(VENV)/.serve

# Ten minutes of mixed load, faults and programs that end: answers and exit codes are right, nothing hangs,
# memory does not grow. No part of check.
soak: $(VENV)/.dev
	$(BIN)/python tools/soak.py

# One change at a time in the engine's bookkeeping, and whether the tests beside it notice. An hour.
mutants: $(VENV)/.dev
	$(BIN)/python tools/mutants.py

# The full forms of what check runs for a minute at most. Hours.
check-long: lint types docs mutants soak
	$(BIN)/python -m pytest $(TWO) --long

clean:
	rm -rf $(VENV) build dist *.egg-info
