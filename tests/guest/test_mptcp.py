"""MPTCP on this machine's kernel: the test kernel has none. The hooks need no ESP."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipsecgate.core.layout import Reason, TableId
from ipsecgate.edges import bytecode
from tests.system.bed import OTHER, PEER, Bed, live, went_out
from tests.system.bed import bed as make_bed

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="missing: root"),
    pytest.mark.skipif(
        not Path("/proc/sys/net/mptcp/enabled").exists(), reason="missing: MPTCP in the kernel"
    ),
]


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    folder = tmp_path_factory.mktemp("mptcp")
    bytecode.get(folder)
    bpffs = folder / "bpf"
    bpffs.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", str(bpffs)], check=True)
    try:
        with make_bed(f"mptcp-{os.getpid()}", folder, bpffs) as made:
            yield made
    finally:
        subprocess.run(["umount", str(bpffs)], check=True)


@pytest.mark.parametrize("form", ["{4}", "{6}", "::ffff:{4}"])
def test_mptcp_is_gated(bed: Bed, form: str) -> None:
    peer, other = (form.replace("{4}", a[4]).replace("{6}", a[6]) for a in (PEER, OTHER))
    bed.renew()
    assert bed.gated("mptcp", peer) == "EPERM"
    assert bed.counted(Reason.REFUSE_UNCOVERED) == 1
    assert went_out(bed.free("mptcp", peer))
    assert went_out(bed.gated("mptcp", other))
    bed.publish(TableId.SPD, *live())
    assert went_out(bed.gated("mptcp", peer))
