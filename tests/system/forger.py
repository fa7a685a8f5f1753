"""A socket that tries to pass for another, or to send where the hooks were not asked.

One socket is kept from call to call and goes through named steps:

    forge udp4 connect more     then, when the SA is gone:     forge leave send

An address is host, or host%segment: `route` sends through that segment.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Sequence

PATIENCE = 10.0
SPI = struct.pack("!I", 0xC0FFEE) + bytes(range(16))
UDP_CORK = 1
IP_UNICAST_IF, IPV6_UNICAST_IF = 50, 76
IP_PKTINFO = 8
DEVICE = "out0"
KINDS = {
    "udp": (socket.SOCK_DGRAM, 0),
    "udplite": (socket.SOCK_DGRAM, 136),
    "tcp": (socket.SOCK_STREAM, 0),
}

_libc = ctypes.CDLL(None, use_errno=True)
_kept: list[socket.socket] = []


def steps(words: Sequence[str], address: str, port: int) -> None:
    """Take the kept socket through the steps. Raises: OSError of the first that fails."""
    host, _, segment = address.partition("%")
    for word in words:
        if word[:-1] in KINDS:
            forget()
            family = socket.AF_INET6 if word.endswith("6") else socket.AF_INET
            _kept.append(socket.socket(family, *KINDS[word[:-1]]))
            _kept[0].settimeout(PATIENCE)
        else:
            _step(word, _kept[-1], (host, port), segment)


def forget() -> None:
    """Close the kept sockets."""
    while _kept:
        _kept.pop().close()


def _step(word: str, sock: socket.socket, to: tuple[str, int], segment: str) -> None:  # noqa: C901, PLR0912
    match word:
        case "bind":
            sock.bind(to)
        case "connect":
            sock.connect(to)
        case "begin":  # and do not wait
            sock.setblocking(False)
            sock.connect_ex(to)
            sock.settimeout(PATIENCE)
        case "more":
            sock.send(SPI, socket.MSG_MORE)
        case "moreto":
            sock.sendto(SPI, socket.MSG_MORE, to)
        case "leave":
            _disconnect(sock)
        case "send":
            sock.send(SPI)
        case "sendto":
            sock.sendto(SPI, to)
        case "pktinfo":
            sock.sendmsg([SPI], [_through(sock.family)], 0, to)
        case "listen":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(to)
            sock.listen()
        case "accept":
            _kept.append(sock.accept()[0])
            _kept[-1].settimeout(PATIENCE)
        case "receive":
            assert sock.recv(len(SPI), socket.MSG_WAITALL) == SPI
        case _:
            sock.setsockopt(*_option(word, sock.family, segment))


def _option(word: str, family: int, segment: str) -> tuple[int, int, int | bytes]:
    match word:
        case "reuse":
            return socket.SOL_SOCKET, socket.SO_REUSEPORT, 1
        case "cork" | "uncork":
            return socket.IPPROTO_UDP, UDP_CORK, int(word == "cork")
        case "route":  # RFC 8754, no segment left
            head = struct.pack("!BBBBBBH", 0, 2, 4, 0, 0, 0, 0)
            raw = head + socket.inet_pton(socket.AF_INET6, segment)
            return socket.IPPROTO_IPV6, socket.IPV6_RTHDR, raw
        case "source-route":
            raw = bytes([131, 7, 4]) + socket.inet_aton(segment) + b"\0"
            return socket.IPPROTO_IP, socket.IP_OPTIONS, raw
        case "record":  # RFC 791: the route
            return socket.IPPROTO_IP, socket.IP_OPTIONS, bytes([7, 7, 4, 0, 0, 0, 0, 0])
        case "abort":  # RST at close, and no retransmission
            return socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0)
        case "device":
            return socket.SOL_SOCKET, socket.SO_BINDTODEVICE, DEVICE.encode()
        case "through":
            index = struct.pack("!I", socket.if_nametoindex(DEVICE))
            if family == socket.AF_INET6:
                return socket.IPPROTO_IPV6, IPV6_UNICAST_IF, index
            return socket.IPPROTO_IP, IP_UNICAST_IF, index
    raise ValueError(word)


def _through(family: int) -> tuple[int, int, bytes]:
    """Return the control message that sends one datagram through the device."""
    index = struct.pack("=I", socket.if_nametoindex(DEVICE))
    if family == socket.AF_INET6:
        return socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, bytes(16) + index
    return socket.IPPROTO_IP, IP_PKTINFO, index + bytes(8)


def _disconnect(sock: socket.socket) -> None:
    """Disconnect (AF_UNSPEC): the socket gives back a port that the kernel chose."""
    if _libc.connect(sock.fileno(), struct.pack("=H14x", socket.AF_UNSPEC), 16):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
