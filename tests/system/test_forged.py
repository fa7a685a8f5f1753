"""No packet of a process passes for one that the kernel made.

Attacks on two checks of the backstop: whether XFRM made a packet, and whether it is neighbour
discovery. Each has a twin that must pass. `test_astray` attacks the destination of a packet.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from ipaddress import ip_network

import pytest

from ipsecgate.core.tables.layout import Entry, Reason, State, TableId
from ipsecgate.core.tables.table import Rule, ternary
from tests.system.caller import has_udplite
from tests.system.hooked_cgroup import HERE, OTHER, PEER, HookedCgroup, live
from tests.system.test_backstop import SPI, udp, v4, v6

UDP, ESP, AH = 17, 50, 51
NAT_T = 4500
FORMS = {"4": "{}", "6": "{}", "mapped": "::ffff:{}"}


@pytest.fixture
def naked(hooked: HookedCgroup) -> Iterator[HookedCgroup]:
    """As in test_backstop, and with 4500 as the only ephemeral port."""
    hooked.data.set_tunnels(())
    choose(hooked, NAT_T)
    yield hooked
    hooked.gated.forget()
    choose(hooked, 32768, 60999)


def choose(hooked: HookedCgroup, first: int, last: int = 0) -> None:
    """Let the kernel choose source ports from this range."""
    hooked.namespace.sysctl("ipv4/ip_local_port_range", f"{first} {last or first}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("connect more", "leave send"),
        ("connect cork send", "leave send uncork"),
        ("connect cork send", "leave uncork"),
        ("moreto", "leave send"),
        ("connect more", "send"),
        ("connect more leave", "send"),
        ("reuse connect more", "leave send"),
    ],
)
def test_a_port_that_was_given_back_does_not_pass_for_the_kernels(
    naked: HookedCgroup, form: str, before: str, after: str
) -> None:
    """An IPv6 datagram keeps the port that its socket had when the datagram was begun."""
    family = 6 if form == "6" else 4
    peer = FORMS[form].format(PEER[family])
    kind = "udp4" if form == "4" else "udp6"
    naked.publish(TableId.SPD, *live())
    assert naked.gated(f"forge {kind} {before}", peer) == ""
    naked.publish(TableId.SPD)
    choose(naked, NAT_T + 1)
    blocked = naked.counted(Reason.BLOCK_CLEAR)
    result = naked.gated(f"forge {after}", peer)
    assert result == ("" if after.endswith("uncork") else "EPERM")  # setsockopt() reports no error
    assert naked.counted(Reason.BLOCK_CLEAR) == blocked + 1


@pytest.mark.parametrize("kind", ["udp4", "udp6", "udplite4", "udplite6"])
def test_a_bound_port_does_not_pass_for_the_kernels(naked: HookedCgroup, kind: str) -> None:
    if kind.startswith("udplite") and not has_udplite():
        pytest.skip("missing: UDP-Lite in the kernel (removed in Linux 7.3)")
    family = int(kind[-1])
    naked.publish(TableId.SPD, *live())
    assert naked.gated(f"forge {kind} reuse bind", str(HERE[family]), NAT_T) == ""
    assert naked.gated("forge connect more", PEER[family]) == ""
    naked.publish(TableId.SPD)
    assert naked.gated("forge leave send", PEER[family]) == "EPERM"
    assert naked.counted(Reason.BLOCK_CLEAR) == 1


def test_a_raw_socket_cannot_forge_esp(naked: HookedCgroup) -> None:
    """Even byte for byte: the content of a packet proves nothing."""
    forged = SPI + bytes(28)
    for proto in (ESP, AH):
        assert naked.gated(v4(forged, proto), PEER[4]) == "EPERM"
        assert naked.gated(v6(proto, forged), PEER[6]) == "EPERM"
        assert naked.gated(v4(forged, proto, to=OTHER[4]), OTHER[4]) == "", "no policy names it"
    assert naked.gated(v4(udp(NAT_T, NAT_T, forged)), PEER[4]) == "EPERM"
    assert naked.gated(v6(UDP, udp(NAT_T, NAT_T, forged)), PEER[6]) == "EPERM"
    behind = v6(60, bytes([ESP, 0]) + bytes(6) + forged)
    assert naked.gated(behind, PEER[6]) == "EPERM"
    assert naked.counted(Reason.BLOCK_CLEAR) == 7


@contextlib.contextmanager
def associated(
    hooked: HookedCgroup, family: int, transform: str, mode: str
) -> Iterator[socket.socket]:
    """Let XFRM protect packets to the peer; yield a packet socket on the peer's end of the link."""
    here, peer = HERE[family], PEER[family]
    encap = " encap espinudp 4500 4500 0.0.0.0" if transform == "udp" else ""
    proto = "esp" if transform == "udp" else transform
    keys = {
        "esp": f"aead rfc4106(gcm(aes)) 0x{'2a' * 20} 128",
        "ah": f"auth hmac(sha256) 0x{'2a' * 32}",
        "comp": "comp deflate",
    }[proto]
    spi = "0x1234" if proto == "comp" else "0xc0ffee"
    bits = 32 if family == 4 else 128
    ends = f"src {here} dst {peer}"
    tunnel = ends if mode == "tunnel" else ""
    ip = ["ip", "-n", hooked.namespace.name]
    for words in (
        f"route add {peer} dev out0 src {here}",
        f"xfrm state add {ends} proto {proto} spi {spi} reqid 7 mode {mode} {keys}{encap}",
        f"xfrm policy add src {here}/{bits} dst {peer}/{bits} dir out"
        f" tmpl {tunnel} proto {proto} reqid 7 mode {mode}",
    ):
        subprocess.run([*ip, *words.split()], check=True)
    try:
        with hooked.namespace.inside():
            seen = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
        with seen:
            seen.bind(("nowhere", 3))
            seen.settimeout(10)
            yield seen
    finally:
        hooked.namespace.flush_xfrm()
        subprocess.run([*ip, "route", "del", peer], check=True)


def left(seen: socket.socket, proto: int) -> list[int]:
    """Return the protocols of the frames before the first one of `proto`."""
    others: list[int] = []
    while True:
        frame, address = seen.recvfrom(2048)
        if address[2] == socket.PACKET_OUTGOING:
            continue
        number = frame[9] if frame[0] >> 4 == 4 else frame[6]
        if number == proto:
            return others
        others.append(number)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("mode", ["transport", "tunnel"])
@pytest.mark.parametrize("transform", ["esp", "ah", "udp"])
def test_packets_made_by_xfrm_leave(
    hooked: HookedCgroup, transform: str, mode: str, family: int
) -> None:
    hooked.data.set_tunnels(())
    hooked.publish(TableId.SPD, *live())
    peer = PEER[family]
    number = {"esp": ESP, "ah": AH, "udp": UDP}[transform]
    with associated(hooked, family, transform, mode) as seen:
        for call, code in (("sendto", ""), ("tcp", "EINPROGRESS"), ("raw", ""), ("ping", "")):
            assert (call, hooked.gated(call, peer)) == (call, code)
            assert left(seen, number) == []
        options = "record " if family == 4 else ""
        assert hooked.gated(f"forge udp{family} {options}connect more send", peer) == ""
        assert left(seen, number) == []
        assert hooked.counted(Reason.BLOCK_CLEAR) == 0
    assert hooked.gated("raw", peer) == "EPERM", "without XFRM it is blocked"
    hooked.gated.forget()


def test_a_packet_that_compression_left_as_it_was_is_blocked(naked: HookedCgroup) -> None:
    """It passed through XFRM unchanged, so it is in clear."""
    naked.publish(TableId.SPD, *live())
    with associated(naked, 4, "comp", "transport"):
        assert naked.gated("sendto", PEER[4]) == "EPERM"
        assert naked.gated("kept connected 4", PEER[4]) == "EPERM"
    assert naked.counted(Reason.BLOCK_CLEAR) == 2


def test_neighbour_discovery_must_be_short_or_link_local(hooked: HookedCgroup) -> None:
    everything = Rule(ternary(ip_network("::/0")), Entry(State.PROTECT))
    hooked.publish(TableId.POLICY, everything)
    hooked.data.set_tunnels(())

    def result(kind: int, size: int, to: str) -> str:
        packet = bytearray(bytes.fromhex(v6(58, bytes([kind]) + bytes(size - 1), to=to).split()[1]))
        packet[7] = 255
        return hooked.gated(f"packet {packet.hex()}", PEER[6])

    for kind in (133, 135, 136):
        assert result(kind, 56, PEER[6]) == ""
        assert result(kind, 57, PEER[6]) == "EPERM"
    for kind in (134, 137):
        for to, code in (
            ("fe80::9", ""),
            ("ff02::1", ""),
            (PEER[6], "EPERM"),
            ("ff05::1", "EPERM"),
        ):
            assert result(kind, 500, to) == code
    assert result(138, 40, "fe80::9") == "EPERM"
