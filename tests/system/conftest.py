"""What the system tests share. They need root and a kernel with BPF and ESP: nothing skips."""

from __future__ import annotations

from pathlib import Path

import pytest

from ipsecgate.edges import bytecode


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hooks compiled once for all tests."""
    folder = tmp_path_factory.mktemp("bytecode")
    bytecode.get(folder)
    return folder


@pytest.fixture
def unique(request: pytest.FixtureRequest) -> str:
    """A name for namespaces, cgroups and instances: the test's own."""
    return f"t{abs(hash(request.node.nodeid)) % 10**8}"
