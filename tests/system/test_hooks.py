"""The hooks with real system calls in a real cgroup, and tables written by hand.

Every refusal has a neighbour that must pass, and the counters come from the pinned map.
BPF_PROG_TEST_RUN does not exist for these programs.
"""

from __future__ import annotations

import errno
import socket
import time
from ipaddress import ip_network

import pytest

from ipsecgate.core.model.flow import HOST, FlowPath, Origin
from ipsecgate.core.tables.layout import Entry, Reason, Setting, State, TableId
from ipsecgate.core.tables.table import Rule, ternary
from tests.system.hooked_cgroup import (
    HERE,
    OTHER,
    PEER,
    THERE,
    HookedCgroup,
    live,
    protect,
    went_out,
)

CALLS = ("tcp", "udp connect", "sendto", "sendmsg")
SO_BINDTOIFINDEX = 62
AGAIN = 0.1  # seconds until the same flow is reported again: GATE_EVENT_INTERVAL_NS
FORMS = {
    "v4": (4, "{}"),
    "v6": (6, "{}"),
    "v4-mapped": (4, "::ffff:{}"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("call", CALLS)
def test_every_call_is_gated(hooked: HookedCgroup, call: str, form: str) -> None:
    family, text = FORMS[form]
    peer, other = text.format(PEER[family]), text.format(OTHER[family])

    assert hooked.gated(call, peer) == "EPERM"
    assert hooked.counted(Reason.REFUSE_UNCOVERED) == 1
    assert went_out(hooked.free(call, peer)), "it is not in the cgroup"
    assert went_out(hooked.gated(call, other)), "no policy names it"
    assert hooked.counted(Reason.ALLOW_DEFAULT) == 1

    hooked.publish(TableId.SPD, *live())
    assert went_out(hooked.gated(call, peer))
    assert hooked.counted(Reason.ALLOW_COVERED) == 1
    hooked.publish(TableId.SPD)
    assert hooked.gated(call, peer) == "EPERM"


def test_a_refusal_is_reported_with_its_flow(hooked: HookedCgroup) -> None:
    began = time.monotonic()
    for _ in range(5):
        hooked.gated("tcp", "::ffff:" + PEER[4], 443)
    again = (time.monotonic() - began) // AGAIN
    hooked.gated("tcp", PEER[6], 443)
    hooked.data.drain()
    flows = [str(r.flow) for r in hooked.refusals]
    assert 1 <= flows.count(f"tcp {PEER[4]}:443") <= 1 + again, "once per flow and interval"
    assert flows[-1] == f"tcp [{PEER[6]}]:443"
    first = hooked.refusals[0]
    assert (first.reason, first.policy, first.flow.saddr) == (Reason.REFUSE_UNCOVERED, 4, None)
    assert first.cgroup == hooked.cgroup.stat().st_ino
    assert first.pid == hooked.gated.process.pid
    assert first.comm.startswith("python")


LOOPBACK = ("127.0.0.1", "127.255.255.254", "::1", "::ffff:127.0.0.1", "0.0.0.0", "::")
BESIDE_LOOPBACK = ("126.255.255.255", "128.0.0.0", "255.0.0.1", "::2", "::ffff:128.0.0.1")


def test_only_loopback_is_exempt(hooked: HookedCgroup) -> None:
    hooked.data.set(Setting.DENY, 1)
    for address in LOOPBACK:
        assert hooked.gated("tcp", address) in ("EINPROGRESS", "ECONNREFUSED"), address
    assert hooked.counted(Reason.ALLOW_EXEMPT) == len(LOOPBACK)
    for address in (*BESIDE_LOOPBACK, *OTHER.values()):
        assert hooked.gated("tcp", address) == "EPERM", address
    assert hooked.counted(Reason.REFUSE_DEFAULT) == len(BESIDE_LOOPBACK) + len(OTHER)


def test_the_source_address_decides(hooked: HookedCgroup) -> None:
    hooked.publish(TableId.SPD, *live())
    assert went_out(hooked.gated("tcp", PEER[4], bind=str(HERE[4])))
    assert hooked.gated("tcp", PEER[4], bind="198.51.100.77") == "EPERM"
    hooked.data.set_paths(HOST, [])
    assert hooked.gated("tcp", PEER[4]) == "EPERM"
    assert hooked.counted(Reason.REFUSE_NO_SOURCE) == 1
    assert went_out(hooked.gated("tcp", PEER[4], bind=str(HERE[4])))


def test_a_marked_flow_is_matched_and_routed_by_its_mark(hooked: HookedCgroup) -> None:
    mark = [(socket.SOL_SOCKET, socket.SO_MARK, 5)]
    source = str(HERE[4])
    marked = ternary(THERE[4], src=ip_network(source), mark=(5, 0xFF))
    hooked.publish(TableId.SPD, Rule(marked, Entry(State.DEAD)), *live())
    assert went_out(hooked.gated("tcp", PEER[4], bind=source))
    assert hooked.gated("tcp", PEER[4], bind=source, options=mark) == "EPERM"
    assert hooked.counted(Reason.REFUSE_UNCOVERED) == 1
    hooked.publish(TableId.SPD, *live())
    assert went_out(hooked.gated("tcp", PEER[4], bind=source, options=mark))
    assert went_out(hooked.gated("tcp", PEER[4], options=mark))
    # A routing rule asks for the mark, and may lead to another source, which is not known yet.
    hooked.data.set(Setting.MARKS, 0xF)
    assert hooked.gated("tcp", PEER[4], options=mark) == "EPERM"
    assert hooked.counted(Reason.REFUSE_NO_SOURCE) == 1
    hooked.data.set_paths(Origin(mark=5), [(THERE[4], FlowPath(HERE[4]))])
    assert went_out(hooked.gated("tcp", PEER[4], options=mark))
    hooked.data.set(Setting.MARKS, 0)
    hooked.data.set_paths(Origin(mark=5), [])


def test_a_flow_in_another_network_namespace_is_refused(hooked: HookedCgroup) -> None:
    hooked.publish(TableId.SPD, *live())
    assert went_out(hooked.gated("tcp", PEER[4]))
    hooked.data.set(Setting.NETNS, hooked.netns + 1)
    assert hooked.gated("tcp", PEER[4]) == "EPERM"
    assert hooked.counted(Reason.REFUSE_NETNS) == 1
    assert went_out(hooked.gated("tcp", OTHER[4]))


def test_an_own_address_is_exempt(hooked: HookedCgroup) -> None:
    own = ip_network(HERE[4])
    hooked.data.set_paths(HOST, [(own, FlowPath(HERE[4])), (THERE[4], FlowPath(HERE[4]))])
    hooked.publish(TableId.POLICY, Rule(ternary(ip_network("0.0.0.0/0")), Entry(State.PROTECT)))
    assert hooked.gated("tcp", str(HERE[4])) in ("EINPROGRESS", "ECONNREFUSED")
    assert hooked.counted(Reason.ALLOW_EXEMPT) == 1
    assert hooked.gated("tcp", PEER[4]) == "EPERM"


def test_only_dhcp_clients_are_exempt(hooked: HookedCgroup) -> None:
    """The client ports are privileged, so only a privileged process can use them."""
    hooked.data.set(Setting.DENY, 1)
    broadcast = [(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)]
    link = [(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, hooked.link)]

    def send(address: str, port: int, source: int) -> str:
        six = ":" in address
        bind, options = ("::" if six else "0.0.0.0", link if six else broadcast)
        return hooked.gated("sendto", address, port, bind=f"{bind}#{source}", options=options)

    assert send("255.255.255.255", 67, 68) == ""
    assert send("ff02::1:2", 547, 546) == ""
    assert hooked.counted(Reason.ALLOW_EXEMPT) == 2
    assert sum(hooked.counted(reason) for reason in Reason if reason.name.startswith("BLOCK")) == 0
    for neighbour in (
        ("255.255.255.255", 68, 68),
        ("255.255.255.254", 67, 68),
        ("255.255.255.255", 67, 0),
        ("255.255.255.255", 67, 67),
        ("ff02::1:3", 547, 546),
        ("ff05::1:2", 547, 546),
        ("ff02::1:2", 547, 0),
        ("ff02::1:2", 547, 547),
    ):
        assert send(*neighbour) == "EPERM", neighbour


def test_bypass_and_discard_apply_whatever_the_coverage(hooked: HookedCgroup) -> None:
    narrow = ternary(ip_network("203.0.113.9/32"), proto=6, dport=(80, 0xFFFF))
    hooked.publish(TableId.POLICY, Rule(narrow, Entry(State.BYPASS)), *protect())
    assert hooked.gated("tcp", PEER[4], 80) == "EINPROGRESS"
    assert hooked.gated("tcp", PEER[4], 81) == "EPERM"
    hooked.publish(TableId.POLICY, Rule(narrow, Entry(State.DISCARD)), *protect())
    hooked.publish(TableId.SPD, *live())
    assert hooked.gated("tcp", PEER[4], 80) == "EPERM"
    assert hooked.gated("tcp", PEER[4], 81) == "EINPROGRESS"


@pytest.mark.parametrize("name", ["EHOSTUNREACH", "ETIMEDOUT", "EACCES"])
@pytest.mark.parametrize("call", CALLS)
def test_the_caller_gets_the_errno_of_the_policy(
    hooked: HookedCgroup, call: str, name: str
) -> None:
    entry = Entry(State.PROTECT, getattr(errno, name))
    hooked.publish(TableId.POLICY, *(Rule(ternary(THERE[f]), entry) for f in (4, 6)))
    for address in PEER.values():
        assert hooked.gated(call, address) == name


def test_audit_mode_counts_and_refuses_nothing(hooked: HookedCgroup) -> None:
    hooked.data.set(Setting.AUDIT, 1)
    assert went_out(hooked.gated("tcp", PEER[4]))
    assert hooked.counted(Reason.REFUSE_UNCOVERED) == hooked.counted(Reason.AUDITED) == 1
    hooked.data.set(Setting.AUDIT, 0)
    assert hooked.gated("tcp", PEER[4]) == "EPERM"


def test_only_the_ike_daemon_is_exempt(hooked: HookedCgroup) -> None:
    hooked.data.set(Setting.IKE_CGROUP, hooked.cgroup.stat().st_ino)
    hooked.data.set(Setting.IKE, hooked.gated.process.pid)
    assert hooked.gated("sendto", PEER[4], 500) == ""
    assert hooked.counted(Reason.ALLOW_EXEMPT) == 1
    hooked.data.set(Setting.IKE, hooked.gated.process.pid + 1)
    assert hooked.gated("sendto", PEER[4], 500) == "EPERM"
