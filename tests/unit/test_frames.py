"""Captured frames: each harmless kind is paired with a similar frame that must count as a leak."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import pytest

from ipsecgate.lab.frames import Kind, Packet, parse

A4, B4 = "192.0.2.1", "192.0.2.2"
A6, B6 = "2001:db8::1", "2001:db8::2"


def v4(proto: int, body: bytes, fragment: int = 0, options: bytes = b"") -> bytes:
    words = 5 + len(options) // 4
    head = struct.pack(
        "!BBHHHBBH", 0x40 | words, 0, words * 4 + len(body), 0, fragment, 64, proto, 0
    )
    addresses = ip_address(A4).packed + ip_address(B4).packed
    return bytes(12) + b"\x08\x00" + head + addresses + options + body


def v6(proto: int, body: bytes) -> bytes:
    head = struct.pack("!IHBB", 6 << 28, len(body), proto, 64)
    return bytes(12) + b"\x86\xdd" + head + ip_address(A6).packed + ip_address(B6).packed + body


def udp(sport: int, dport: int, body: bytes = b"payload") -> bytes:
    return struct.pack("!HHHH", sport, dport, 8 + len(body), 0) + body


def tcp(sport: int, dport: int, flags: int) -> bytes:
    return struct.pack("!HHIIBBHHH", sport, dport, 0, 0, 0x50, flags, 0, 0, 0)


def seen(frame: bytes) -> Packet:
    return parse(frame, "a", 1.0, 1)


@pytest.mark.parametrize(
    ("frame", "kind"),
    [
        (v4(50, bytes(16)), Kind.ESP),
        (v6(50, bytes(16)), Kind.ESP),
        (v4(51, bytes(16)), Kind.ESP),
        (v4(49, bytes(16)), Kind.CLEAR),
        (v4(17, udp(500, 500)), Kind.IKE),
        (v6(17, udp(500, 4999)), Kind.IKE),
        (v4(17, udp(501, 501)), Kind.CLEAR),
        (v4(6, tcp(500, 500, 2)), Kind.CLEAR),
        (v4(17, udp(4500, 4500, bytes(4) + b"ike")), Kind.IKE),
        (v4(17, udp(4500, 4500, b"\xff")), Kind.IKE),
        (v4(17, udp(4500, 4500, b"\xff\0\0\1esp")), Kind.ESP),
        (v4(17, udp(4500, 4500, b"\0\0\0\1esp")), Kind.ESP),
        (v4(17, udp(4501, 4501, b"\0\0\0\1esp")), Kind.CLEAR),
        (v6(58, bytes([135]) + bytes(23)), Kind.LINK),
        (v6(58, bytes([128]) + bytes(7)), Kind.CLEAR),
        # ICMP errors about IKE and ESP, as from a host without a daemon; other ICMP is a leak.
        (v4(1, b"\x03" + bytes(7) + v4(17, udp(500, 500))[14:]), Kind.IKE),
        (v4(1, b"\x03" + bytes(7) + v4(17, udp(4500, 4500, b"\0\0\0\1esp"))[14:]), Kind.IKE),
        (v4(1, b"\x03" + bytes(7) + v4(50, bytes(8))[14:]), Kind.IKE),
        (v6(58, b"\x01" + bytes(7) + v6(17, udp(500, 500))[14:]), Kind.IKE),
        (v4(1, b"\x03" + bytes(7) + v4(17, udp(501, 501))[14:]), Kind.CLEAR),
        (v4(1, b"\x03" + bytes(7)), Kind.CLEAR),
        (v4(1, b"\x08" + bytes(7) + v4(17, udp(500, 500))[14:]), Kind.CLEAR),
        (v6(58, b"\x01" + bytes(7) + v6(6, tcp(500, 500, 2))[14:]), Kind.CLEAR),
        (v6(58, b""), Kind.CLEAR),
        (v6(0, bytes([58, 0, 5, 2, 0, 0, 1, 0, 143]) + bytes(7)), Kind.LINK),
        (v6(0, bytes([17, 0, 5, 2, 0, 0, 1, 0]) + udp(9, 9)), Kind.CLEAR),
        (v4(1, bytes(8)), Kind.CLEAR),
        (bytes(12) + b"\x08\x06" + bytes(28), Kind.LINK),
        (bytes(12) + b"\x88\xcc" + bytes(28), Kind.CLEAR),
        (bytes(12) + b"\x08\x00" + bytes(3), Kind.CLEAR),
    ],
)
def test_each_frame_has_its_kind(frame: bytes, kind: Kind) -> None:
    assert seen(frame).kind is kind


@pytest.mark.parametrize(
    ("frame", "source", "destination"),
    [(v4(6, tcp(1024, 5432, 0x02)), A4, B4), (v6(6, tcp(1024, 5432, 0xC2)), A6, B6)],
)
def test_a_syn_is_recognised_with_its_ports(frame: bytes, source: str, destination: str) -> None:
    packet = seen(frame)
    assert packet.is_syn
    assert (packet.proto, packet.sport, packet.dport) == (6, 1024, 5432)
    assert (str(packet.saddr), str(packet.daddr)) == (source, destination)


def test_a_syn_ack_is_not_a_syn() -> None:
    assert not seen(v4(6, tcp(1, 2, 0x12))).is_syn
    assert not seen(v4(17, udp(1, 2))).is_syn


def test_ip_options_are_skipped() -> None:
    assert seen(v4(17, udp(7, 8), options=bytes(8))).dport == 8


def test_fragments_are_never_taken_for_ike() -> None:
    # In a later fragment the bytes where the ports would be are data.
    later = seen(v4(17, udp(500, 500), fragment=185))
    assert (later.kind, later.dport) == (Kind.CLEAR, 0)
    extension = struct.pack("!BBHI", 17, 0, 185 << 3, 1)
    assert seen(v6(44, extension + udp(500, 500))).kind is Kind.CLEAR
    first = struct.pack("!BBHI", 17, 0, 1, 1)
    assert seen(v6(44, first + udp(500, 500))).kind is Kind.IKE


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        (v4(1, b"\x03" + bytes(7) + bytes(16) + ip_address(A4).packed + udp(7, 8)), True),
        (v4(1, b"\x03" + bytes(7) + bytes(16) + ip_address(B4).packed + udp(7, 8)), False),
        (v4(1, b"\x08" + bytes(7) + bytes(16) + ip_address(A4).packed + udp(7, 8)), False),
        (v4(1, b"\x03" + bytes(7)), False),
        (v6(58, b"\x01" + bytes(7) + bytes(24) + ip_address(A6).packed + udp(7, 8)), True),
        (v6(58, b"\x01" + bytes(7) + bytes(24) + ip_address(B6).packed + udp(7, 8)), False),
        (v4(17, b"\x03" + bytes(7) + bytes(16) + ip_address(A4).packed), False),
    ],
)
def test_an_icmp_error_complains_about_a_packet_that_reached_its_sender(
    frame: bytes, expected: bool
) -> None:
    assert seen(frame).is_unreachable is expected
