"""The hooks' bed on this machine's own kernel, for what the test kernel does not have."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from ipsecgate.edges.bpf import bytecode
from tests.system.bed import Bed
from tests.system.bed import bed as make_bed


@pytest.fixture(scope="module")
def module_bed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bed]:
    """A bed with a bpffs of its own."""
    name = request.module.__name__.rpartition("_")[2]
    folder = tmp_path_factory.mktemp(name)
    bytecode.get(folder)
    bpffs = folder / "bpf"
    bpffs.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", str(bpffs)], check=True)
    try:
        with make_bed(f"{name}-{os.getpid()}", folder, bpffs) as made:
            yield made
    finally:
        subprocess.run(["umount", str(bpffs)], check=True)


@pytest.fixture
def bed(module_bed: Bed) -> Bed:
    """The module's bed, as new."""
    module_bed.renew()
    return module_bed
