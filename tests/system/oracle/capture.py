"""The packets at the far end of the veth, between one marker frame and the next."""

from __future__ import annotations

import socket
import struct
import zlib
from dataclasses import dataclass
from enum import Enum
from ipaddress import ip_address

from ipsecgate.core.model.flow import ICMP, UDP, Address
from ipsecgate.core.model.ipsec import AH, COMP, ESP
from ipsecgate.lab.frames import ETHERNET, NATT_PORT, Kind, Transport, ipv4, ipv6, parse
from ipsecgate.lab.netns import Namespace
from tests.system.oracle.caller import MARKER

ETH_P_ALL = 0x0003
PACKET_IGNORE_OUTGOING = 23
SO_RCVBUFFORCE = 33
BUFFER = 64 << 20
IPIP, IPV6 = 4, 41


class HarnessError(AssertionError):
    """The oracle cannot explain what it captured, so none of its verdicts counts."""


class Sent(Enum):
    """What a call put on the wire."""

    COVERED = "covered"
    CLEAR = "clear"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Seen:
    """A packet: a protected one with its outermost SPI, another with protocol, port and source."""

    sent: Sent
    spi: int = 0
    daddr: Address | None = None
    proto: int = 0
    dport: int = 0
    saddr: Address | None = None

    def __str__(self) -> str:
        if self.sent is Sent.COVERED:
            return f"covered by SPI {self.spi:#x} to {self.daddr}"
        return f"{self.sent.value} proto {self.proto} to {self.daddr} port {self.dport}"


class Capture:
    """A packet socket on the far end."""

    def __init__(self, namespace: Namespace, device: str) -> None:
        with namespace.inside():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
            self._socket.setsockopt(263, PACKET_IGNORE_OUTGOING, 1)
            self._socket.bind((device, ETH_P_ALL))
        self._socket.settimeout(10)

    def close(self) -> None:
        self._socket.close()

    def forget(self, count: int) -> None:
        """Discard the packets of `count` calls."""
        number = -1
        while number < count:
            frame = self._socket.recv(2048)
            if frame[12:ETHERNET] == MARKER.to_bytes(2, "big"):
                (number,) = struct.unpack_from("=I", frame, ETHERNET)

    def windows(self, count: int) -> list[list[Seen]]:
        """Return what each of `count` calls sent. Raises: HarnessError."""
        found: list[list[Seen]] = []
        while len(found) <= count:
            frame = self._socket.recv(2048)
            (ethertype,) = struct.unpack_from("!H", frame, 12)
            if ethertype == MARKER:
                (number,) = struct.unpack_from("=I", frame, ETHERNET)
                if number != len(found):
                    raise HarnessError(f"marker {number} after {len(found)} of them")
                found.append([])
                continue
            packet = parse(frame, "gated", 0.0, 0)
            if packet.kind is Kind.LINK:
                continue
            if not found or len(found) > count:
                raise HarnessError(f"a frame before the first call or after the last: {packet}")
            try:
                if not _is_error(frame[ETHERNET:]):
                    found[-1].append(_seen(frame[ETHERNET:]))
            except (IndexError, struct.error, zlib.error) as error:
                raise HarnessError(f"call {len(found) - 1} sent {frame.hex()}: {error}") from error
        return found[:count]


def _seen(ip: bytes) -> Seen:
    daddr, upper = _read(ip)
    # Remove compression, and the plain tunnel that may come with it: neither protects.
    while upper.proto in (COMP, IPIP, IPV6):
        if upper.proto == COMP:
            upper = _inflate(upper.body)
        else:
            daddr, upper = _read(upper.body)
    ports = struct.unpack_from("!HH", upper.body)
    if upper.proto == UDP and NATT_PORT in ports:
        return Seen(Sent.COVERED, struct.unpack_from("!I", upper.body, 8)[0], daddr)
    if upper.proto in (ESP, AH):
        (spi,) = struct.unpack_from("!I", upper.body, 0 if upper.proto == ESP else 4)
        return Seen(Sent.COVERED, spi, daddr, upper.proto)
    saddr = ip_address(ip[12:16] if ip[0] >> 4 == 4 else ip[8:24])
    return Seen(Sent.CLEAR, 0, daddr, upper.proto, ports[1], saddr)


def _is_error(ip: bytes) -> bool:
    """Return whether a packet carries an ICMP error, which the kernel sends of its own accord.

    Linux damages what BEET mode wraps if its family isn't the one of the SA's selector: a part of
    the old header stays. Nobody sends ICMP through such an SA, so what can't be read is a call's.
    """
    try:
        return _innermost(ip) in ICMP
    except (IndexError, struct.error, zlib.error):
        return False


def _innermost(ip: bytes) -> int:
    """Return the protocol of what a packet carries. The ciphers of the worlds change nothing."""
    upper = _read(ip)[1]
    while True:
        body = upper.body
        if upper.proto in (IPIP, IPV6):
            upper = _read(body)[1]
        elif upper.proto == COMP:
            upper = _inflate(body)
        elif upper.proto == AH:
            upper = Transport(body[0], body[4 * (body[1] + 2) :])
        elif upper.proto == ESP:
            upper = Transport(body[-1], body[8 : -2 - body[-2]])
        elif upper.proto == UDP and NATT_PORT in struct.unpack_from("!HH", body):
            upper = Transport(ESP, body[8:])
        else:
            return upper.proto


def _inflate(body: bytes) -> Transport:
    return Transport(body[0], zlib.decompressobj(-zlib.MAX_WBITS).decompress(body[4:]))


def _read(ip: bytes) -> tuple[Address, Transport]:
    """Return the destination of an IP packet and its payload."""
    if ip[0] >> 4 == 4:
        return ip_address(ip[16:20]), ipv4(ip)
    return ip_address(ip[24:40]), ipv6(ip)


def answer(seen: list[Seen], dst: Address, dport: int, spis: set[int]) -> Sent:
    """Return what one call sent. Raises: HarnessError for packets that it can't have sent."""
    if len(set(seen)) > 1:  # a SYN is repeated if its caller has to wait for a second
        raise HarnessError(f"more than one packet: {'; '.join(map(str, seen))}")
    for one in seen:
        if one.sent is Sent.COVERED and one.spi not in spis:
            raise HarnessError(f"an SPI that was not installed: {one}")
        if one.sent is Sent.CLEAR and (one.daddr, one.dport) != (dst, dport):
            raise HarnessError(f"a packet of another flow: {one}")
    return seen[0].sent if seen else Sent.NOTHING
