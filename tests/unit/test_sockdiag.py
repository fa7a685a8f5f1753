"""Existing sockets: decoding their list, and the request to destroy one."""

from __future__ import annotations

import struct
from ipaddress import ip_address
from socket import AF_INET, AF_INET6

import pytest

from ipsecgate.core.codec.netlink import DecodeError
from ipsecgate.core.codec.sockdiag import (
    UNCONNECTED,
    ListedSocket,
    decode_listing,
    encode_destroy,
    encode_listing,
)
from ipsecgate.core.model.flow import TCP, UDP, Flow

COOKIE = bytes(range(8))


def listed(family: int, src: str, dst: str, *, cgroup: int | None = 7, mark: int = 0) -> bytes:
    """Return an inet_diag_msg made by hand. Source: linux/inet_diag.h."""
    ends = [ip_address(text).packed.ljust(16, b"\0") for text in (src, dst)]
    name = struct.pack("!HH", 40000, 5432) + ends[0] + ends[1] + struct.pack("=I", 0) + COOKIE
    body = struct.pack("=BBBB", family, 1, 0, 0) + name + bytes(16) + struct.pack("=I", 4711)
    if mark:
        body += struct.pack("=HHI", 8, 15, mark)
    if cgroup is not None:
        body += struct.pack("=HHQ", 12, 21, cgroup)
    return struct.pack("=IHHII", 16 + len(body), 20, 2, 1, 0) + body


def test_a_listed_socket_has_its_flow_cgroup_and_cookie() -> None:
    datagram = listed(AF_INET, "10.1.0.1", "10.2.0.9", mark=5) + listed(
        AF_INET6, "2001:db8::1", "2001:db8::2", cgroup=None
    )
    four, six = decode_listing(TCP, datagram)
    assert four.flow == Flow(
        ip_address("10.2.0.9"), TCP, 5432, ip_address("10.1.0.1"), 40000, mark=5
    )
    assert (four.cgroup, four.family, four.id[-8:]) == (7, AF_INET, COOKIE)
    assert four.inode == 4711
    assert (six.flow.daddr, six.cgroup) == (ip_address("2001:db8::2"), None)


def test_an_ipv4_mapped_address_becomes_its_ipv4_address() -> None:
    (one,) = decode_listing(UDP, listed(AF_INET6, "::ffff:10.1.0.1", "::ffff:10.2.0.9"))
    assert (one.flow.daddr, one.flow.saddr) == (ip_address("10.2.0.9"), ip_address("10.1.0.1"))
    assert one.family == AF_INET6


@pytest.mark.parametrize("cut", [20, 60, 80])
def test_a_truncated_message_is_an_error(cut: int) -> None:
    datagram = listed(AF_INET, "10.1.0.1", "10.2.0.9")[:cut]
    datagram = struct.pack("=I", cut) + datagram[4:]
    with pytest.raises(DecodeError):
        list(decode_listing(TCP, datagram))


def test_the_request_to_destroy_names_the_exact_socket() -> None:
    (one,) = decode_listing(TCP, listed(AF_INET, "10.1.0.1", "10.2.0.9"))
    request = encode_destroy(one, 9)
    assert struct.unpack_from("=IHHII", request) == (16 + 56, 21, 0x5, 9, 0)
    assert request[16:18] == bytes((AF_INET, TCP))
    assert request[24:] == one.id
    assert isinstance(one, ListedSocket)
    assert len(encode_listing(AF_INET, UDP, 1)) == 16 + 56
    assert encode_listing(AF_INET, UDP, 1, states=UNCONNECTED)[20:24] == struct.pack("=I", 1 << 7)
