"""A hooked cgroup on this machine's own kernel, for features that the test kernel lacks."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from ipsecgate.edges.bpf import bytecode
from tests.system.hooked_cgroup import HookedCgroup, hooked_cgroup


@pytest.fixture(scope="module")
def module_hooked(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HookedCgroup]:
    """A hooked cgroup for the tests of a module, with its own bpffs."""
    name = request.module.__name__.rpartition("_")[2]
    folder = tmp_path_factory.mktemp(name)
    bytecode.get(folder)
    bpffs = folder / "bpf"
    bpffs.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", str(bpffs)], check=True)
    try:
        with hooked_cgroup(f"{name}-{os.getpid()}", folder, bpffs) as made:
            yield made
    finally:
        subprocess.run(["umount", str(bpffs)], check=True)


@pytest.fixture
def hooked(module_hooked: HookedCgroup) -> HookedCgroup:
    """The module's hooked cgroup, reset."""
    module_hooked.renew()
    return module_hooked
