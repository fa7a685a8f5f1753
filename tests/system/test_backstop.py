"""The backstop: no packet of a protected flow leaves in clear, however it was made.

`test_calls` has the calls that no hook sees, `test_forged` packets that pose as the kernel's own,
`test_gate` and `test_life` real ESP. Here the outgoing link is not the IKE daemon's device.
"""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from ipsecgate.core.tables.layout import Entry, Reason, Setting, State, TableId
from ipsecgate.core.tables.table import Rule, ternary
from tests.system.hooked_cgroup import HERE, OTHER, PEER, THERE, HookedCgroup, live, protect

DATAGRAM = 17
SPI = struct.pack("!I", 0xC0FFEE)


@pytest.fixture
def naked(hooked: HookedCgroup) -> HookedCgroup:
    """The hooked cgroup with a link that does not lead to an IKE daemon."""
    hooked.data.set_tunnels(())
    return hooked


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
def test_a_socket_bound_to_port_4500_is_not_taken_for_esp(
    hooked: HookedCgroup, family: int
) -> None:
    hooked.publish(TableId.SPD, *live())
    call, here = f"kept connected {family}", f"{HERE[family]}#4500"
    assert hooked.gated(call, PEER[family], bind=here) == ""
    hooked.data.set_tunnels(())
    assert hooked.gated(call, PEER[family]) == "EPERM"
    hooked.gated.forget()


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
def test_ports_are_read_behind_ipv6_extension_headers(
    naked: HookedCgroup, chain: list[int], code: str
) -> None:
    """A packet with more headers than the program reads is blocked."""
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


def test_later_fragments_are_blocked(naked: HookedCgroup) -> None:
    assert naked.gated(v4(b"r", fragment=0x2000, to=OTHER[4]), OTHER[4]) == "EPERM", "too short"
    assert naked.gated(v4(udp(1, 2), fragment=0x2000, to=OTHER[4]), OTHER[4]) == ""
    assert naked.gated(v4(b"rest", fragment=1, to=OTHER[4]), OTHER[4]) == "EPERM"
    later = bytes([DATAGRAM, 0, 0, 8]) + bytes(4)
    assert naked.gated(v6(44, later + b"rest", to=OTHER[6]), OTHER[6]) == "EPERM"
    assert naked.counted(Reason.BLOCK_UNREADABLE) == 3


def test_a_source_route_is_blocked(naked: HookedCgroup) -> None:
    """It names another destination than the header: here the peer, behind an intermediate host."""
    through, loose = OTHER[4], bytes([131, 7, 4]) + ip_address(PEER[4]).packed + b"\0"
    for options in (loose, bytes([1, 1, 1, 1]) + loose):  # also behind padding
        call = v4(udp(1, 2), to=through, options=options)
        assert naked.gated(call, through) == "EPERM"
    assert naked.gated(v4(bytes(8), 2, to=through, options=bytes([148, 4, 0, 0])), through) == ""
    peer = ip_address(PEER[6]).packed
    for left, code in ((1, "EPERM"), (0, "")):
        routing = bytes([DATAGRAM, 2, 2, left]) + bytes(4) + peer + udp(1, 2)
        assert naked.gated(v6(43, routing, to=OTHER[6]), OTHER[6]) == code
    assert naked.counted(Reason.BLOCK_UNREADABLE) == 3


def test_only_neighbour_discovery_passes_in_clear(naked: HookedCgroup) -> None:
    def hops(number: int) -> list[tuple[int, int, int]]:
        return [(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, number)]

    assert naked.gated("solicit", PEER[6], options=hops(255)) == ""
    assert naked.counted(Reason.BLOCK_CLEAR) == 0
    naked.gated("solicit", PEER[6], options=hops(64))
    assert naked.counted(Reason.BLOCK_CLEAR) == 1
    naked.gated("ping", PEER[6], options=hops(255))
    assert naked.counted(Reason.BLOCK_CLEAR) == 2


def test_the_action_of_the_policy_decides(naked: HookedCgroup) -> None:
    for state, code in ((State.BYPASS, ""), (State.DISCARD, "EPERM")):
        naked.publish(TableId.POLICY, Rule(ternary(THERE[4]), Entry(state)))
        assert naked.gated("raw", PEER[4]) == code
    assert naked.counted(Reason.BLOCK_DISCARD) == 1


def test_default_deny_blocks_only_sockets_that_no_hook_has_seen(naked: HookedCgroup) -> None:
    assert naked.gated("kept connected 4", OTHER[4]) == ""
    naked.data.set(Setting.DENY, 1)
    assert naked.gated("raw", OTHER[4]) == "EPERM"
    assert naked.counted(Reason.BLOCK_DEFAULT) == 1
    assert naked.gated("kept connected 4", OTHER[4]) == "", "a hook was asked at connect"
    naked.data.set(Setting.DENY, 0)
    assert [naked.gated("kept raw", OTHER[4]) for _ in range(2)] == ["", ""]
    naked.data.set(Setting.DENY, 1)
    assert naked.gated("kept raw", OTHER[4]) == "EPERM", "its cached verdict is out of date"
    naked.gated.forget()


def test_a_socket_is_checked_again_when_the_policies_change(naked: HookedCgroup) -> None:
    """The socket's cached verdict counts only for the generation of the policies."""
    for _ in range(3):
        assert naked.gated("kept connected 4", OTHER[4]) == ""
    everything = Rule(ternary(ip_network("0.0.0.0/0")), Entry(State.PROTECT))
    naked.publish(TableId.POLICY, everything)
    assert naked.gated("kept connected 4", OTHER[4]) == "EPERM"
    assert naked.counted(Reason.BLOCK_CLEAR) == 1
    naked.publish(TableId.POLICY, *protect())
    assert naked.gated("kept connected 4", OTHER[4]) == ""
    naked.gated.forget()


def test_only_the_sockets_of_the_ike_daemon_pass(naked: HookedCgroup) -> None:
    naked.data.set(Setting.IKE_CGROUP, 0)
    naked.data.set(Setting.IKE, naked.gated.process.pid)
    for _ in range(3):
        assert naked.gated("kept sendto", PEER[4], 500) == ""
    assert naked.gated("sendto", PEER[6], 500) == ""
    assert naked.gated("raw", PEER[4]) == "EPERM", "no hook was asked for this socket"
    naked.data.set(Setting.IKE_CGROUP, naked.cgroup.stat().st_ino + 1)
    assert naked.gated("sendto", PEER[4], 500) == "EPERM", "the same pid in another cgroup"
    naked.data.set(Setting.IKE_CGROUP, naked.cgroup.stat().st_ino)
    assert naked.gated("sendto", PEER[4], 500) == ""
    naked.data.set(Setting.IKE, naked.gated.process.pid + 1)
    assert naked.gated("kept sendto", PEER[4], 500) == "EPERM"
    naked.gated.forget()


def test_audit_mode_blocks_nothing(naked: HookedCgroup) -> None:
    naked.data.set(Setting.AUDIT, 1)
    assert naked.gated("raw", PEER[4]) == ""
    assert naked.counted(Reason.BLOCK_CLEAR) == naked.counted(Reason.AUDITED_PACKETS) == 1
    naked.data.set(Setting.AUDIT, 0)
    assert naked.gated("raw", PEER[4]) == "EPERM"


@pytest.mark.parametrize("call", ["tcp", "sendto", "kept sendto"])
def test_a_live_entry_expires_at_the_hard_lifetime(hooked: HookedCgroup, call: str) -> None:
    """No controller is needed: the map holds the hard lifetime of the SA."""

    def until(deadline: int) -> None:
        entry = Entry(State.LIVE, deadline=deadline)
        hooked.publish(TableId.SPD, *(replace(rule, entry=entry) for rule in live()))

    until(int(time.time()) - 1)
    assert hooked.gated(call, PEER[4]) == "EPERM"
    until(int(time.time()) + 3600)
    assert hooked.data.table(TableId.SPD) is not None
    assert hooked.gated(call, PEER[4]) in ("", "EINPROGRESS")
    for lifetime in (3, 9, 27):
        end = int(time.time()) + lifetime
        until(end)
        result = hooked.gated(call, PEER[4])
        if time.time() < end:
            break  # the call was made in time
    assert result in ("", "EINPROGRESS")
    while time.time() < end + 0.1:
        time.sleep(0.05)
    assert hooked.gated(call, PEER[4]) == "EPERM"
    hooked.gated.forget()
