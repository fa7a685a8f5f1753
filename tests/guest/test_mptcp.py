"""MPTCP on this machine's kernel, because the test kernel lacks it. The hooks need no ESP."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ipsecgate.core.tables.layout import Reason, TableId
from tests.system.hooked_cgroup import OTHER, PEER, HookedCgroup, live, went_out

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="missing: root"),
    pytest.mark.skipif(
        not Path("/proc/sys/net/mptcp/enabled").exists(), reason="missing: MPTCP in the kernel"
    ),
]


@pytest.mark.parametrize("form", ["{4}", "{6}", "::ffff:{4}"])
def test_mptcp_is_gated(hooked: HookedCgroup, form: str) -> None:
    peer, other = (form.replace("{4}", a[4]).replace("{6}", a[6]) for a in (PEER, OTHER))
    assert hooked.gated("mptcp", peer) == "EPERM"
    assert hooked.counted(Reason.REFUSE_UNCOVERED) == 1
    assert went_out(hooked.free("mptcp", peer))
    assert went_out(hooked.gated("mptcp", other))
    hooked.publish(TableId.SPD, *live())
    assert went_out(hooked.gated("mptcp", peer))
