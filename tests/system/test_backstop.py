"""The packets themselves: in clear towards a protected flow none leaves, whoever made it.

What the hooks are never asked about is in `test_calls`, what poses as the kernel's own in
`test_forged`; real ESP in `test_gate` and `test_life`.
Here nothing is ESP but what says so: the way out is not the IKE daemon's device.
"""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from ipsecgate.core.layout import Entry, Reason, Setting, State, TableId
from ipsecgate.core.table import Rule, ternary
from tests.system.bed import HERE, OTHER, PEER, THERE, Bed, live, protect

DATAGRAM = 17
SPI = struct.pack("!I", 0xC0FFEE)


@pytest.fixture
def naked(bed: Bed) -> Bed:
    """The bed with a way out where nobody does ESP."""
    bed.data.set(Setting.TUN, 0)
    return bed


def v4(
    payload: bytes,
    proto: int = DATAGRAM,
    fragment: int = 0,
    to: str = PEER[4],
    options: bytes = b"",
) -> str:
    """Return the call that sends this IPv4 packet; the kernel fills in length and checksum."""
    ends = HERE[4].packed + ip_address(to).packed
    length = 0x45 + len(options) // 4
    header = struct.pack("!BBHHHBBH", length, 0, 0, 1, fragment, 64, proto, 0)
    return f"packet {(header + ends + options + payload).hex()}"


def v6(following: int, payload: bytes, to: str = PEER[6]) -> str:
    header = struct.pack("!IHBB", 6 << 28, len(payload), following, 64)
    return f"packet {(header + HERE[6].packed + ip_address(to).packed + payload).hex()}"


def udp(sport: int, dport: int, payload: bytes = b"payload!") -> bytes:
    return struct.pack("!HHHH", sport, dport, 8 + len(payload), 0) + payload


@pytest.mark.parametrize("family", [4, 6])
def test_a_socket_of_that_port_is_not_xfrm(bed: Bed, family: int) -> None:
    bed.publish(TableId.SPD, *live())
    call, here = f"kept connected {family}", f"{HERE[family]}#4500"
    assert bed.gated(call, PEER[family], bind=here) == ""
    bed.data.set(Setting.TUN, 0)
    assert bed.gated(call, PEER[family]) == "EPERM"
    bed.gated.forget()


@pytest.mark.parametrize(
    ("chain", "code"),
    [
        ([], ""),
        ([0], ""),
        ([0, 43, 60, 60], ""),
        ([44], ""),
        ([60] * 7, "EPERM"),
    ],
)
def test_the_ports_behind_ipv6s_headers_count(naked: Bed, chain: list[int], code: str) -> None:
    """And what is behind more of them than are looked at does not leave."""
    dns = ternary(THERE[6], proto=DATAGRAM, dport=(53, 0xFFFF))
    naked.publish(TableId.POLICY, Rule(dns, Entry(State.PROTECT)))

    def packet(dport: int) -> str:
        payload, following = udp(9000, dport), DATAGRAM
        for header in reversed(chain):
            payload = bytes([following, 0]) + bytes(6) + payload
            following = header
        return v6(following, payload)

    assert naked.gated(packet(53), PEER[6]) == "EPERM"
    assert naked.gated(packet(54), PEER[6]) == code
    assert naked.counted(Reason.BLOCK_CLEAR) == (0 if code else 1)
    assert naked.counted(Reason.BLOCK_UNREADABLE) == (2 if code else 0)


def test_later_fragments_do_not_leave(naked: Bed) -> None:
    assert naked.gated(v4(b"r", fragment=0x2000, to=OTHER[4]), OTHER[4]) == "EPERM", "too short"
    assert naked.gated(v4(udp(1, 2), fragment=0x2000, to=OTHER[4]), OTHER[4]) == ""
    assert naked.gated(v4(b"rest", fragment=1, to=OTHER[4]), OTHER[4]) == "EPERM"
    later = bytes([DATAGRAM, 0, 0, 8]) + bytes(4)
    assert naked.gated(v6(44, later + b"rest", to=OTHER[6]), OTHER[6]) == "EPERM"
    assert naked.counted(Reason.BLOCK_UNREADABLE) == 3


def test_a_source_route_does_not_leave(naked: Bed) -> None:
    """It names another destination than the header does: here the peer, behind a host between."""
    through, loose = OTHER[4], bytes([131, 7, 4]) + ip_address(PEER[4]).packed + b"\0"
    for options in (loose, bytes([1, 1, 1, 1]) + loose):  # behind some padding, too
        call = v4(udp(1, 2), to=through, options=options)
        assert naked.gated(call, through) == "EPERM"
    assert naked.gated(v4(bytes(8), 2, to=through, options=bytes([148, 4, 0, 0])), through) == ""
    peer = ip_address(PEER[6]).packed
    for left, code in ((1, "EPERM"), (0, "")):
        routing = bytes([DATAGRAM, 2, 2, left]) + bytes(4) + peer + udp(1, 2)
        assert naked.gated(v6(43, routing, to=OTHER[6]), OTHER[6]) == code
    assert naked.counted(Reason.BLOCK_UNREADABLE) == 3


def test_neighbour_discovery_passes_and_its_neighbours_do_not(naked: Bed) -> None:
    def hops(number: int) -> list[tuple[int, int, int]]:
        return [(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, number)]

    assert naked.gated("solicit", PEER[6], options=hops(255)) == ""
    assert naked.counted(Reason.BLOCK_CLEAR) == 0
    naked.gated("solicit", PEER[6], options=hops(64))
    assert naked.counted(Reason.BLOCK_CLEAR) == 1
    naked.gated("ping", PEER[6], options=hops(255))
    assert naked.counted(Reason.BLOCK_CLEAR) == 2


def test_the_policys_action_decides(naked: Bed) -> None:
    for state, code in ((State.BYPASS, ""), (State.DISCARD, "EPERM")):
        naked.publish(TableId.POLICY, Rule(ternary(THERE[4]), Entry(state)))
        assert naked.gated("raw", PEER[4]) == code
    assert naked.counted(Reason.BLOCK_DISCARD) == 1


def test_deny_is_for_what_was_never_asked(naked: Bed) -> None:
    assert naked.gated("kept connected 4", OTHER[4]) == ""
    naked.data.set(Setting.DENY, 1)
    assert naked.gated("raw", OTHER[4]) == "EPERM"
    assert naked.counted(Reason.BLOCK_DEFAULT) == 1
    assert naked.gated("kept connected 4", OTHER[4]) == "", "it was asked, at its time"
    naked.data.set(Setting.DENY, 0)
    assert [naked.gated("kept raw", OTHER[4]) for _ in range(2)] == ["", ""]
    naked.data.set(Setting.DENY, 1)
    assert naked.gated("kept raw", OTHER[4]) == "EPERM", "what it remembers is out of date"
    naked.gated.forget()


def test_a_socket_is_looked_at_again_when_policies_change(naked: Bed) -> None:
    """What it remembers is that its packets may leave in clear: of this generation."""
    for _ in range(3):
        assert naked.gated("kept connected 4", OTHER[4]) == ""
    everything = Rule(ternary(ip_network("0.0.0.0/0")), Entry(State.PROTECT))
    naked.publish(TableId.POLICY, everything)
    assert naked.gated("kept connected 4", OTHER[4]) == "EPERM"
    assert naked.counted(Reason.BLOCK_CLEAR) == 1
    naked.publish(TableId.POLICY, *protect())
    assert naked.gated("kept connected 4", OTHER[4]) == ""
    naked.gated.forget()


def test_the_ike_daemons_sockets_pass_and_nobody_elses(naked: Bed) -> None:
    naked.data.set(Setting.IKE_CGROUP, 0)
    naked.data.set(Setting.IKE, naked.gated.process.pid)
    for _ in range(3):
        assert naked.gated("kept sendto", PEER[4], 500) == ""
    assert naked.gated("sendto", PEER[6], 500) == ""
    assert naked.gated("raw", PEER[4]) == "EPERM", "a socket that never asked"
    naked.data.set(Setting.IKE_CGROUP, naked.cgroup.stat().st_ino + 1)
    assert naked.gated("sendto", PEER[4], 500) == "EPERM", "its pid, in another cgroup"
    naked.data.set(Setting.IKE_CGROUP, naked.cgroup.stat().st_ino)
    assert naked.gated("sendto", PEER[4], 500) == ""
    naked.data.set(Setting.IKE, naked.gated.process.pid + 1)
    assert naked.gated("kept sendto", PEER[4], 500) == "EPERM"
    naked.gated.forget()


def test_audit_blocks_nothing(naked: Bed) -> None:
    naked.data.set(Setting.AUDIT, 1)
    assert naked.gated("raw", PEER[4]) == ""
    assert naked.counted(Reason.BLOCK_CLEAR) == naked.counted(Reason.AUDITED_PACKETS) == 1
    naked.data.set(Setting.AUDIT, 0)
    assert naked.gated("raw", PEER[4]) == "EPERM"


@pytest.mark.parametrize("call", ["tcp", "sendto", "kept sendto"])
def test_a_permit_ends_by_itself(bed: Bed, call: str) -> None:
    """With nobody there to close it: an SA's hard lifetime is in the map."""

    def until(deadline: int) -> None:
        entry = Entry(State.LIVE, deadline=deadline)
        bed.publish(TableId.SPD, *(replace(rule, entry=entry) for rule in live()))

    until(int(time.time()) - 1)
    assert bed.gated(call, PEER[4]) == "EPERM"
    until(int(time.time()) + 3600)
    assert bed.data.table(TableId.SPD) is not None
    assert bed.gated(call, PEER[4]) in ("", "EINPROGRESS")
    for lifetime in (3, 9, 27):
        end = int(time.time()) + lifetime
        until(end)
        told = bed.gated(call, PEER[4])
        if time.time() < end:
            break  # it was asked in time
    assert told in ("", "EINPROGRESS")
    while time.time() < end + 0.1:
        time.sleep(0.05)
    assert bed.gated(call, PEER[4]) == "EPERM"
    bed.gated.forget()
