# The house's doors. Everything is installed by the first target that needs it; see packaging/setup.sh.
SHELL := /bin/bash
BIN := .venv/bin
RESULTS := .cache/results
# Seconds for everything that runs in the guest.
LIMIT ?= 900
# More for pytest, for example ARGS="-k ike -x".
ARGS ?=

.PHONY: help setup demo test bench lint clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

setup: .venv/.ready ## install what is missing (as root; asks nothing)

.venv/.ready: packaging/setup.sh pyproject.toml constraints.txt
	@packaging/setup.sh
	@touch $@

demo: setup ## two hosts, real IKE, real ESP: the story with and without the gate
	@$(BIN)/ipsecgate demo

# What needs ESP in the kernel runs in a guest (user-mode-linux) if this machine's kernel has none.
test: setup ## the whole suite
	$(BIN)/pytest tests/unit tests/guest --junitxml=$(RESULTS)/unit.xml $(ARGS)
	$(BIN)/python -m ipsecgate.lab.guest --timeout $(LIMIT) --results $(RESULTS) -- \
	    $(BIN)/pytest tests/system --junitxml=$(RESULTS)/system.xml $(ARGS)

bench: setup ## measurements: ratios and medians, on this machine
	$(BIN)/python -m ipsecgate.lab.guest --timeout $(LIMIT) -- $(BIN)/python -m bench.first_connection

lint: setup ## style and types only (they are part of the tests, too)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean: ## remove what setup and tests made in this folder
	rm -rf .venv .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
