"""Codec for NETLINK_SOCK_DIAG: list sockets, and destroy one.

Rules of this module: bytes in, values out; TCP and UDP sockets with a peer, UDP sockets without.

Source: linux/inet_diag.h (struct inet_diag_req_v2, inet_diag_msg), linux/sock_diag.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from socket import AF_INET, AF_INET6

from ipsecgate.core.codec.netlink import encode_dump, encode_request, messages
from ipsecgate.core.model.flow import TCP, UDP, Address, Flow, unmap
from ipsecgate.core.model.value import value

SOCK_DIAG_BY_FAMILY, SOCK_DESTROY = 20, 21
INET_DIAG_MARK, INET_DIAG_CGROUP_ID = 15, 21
# All states but TIME_WAIT, CLOSE and LISTEN, which send no more data. Source: tcp_states.h.
CONNECTED = sum(1 << state for state in (1, 2, 3, 4, 5, 8, 9, 11, 12))
UNCONNECTED = 1 << 7  # TCP_CLOSE, which UDP sockets without a peer have
KINDS = tuple((family, protocol) for family in (AF_INET, AF_INET6) for protocol in (TCP, UDP))

_REQUEST = struct.Struct("=BBBBI")  # family, protocol, attributes, padding, states; then the id
_ID = struct.Struct("!HH16s16s")  # ports, addresses; then interface and cookie, 48 bytes in all
_ID_SIZE = 48
_MESSAGE_SIZE = 4 + _ID_SIZE + 20
_INODE = _MESSAGE_SIZE - 4
_U32, _U64 = struct.Struct("=I"), struct.Struct("=Q")


@value
class ListedSocket:
    """A socket: flow, cgroup id (None: unknown), struct inet_diag_sockid, and inode.

    Without a peer, the flow's destination is the unspecified address, port 0.
    """

    flow: Flow
    cgroup: int | None
    family: int
    id: bytes
    inode: int = 0


def encode_listing(family: int, protocol: int, sequence: int, *, states: int = CONNECTED) -> bytes:
    """Encode a request for the sockets of a family and protocol that are in one of these states."""
    body = _REQUEST.pack(family, protocol, 0, 0, states) + bytes(_ID_SIZE)
    return encode_dump(SOCK_DIAG_BY_FAMILY, body, sequence)


def encode_destroy(socket: ListedSocket, sequence: int) -> bytes:
    """Encode a request to destroy a socket; its pending calls fail with ECONNABORTED."""
    body = _REQUEST.pack(socket.family, socket.flow.proto, 0, 0, CONNECTED) + socket.id
    return encode_request(SOCK_DESTROY, body, sequence)


def decode_listing(protocol: int, datagram: bytes) -> Iterator[ListedSocket]:
    """Yield the sockets of a listing. Raises: DecodeError."""
    for message in messages(datagram):
        if message.type != SOCK_DIAG_BY_FAMILY:
            continue
        at = message.structure(_MESSAGE_SIZE, "inet_diag_msg")
        family = datagram[at]
        if family not in (AF_INET, AF_INET6):
            raise message.bad("idiag_family", at)
        raw = datagram[at + 4 : at + 4 + _ID_SIZE]
        sport, dport, src, dst = _ID.unpack_from(raw)
        attributes = message.attributes(_MESSAGE_SIZE)
        mark = message.payload(attributes, INET_DIAG_MARK, _U32.size, "INET_DIAG_MARK")
        cgroup = message.payload(attributes, INET_DIAG_CGROUP_ID, _U64.size, "INET_DIAG_CGROUP_ID")
        flow = Flow(
            daddr=_address(family, dst),
            proto=protocol,
            dport=dport,
            saddr=_address(family, src),
            sport=sport,
            mark=0 if mark is None else _U32.unpack_from(datagram, mark)[0],
        )
        cgroup_id = None if cgroup is None else _U64.unpack_from(datagram, cgroup)[0]
        (inode,) = _U32.unpack_from(datagram, at + _INODE)
        yield ListedSocket(flow, cgroup_id, family, raw, inode)


def _address(family: int, raw: bytes) -> Address:
    return IPv4Address(raw[:4]) if family == AF_INET else unmap(IPv6Address(raw))
