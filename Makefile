# The commands of this project. The first target that needs something installs it; see packaging/setup.sh.
SHELL := /bin/bash
BIN := .venv/bin
RESULTS := .cache/results
# Timeout in seconds for each run in the guest.
LIMIT ?= 2400
# Extra arguments for pytest, for example ARGS="-k ike -x".
ARGS ?=

.PHONY: help setup install install-program install-script install-files installed reference package package-test fleet-test image image-test demo test test-debian13 qemu test-qemu matrix test-host fuzz chaos hub clients screens test-screens bench vagrant-test lint clean

help: ## show this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup: .venv/.ready ## install what is missing (as root; asks nothing)

.venv/.ready: packaging/setup.sh pyproject.toml constraints.txt
	@packaging/setup.sh
	@touch $@

# Real clients, their servers and container runtimes, for the tests only.
.venv/.ready-tests: .venv/.ready packaging/setup.sh $(wildcard tests/clients/*.go tests/clients/*.java)
	@packaging/setup.sh tests
	@touch $@

# DESTDIR is the root of a package. This enables and starts nothing; use systemctl for that.
DESTDIR ?=
PREFIX ?= /usr
LIB = $(DESTDIR)$(PREFIX)/lib/ipsecgate
SHARE = $(DESTDIR)$(PREFIX)/share
UNITS = $(DESTDIR)$(PREFIX)/lib/systemd/system

# The Debian package uses these targets, too: with its own PYTHON, and without SETUP.
PYTHON ?= $(BIN)/python
SETUP ?= setup

install: install-program install-files ## install the program, units, completions and man pages below DESTDIR

install-program: setup install-script
	@install -d $(LIB)
	@$(BIN)/pip install --quiet --upgrade --no-warn-conflicts -c constraints.txt --target $(LIB) .
	@/usr/bin/python3 -I -c 'import sys; sys.path.insert(0, sys.argv[1]); \
	    from ipsecgate.edges.bpf import bytecode; bytecode.ship()' $(LIB)

install-script:
	@install -d $(DESTDIR)$(PREFIX)/bin
	@sed 's,@lib@,$(PREFIX)/lib/ipsecgate,' packaging/ipsecgate.in >$(DESTDIR)$(PREFIX)/bin/ipsecgate
	@chmod 755 $(DESTDIR)$(PREFIX)/bin/ipsecgate

install-files: $(SETUP)
	@install -d $(UNITS) $(SHARE)/man/man8 $(SHARE)/man/man5 $(SHARE)/bash-completion/completions \
	    $(SHARE)/zsh/vendor-completions $(SHARE)/fish/vendor_completions.d
	@for unit in packaging/systemd/*.*; do \
	    sed 's,@bindir@,$(PREFIX)/bin,' $$unit >$(UNITS)/$${unit##*/}; done
	@install -D -m 644 -t $(SHARE)/ipsecgate/monitoring packaging/monitoring/*
	@$(PYTHON) -m ipsecgate.cli.manual man >$(SHARE)/man/man8/ipsecgate.8
	@$(PYTHON) -m ipsecgate.cli.manual man5 >$(SHARE)/man/man5/ipsecgate.toml.5
	@$(PYTHON) -m ipsecgate.cli.manual bash >$(SHARE)/bash-completion/completions/ipsecgate
	@$(PYTHON) -m ipsecgate.cli.manual zsh >$(SHARE)/zsh/vendor-completions/_ipsecgate
	@$(PYTHON) -m ipsecgate.cli.manual fish >$(SHARE)/fish/vendor_completions.d/ipsecgate.fish

reference: setup ## write the reference of the configuration into docs/operating.md
	$(BIN)/python -m ipsecgate.cli.manual reference docs/operating.md

# tests/system/test_systemd.py boots with this root. It is made here, because the guest has no pip index.
INSTALLED := .cache/root
PROGRAM := $(shell find ipsecgate bpf packaging -type f ! -name '*.pyc') pyproject.toml constraints.txt

installed: $(INSTALLED).ready ## make a root with the program as `make install` leaves it, for the tests

$(INSTALLED).ready: .venv/.ready $(PROGRAM) Makefile
	@rm -rf $(INSTALLED)
	@$(MAKE) --silent install DESTDIR=$(INSTALLED)
	@touch $@

package: ## build wheel, sdist, SBOM and the Debian packages in dist/ (as root)
	@packaging/package.sh $(RELEASES)

# RELEASES="trixie" selects Debian releases. A root of each is made once (1 GB in the lab's cache).
RELEASES ?=

package-test: setup ## build it all twice, install it in clean places, upgrade, downgrade, remove, purge
	@tests/package/run.sh $(RELEASES)

# Ansible comes from PyPI into .cache/fleet, and the root of the hosts from the mirror that apt uses.
HOSTS ?= 20

fleet-test: setup ## roll packaging/ansible out to HOSTS=20 hosts, each with a systemd of its own (as root)
	@tests/fleet/run.sh $(HOSTS)

image: setup ## build the container image dist/ipsecgate-image.tar (as root; needs no registry)
	@packaging/setup.sh image
	@packaging/package.sh trixie
	@packaging/image/build.sh dist/trixie/*.deb

# First on this machine's own kernel, in a room, without ESP; then where there is ESP.
image-test: setup ## build the image; run it as the DaemonSet does, beside Docker and containerd
	@packaging/setup.sh image-tests
	@OUT=.cache/image LINTIAN=no packaging/package.sh trixie
	@packaging/image/build.sh .cache/image/trixie/*.deb .cache/image/ipsecgate-image.tar
	$(BIN)/python -m ipsecgate.lab.room -- $(BIN)/pytest tests/image/test_native.py $(ARGS)
	$(BIN)/python -m ipsecgate.lab.guest --timeout $(LIMIT) --results $(RESULTS) -- \
	    $(BIN)/pytest tests/image/test_node.py tests/image/test_docker.py $(ARGS)

demo: setup ## show first connections with and without the gate: two hosts, real IKE, real ESP
	@$(BIN)/ipsecgate demo

# The system tests need a kernel with ESP: a room if this machine's kernel has it, else a guest
# (user-mode-linux). A guest has one CPU, so run two at a time; the marker second_guest splits the files.
# With a single CPU, run them in turn, because two at a time would only disturb each other.
GUEST = $(BIN)/python -m ipsecgate.lab.guest --timeout $(LIMIT) --results $(RESULTS) -- \
    $(BIN)/pytest tests/system $(ARGS)

test: setup .venv/.ready-tests installed ## run the whole test suite
	$(BIN)/pytest tests/unit tests/fuzz tests/guest --junitxml=$(RESULTS)/unit.xml $(ARGS)
	@mkdir -p $(RESULTS); \
	$(GUEST) -m second_guest --junitxml=$(RESULTS)/second-guest.xml >$(RESULTS)/second-guest.log 2>&1 & \
	background=$$!; [ "$$(nproc)" -gt 1 ] || wait $$background; \
	$(GUEST) -m "not second_guest" --junitxml=$(RESULTS)/first-guest.xml; \
	first=$$?; wait $$background; second=$$?; cat $(RESULTS)/second-guest.log; \
	exit $$((first ? first : second))

# On any Debian: strongSwan 6, Python 3.13, BCC 0.31, user-mode-linux 6.12.
test-debian13: ## run demo and test in a fresh root of Debian 13
	@tests/debian13.sh

# Not part of `make test`: only this needs QEMU and Debian's kernel (470 MB in the lab's cache). It runs
# three guests in turn: for the hooks, for the gate on two hosts, and for NAT by nftables, which
# user-mode-linux lacks. Each first shows its kernel.
# The hooks are compiled beforehand, because that takes a minute under emulation.
QEMU_HOOKS := @tests/qemu/hooks.list
QEMU_GATE := @tests/qemu/gate.list
QEMU_NAT := @tests/qemu/nat.list
QEMU_LIMIT ?= 1800
BYTECODE := $(CURDIR)/.cache/bytecode
QEMU = IPSECGATE_TEST_BYTECODE=$(BYTECODE) $(BIN)/python -m ipsecgate.lab.guest --kernel qemu \
    --timeout $(QEMU_LIMIT) --results $(RESULTS) -- $(BIN)/pytest tests/qemu/test_kernel.py \
    --durations=5 $(ARGS)

# The programs that unpack and boot Debian's kernels, and the compiled hooks.
qemu: setup
	@command -v qemu-system-x86_64 >/dev/null && command -v zstd >/dev/null || \
	    DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends \
	    qemu-system-x86 zstd
	$(BIN)/python -c 'import pathlib, sys, ipsecgate.edges.bpf.bytecode as b; b.get(pathlib.Path(sys.argv[1]))' \
	    $(BYTECODE)

test-qemu: qemu ## test the hooks and the gate on Debian's kernel under QEMU, with BPF JIT (slow)
	$(BIN)/python -m ipsecgate.lab.debian
	$(BIN)/pytest tests/qemu/test_boot.py --junitxml=$(RESULTS)/qemu-boot.xml
	$(QEMU) $(QEMU_HOOKS) --junitxml=$(RESULTS)/qemu-hooks.xml
	$(QEMU) $(QEMU_GATE) --junitxml=$(RESULTS)/qemu-gate.xml
	$(QEMU) $(QEMU_NAT) --junitxml=$(RESULTS)/qemu-nat.xml

# `make demo` and `make test` on a host whose own kernel has ESP, with systemd, an IKE daemon with an
# SA, and a gate, none of which may change. The host is user-mode-linux, or with HOST_KERNEL=qemu
# Debian's kernel, emulated, which takes many hours. HOST="'make demo'" runs less. `lint` comes first,
# because mypy without its cache needs more memory than user-mode-linux gives to one process.
HOST_KERNEL ?= uml

test-host: .venv/.ready-tests installed lint $(HOST_KERNEL:uml=) ## run demo and test on a host whose kernel has ESP (an hour)
	$(BIN)/python -m tests.host --kernel $(HOST_KERNEL) $(HOST)

# The same two lists on user-mode-linux and on the kernels of several Debian releases, in turn.
# MATRIX="trixie" selects some of them. The table is in the README.
matrix: qemu ## run the kernel-facing tests on several kernels, and write the README's table (very slow)
	@command -v qemu-system-aarch64 >/dev/null && command -v mmdebstrap >/dev/null || \
	    DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends \
	    qemu-system-arm mmdebstrap
	$(BIN)/python -m tests.matrix --into README.md $(MATRIX)

# First 100,000 libFuzzer inputs for each decoder, on this kernel and without root (see python -m
# tests.fuzz --help); then 100,000 flows in worlds of up to 300 masks in the guest, in a few minutes.
# ORACLE_SEED repeats a run, ORACLE_CASES sets the number of flows.
FUZZ ?= --inputs 100000

fuzz: setup ## feed damaged input to every decoder; compare random SPDs, SADs and flows with the kernel
	$(BIN)/python -m tests.fuzz $(FUZZ)
	ORACLE_CASES=$(or $(ORACLE_CASES),100000) \
	    $(BIN)/python -m ipsecgate.lab.guest --timeout $(LIMIT) -- $(BIN)/python -m tests.system.oracle

clients: setup .venv/.ready-tests ## measure the table in docs/clients.md again
	$(BIN)/python -m ipsecgate.lab.guest --timeout $(LIMIT) --results $(RESULTS) -- \
	    $(BIN)/python -m tests.clients.table $(CURDIR)/$(RESULTS)/clients.md
	$(BIN)/python -m tests.clients.table --into docs/clients.md $(RESULTS)/clients.md

# Every screen in two widths and two themes is in $(RESULTS)/screens/index.html.
screens: setup ## draw the pictures of docs/screens.md again, from a gate in the lab
	$(BIN)/python -m ipsecgate.lab.guest --timeout $(LIMIT) --results $(RESULTS)/screens -- \
	    $(BIN)/python -m tests.screens record $(CURDIR)/$(RESULTS)/screens/recorded.json
	$(BIN)/python -m tests.screens draw $(RESULTS)/screens/recorded.json $(RESULTS)/screens
	$(BIN)/python -m tests.screens docs $(RESULTS)/screens/recorded.json

# Not part of `make test`: what fails on a busy machine is the picture of a negotiation under way.
test-screens: setup ## compare the pictures of docs/screens.md with what the commands show now
	$(BIN)/python -m ipsecgate.lab.guest --timeout $(LIMIT) --results $(RESULTS) -- \
	    $(BIN)/pytest tests/screens/test_pictures.py $(ARGS)

# This takes more than half an hour. First the hooks alone, on this machine's own kernel if possible;
# then, with real IKE and ESP: faults, restarts under constant load, and rekeys. CHAOS_SEED repeats a run.
chaos: setup ## check that nothing leaks in a thousand faults, a million connects, thousands of rekeys
	$(BIN)/python -m tests.chaos.hammer
	$(BIN)/python -m ipsecgate.lab.guest --timeout $(if $(filter file,$(origin LIMIT)),5400,$(LIMIT)) -- \
	    $(BIN)/python -m tests.chaos

# Real IKE and ESP, in the guest: 500 sites and 2,000 road warriors, 50 of them up. HUB_SEED repeats a
# run, HUB_SITES and the others of python -m tests.hub set the size.
hub: setup ## check a hub of 2,500 tunnels: rekeys, lost SAs and a dying controller under traffic
	$(BIN)/python -m ipsecgate.lab.guest --timeout $(LIMIT) -- $(BIN)/python -m tests.hub

.venv/.ready-docs: .venv/.ready tests/site/requirements.txt
	@$(BIN)/pip install --quiet --no-warn-conflicts -c constraints.txt -r tests/site/requirements.txt
	@touch $@

.PHONY: docs
docs: .venv/.ready-docs ## build the documentation as a site in .cache/site, and check every link
	@$(BIN)/python -m tests.site .cache/site

.venv/.ready-bench: .venv/.ready
	@packaging/setup.sh bench
	@touch $@

# Takes about an hour; leave the machine alone meanwhile. BENCH="hot_path growth" selects parts, and
# BENCH="--quick" is the short form. The reports are in $(RESULTS)/bench.
BENCH ?=

bench: setup .venv/.ready-bench ## measure everything on this machine; write docs/performance.md
	$(BIN)/python -m bench --into docs --results $(RESULTS)/bench $(BENCH)

# Runs Debian's Vagrant and libvirt in new namespaces; the box is built once (2 GB in .cache).
vagrant-test: setup ## test vagrant/ with a real `vagrant up`, first connections and a boot (slow)
	@tests/vagrant/run.sh

lint: setup ## check style and types only (`make test` does that, too)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean: ## remove everything that setup and tests created in this folder
	rm -rf .venv .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
