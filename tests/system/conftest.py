"""Fixtures of the system tests. They need root and a kernel with BPF and ESP; nothing skips."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipsecgate.edges.bpf import bytecode
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import Lab
from tests.system.hooked_cgroup import HookedCgroup, hooked_cgroup

# Asserts in these modules show their operands, as in tests.
pytest.register_assert_rewrite(
    "tests.system.observation", "tests.system.booted_systemd", "tests.system.systemd_host"
)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the compiled hooks: IPSECGATE_TEST_BYTECODE, or compiled once for all tests.

    Bytecode does not depend on the kernel, and compiling takes a minute under emulation.
    """
    ready = os.environ.get("IPSECGATE_TEST_BYTECODE")
    folder = Path(ready) if ready else tmp_path_factory.mktemp("bytecode")
    bytecode.get(folder)
    return folder


@pytest.fixture
def unique(request: pytest.FixtureRequest) -> str:
    """A name of the test's own for namespaces, cgroups and instances."""
    return f"t{abs(hash(request.node.nodeid)) % 10**8}"


@pytest.fixture(scope="module")
def module_hooked(request: pytest.FixtureRequest, cache: Path) -> Iterator[HookedCgroup]:
    """A hooked cgroup for the tests of a module."""
    name = f"{request.module.__name__.split('.')[-1].replace('_', '-')}-{os.getpid()}"
    with hooked_cgroup(name, cache) as made:
        yield made


@pytest.fixture
def hooked(module_hooked: HookedCgroup) -> HookedCgroup:
    """The module's hooked cgroup, reset."""
    module_hooked.renew()
    return module_hooked


@pytest.fixture
def lab(module_lab: Lab) -> Lab:
    """The module's lab (its own `module_lab`), reset."""
    module_lab.set_delay(0)
    module_lab.reset()
    return module_lab


@pytest.fixture(scope="module")
def module_gate(module_lab: Lab, cache: Path) -> Iterator[Gated]:
    """One gate for the tests of a module."""
    with Gated(module_lab, cache=cache) as gate:
        yield gate


@pytest.fixture
def gate(lab: Lab, module_gate: Gated) -> Gated:
    """A running gate without negotiations, SAs or held calls: the lab was reset."""
    if module_gate.process is None:
        module_gate.start()
    while any(n["state"] != "uncovered" for n in module_gate.ask()["negotiations"]):
        time.sleep(0.1)
    return module_gate
