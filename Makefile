# The house's doors. Everything is installed by the first target that needs it; see packaging/setup.sh.
SHELL := /bin/bash
BIN := .venv/bin
RESULTS := .cache/results
# Seconds for everything that runs in the guest.
LIMIT ?= 2400
# More for pytest, for example ARGS="-k ike -x".
ARGS ?=

.PHONY: help setup install install-program install-files installed demo test test-debian13 qemu test-qemu matrix test-host fuzz chaos clients bench vagrant-test lint clean

help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup: .venv/.ready ## install what is missing (as root; asks nothing)

.venv/.ready: packaging/setup.sh pyproject.toml constraints.txt
	@packaging/setup.sh
	@touch $@

# Real clients, their servers and container runtimes: for the tests only.
.venv/.ready-tests: .venv/.ready packaging/setup.sh $(wildcard tests/clients/*.go tests/clients/*.java)
	@packaging/setup.sh tests
	@touch $@

# DESTDIR is a packager's root. Nothing is enabled or started: systemctl does that.
DESTDIR ?=
PREFIX ?= /usr
LIB = $(DESTDIR)$(PREFIX)/lib/ipsecgate
SHARE = $(DESTDIR)$(PREFIX)/share
UNITS = $(DESTDIR)$(PREFIX)/lib/systemd/system

install: install-program install-files ## the program, units, completions and man page, below DESTDIR

install-program: setup
	@install -d $(LIB) $(DESTDIR)$(PREFIX)/bin
	@$(BIN)/pip install --quiet --upgrade --no-warn-conflicts -c constraints.txt --target $(LIB) .
	@sed 's,@lib@,$(PREFIX)/lib/ipsecgate,' packaging/ipsecgate.in >$(DESTDIR)$(PREFIX)/bin/ipsecgate
	@chmod 755 $(DESTDIR)$(PREFIX)/bin/ipsecgate

install-files: setup
	@install -d $(UNITS) $(SHARE)/man/man8 $(SHARE)/bash-completion/completions \
	    $(SHARE)/zsh/vendor-completions $(SHARE)/fish/vendor_completions.d
	@for unit in packaging/systemd/*.service; do \
	    sed 's,@bindir@,$(PREFIX)/bin,' $$unit >$(UNITS)/$${unit##*/}; done
	@$(BIN)/python -m ipsecgate.cli.manual man >$(SHARE)/man/man8/ipsecgate.8
	@$(BIN)/python -m ipsecgate.cli.manual bash >$(SHARE)/bash-completion/completions/ipsecgate
	@$(BIN)/python -m ipsecgate.cli.manual zsh >$(SHARE)/zsh/vendor-completions/_ipsecgate
	@$(BIN)/python -m ipsecgate.cli.manual fish >$(SHARE)/fish/vendor_completions.d/ipsecgate.fish

# What tests/system/test_systemd.py boots with; made here, as pip has no index in the guest.
INSTALLED := .cache/root
PROGRAM := $(shell find ipsecgate bpf packaging -type f ! -name '*.pyc') pyproject.toml constraints.txt

installed: $(INSTALLED).ready ## a root with the program as `make install` leaves it, for the tests

$(INSTALLED).ready: .venv/.ready $(PROGRAM) Makefile
	@rm -rf $(INSTALLED)
	@$(MAKE) --silent install DESTDIR=$(INSTALLED)
	@touch $@

demo: setup ## two hosts, real IKE, real ESP: the story with and without the gate
	@$(BIN)/ipsecgate demo

# What needs ESP in the kernel runs in a room on this machine's, in a guest (user-mode-linux) if it has none.
# Two at a time, because a guest has one CPU: the edges and the life of an SA beside all the rest.
GUEST = $(BIN)/python -m ipsecgate.lab.guest --timeout $(LIMIT) --results $(RESULTS) -- $(BIN)/pytest
BESIDE := $(addprefix tests/system/test_,life.py sources.py libipsec.py lab.py lab_end.py edges.py \
    routes.py charon.py traffic.py hold_end.py hold_hostile.py units.py service.py \
    containers.py systemd.py)

test: setup .venv/.ready-tests installed ## the whole suite
	$(BIN)/pytest tests/unit tests/fuzz tests/guest --junitxml=$(RESULTS)/unit.xml $(ARGS)
	@mkdir -p $(RESULTS); \
	$(GUEST) $(BESIDE) --junitxml=$(RESULTS)/beside.xml $(ARGS) >$(RESULTS)/beside.log 2>&1 & beside=$$!; \
	$(GUEST) tests/system $(addprefix --ignore=,$(BESIDE)) --junitxml=$(RESULTS)/system.xml $(ARGS); \
	first=$$?; wait $$beside; second=$$?; cat $(RESULTS)/beside.log; \
	exit $$((first ? first : second))

# Debian 13 on whichever Debian this is: strongSwan 6, Python 3.13, BCC 0.31, user-mode-linux 6.12.
test-debian13: ## demo and the whole suite in a fresh root of Debian 13
	@tests/debian13.sh

# Not part of the tests: QEMU and Debian's kernel (470 MB in the lab's cache) are only for this. Two
# guests one after the other, each beginning with which kernel it is: what asks the hooks alone, and
# the gate on two hosts. The hooks are compiled before, as that takes a minute under emulation.
QEMU_HOOKS := @tests/qemu/hooks.list
QEMU_GATE := @tests/qemu/gate.list
QEMU_LIMIT ?= 1800
BYTECODE := $(CURDIR)/.cache/bytecode
QEMU = IPSECGATE_TEST_BYTECODE=$(BYTECODE) $(BIN)/python -m ipsecgate.lab.guest --kernel qemu \
    --timeout $(QEMU_LIMIT) --results $(RESULTS) -- $(BIN)/pytest tests/qemu/test_kernel.py \
    --durations=5 $(ARGS)

# What unpacks Debian's kernels and starts them, and the hooks, compiled.
qemu: setup
	@command -v qemu-system-x86_64 >/dev/null && command -v zstd >/dev/null || \
	    DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends \
	    qemu-system-x86 zstd
	$(BIN)/python -c 'import pathlib, sys, ipsecgate.edges.bytecode as b; b.get(pathlib.Path(sys.argv[1]))' \
	    $(BYTECODE)

test-qemu: qemu ## the hooks, the gate and the oracle again on a kernel with BPF JIT (slow)
	$(BIN)/python -m ipsecgate.lab.debian
	$(BIN)/pytest tests/qemu/test_boot.py --junitxml=$(RESULTS)/qemu-boot.xml
	$(QEMU) $(QEMU_HOOKS) --junitxml=$(RESULTS)/qemu-hooks.xml
	$(QEMU) $(QEMU_GATE) --junitxml=$(RESULTS)/qemu-gate.xml

# `make demo` and `make test` on a host whose own kernel has ESP: Debian's under QEMU with systemd, an
# IKE daemon with an SA and a gate of its own, which all stay as they were. HOST="'make demo'" does
# less. All is emulated: it takes hours.
test-host: qemu .venv/.ready-tests installed ## the two commands on a host whose kernel has ESP (hours)
	$(BIN)/python -m tests.host $(HOST)

# The same two lists on user-mode-linux and on the kernels of several Debians, one after the
# other; MATRIX="trixie" runs only some. README has the table.
matrix: qemu ## the kernel-facing tests on old and new kernels: README's table (very slow)
	@command -v qemu-system-aarch64 >/dev/null && command -v mmdebstrap >/dev/null || \
	    DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends \
	    qemu-system-arm mmdebstrap
	$(BIN)/python -m tests.matrix --into README.md $(MATRIX)

# First 100,000 inputs by libFuzzer for each decoder, here and without root (python -m tests.fuzz
# --help: seed, number, one target, one input); then 100,000 flows in a few minutes in the guest:
# ORACLE_SEED repeats a run, ORACLE_CASES shortens or lengthens it.
FUZZ ?= --inputs 100000

fuzz: setup ## damaged input for every decoder; random SPDs, SADs and flows against the kernel
	$(BIN)/python -m tests.fuzz $(FUZZ)
	ORACLE_CASES=$(or $(ORACLE_CASES),100000) \
	    $(BIN)/python -m ipsecgate.lab.guest --timeout $(LIMIT) -- $(BIN)/python -m tests.system.oracle

clients: setup .venv/.ready-tests ## docs/clients.md's table, measured anew
	$(BIN)/python -m ipsecgate.lab.guest --timeout $(LIMIT) --results $(RESULTS) -- \
	    $(BIN)/python -m tests.clients.table $(CURDIR)/$(RESULTS)/clients.md
	$(BIN)/python -m tests.clients.table --into docs/clients.md $(RESULTS)/clients.md

# Half an hour and more. The hooks alone first, on this machine's own kernel if it takes them; then
# faults, a life under the hammer and rekeys, with real IKE and ESP. CHAOS_SEED repeats a run.
chaos: setup ## a thousand faults, a million connects, thousands of rekeys: nothing gets out
	$(BIN)/python -m tests.chaos.hammer
	$(BIN)/python -m ipsecgate.lab.guest --timeout $(if $(filter file,$(origin LIMIT)),5400,$(LIMIT)) -- \
	    $(BIN)/python -m tests.chaos

bench: setup ## measurements: ratios and medians, on this machine
	$(BIN)/python -m ipsecgate.lab.guest --timeout $(LIMIT) -- $(BIN)/python -m bench.first_connection
	$(BIN)/python -m bench.hold
	$(BIN)/python -m bench.packet

# Debian's Vagrant and libvirt in namespaces of their own; the box is made here, once (2 GB in .cache).
vagrant-test: setup ## a real `vagrant up` of vagrant/, first connections, a boot (slow)
	@tests/vagrant/run.sh

lint: setup ## style and types only (they are part of the tests, too)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean: ## remove what setup and tests made in this folder
	rm -rf .venv .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
