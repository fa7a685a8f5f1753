"""Every way to send: gated by the hooks, or blocked by the backstop.

The cases follow the kernel's own selftests for these hooks (sock_addr). docs/protected.md lists
the calls that no hook sees; the tests here keep that list true.
"""

from __future__ import annotations

import socket

import pytest

from ipsecgate.core.tables.layout import Reason, TableId
from tests.system.caller import has_udplite
from tests.system.hooked_cgroup import ELSEWHERE, HERE, OTHER, PEER, HookedCgroup, live, went_out

FAMILIES = (4, 6)
GATED = (
    "tcp",
    "udp connect",
    "sendto",
    "sendmsg",
    "sendmmsg",
    "fastopen",
    "uring connect",
    "uring sendmsg",
)
NOT_GATED = ("udplite", "raw", "ping", "sctp")


@pytest.mark.parametrize("family", [*FAMILIES, "mapped"])
@pytest.mark.parametrize("call", GATED)
def test_every_call_that_the_hooks_see_is_gated(
    hooked: HookedCgroup, call: str, family: int | str
) -> None:
    text = "::ffff:{}" if family == "mapped" else "{}"
    version = 4 if family == "mapped" else int(family)
    peer, other = text.format(PEER[version]), text.format(OTHER[version])
    assert hooked.gated(call, peer) == "EPERM"
    assert hooked.counted(Reason.REFUSE_UNCOVERED) >= 1
    assert went_out(hooked.free(call, peer))
    assert went_out(hooked.gated(call, other))
    hooked.publish(TableId.SPD, *live())
    assert went_out(hooked.gated(call, peer))
    assert hooked.counted(Reason.ALLOW_COVERED) + hooked.counted(Reason.ALLOW_ASSOCIATED) >= 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("call", NOT_GATED)
def test_calls_that_no_hook_sees_are_blocked_by_the_backstop(
    hooked: HookedCgroup, call: str, family: int
) -> None:
    if call == "udplite" and not has_udplite():
        pytest.skip("missing: UDP-Lite in the kernel (removed in Linux 7.3)")
    before = sum(hooked.data.counters().values())
    assert went_out(hooked.gated(call, PEER[family]))
    assert sum(hooked.data.counters().values()) == before, "no hook was called"
    hooked.data.set_tunnels(())
    # SCTP retries by itself, and IPv6 ping sockets ignore the result of sending.
    silent = {("sctp", 4): "EINPROGRESS", ("sctp", 6): "EINPROGRESS", ("ping", 6): ""}
    assert hooked.gated(call, PEER[family]) == silent.get((call, family), "EPERM")
    assert hooked.counted(Reason.BLOCK_CLEAR) == 1
    assert sum(hooked.data.counters().values()) == before + 1
    assert went_out(hooked.gated(call, OTHER[family])), "no policy names it"
    assert went_out(hooked.free(call, PEER[family])), "outside the cgroup nothing is blocked"
    hooked.data.drain()
    (told_of,) = hooked.refusals
    assert (told_of.reason, told_of.policy, told_of.pid) == (Reason.BLOCK_CLEAR, family, 0)
    assert told_of.cgroup == hooked.cgroup.stat().st_ino
    assert (str(told_of.flow.daddr), bool(told_of.flow.saddr)) == (PEER[family], True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_connected_socket_is_checked_by_the_hooks_only_at_connect(
    hooked: HookedCgroup, family: int
) -> None:
    hooked.publish(TableId.SPD, *live())
    assert hooked.gated(f"kept connected {family}", PEER[family]) == ""
    hooked.publish(TableId.SPD)
    assert hooked.gated(f"kept connected {family}", PEER[family]) == ""
    hooked.data.set_tunnels(())  # in clear from now on: the backstop decides
    assert hooked.gated(f"kept connected {family}", PEER[family]) == "EPERM"
    assert hooked.counted(Reason.BLOCK_CLEAR) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_source_of_a_datagram_from_pktinfo_decides(hooked: HookedCgroup, family: int) -> None:
    """IP_PKTINFO names the source of one datagram, whatever the socket is bound to."""
    hooked.publish(TableId.SPD, *live())
    assert hooked.gated("pktinfo", f"{PEER[family]}%{HERE[family]}") == ""
    assert hooked.gated("pktinfo", f"{PEER[family]}%{ELSEWHERE[family]}") == "EPERM"
    assert hooked.counted(Reason.REFUSE_UNCOVERED) == 1


@pytest.mark.parametrize("call", ["tcp", "sendto", "sendmsg", "uring connect"])
def test_the_unspecified_address_is_loopback(hooked: HookedCgroup, call: str) -> None:
    for address in ("0.0.0.0", "::", "::ffff:0.0.0.0"):
        assert hooked.gated(call, address) in ("", "EINPROGRESS", "ECONNREFUSED"), address
    assert hooked.counted(Reason.ALLOW_EXEMPT) + hooked.counted(Reason.ALLOW_DEFAULT) >= 3


def test_v6only_sockets_cannot_reach_a_mapped_peer_at_all(hooked: HookedCgroup) -> None:
    only = [(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)]
    hooked.publish(TableId.SPD, *live())
    assert hooked.gated("tcp", f"::ffff:{PEER[4]}", options=only) in ("ENETUNREACH", "EPERM")
