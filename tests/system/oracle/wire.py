"""Install a world's SPD and SAD: many netlink messages in one send, one answer each.

Written from linux/xfrm.h, independent of the gate's codec. It uses null ciphers: they are fast to
set up and always built in, and the packets are ESP as well.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence

from ipsecgate.core.model.flow import Address
from tests.system.oracle.world import AH, COMP, Life, Masked, Policy, Sel, State, Tmpl, World

NETLINK_XFRM = 6
NLMSG_ERROR = 2
REQUEST, ACK = 0x1, 0x4
NEWSA, NEWPOLICY, ALLOCSPI, EXPIRE, FLUSHSA, FLUSHPOLICY = 0x10, 0x13, 0x16, 0x18, 0x1C, 0x1D
ALG_AUTH, ALG_CRYPT, ALG_COMP, ENCAP, TMPL, MARK, IF_ID = 1, 2, 3, 4, 5, 21, 31
STATE_AF_UNSPEC = 32
ESP_IN_UDP = 2
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
INFINITE = struct.pack("=8Q", *[2**64 - 1] * 4, 0, 0, 0, 0)
ESRCH = 3
PART = 256  # messages in one send: the answers must fit in the receive buffer


def address(one: Address | None) -> bytes:
    return (one.packed if one else b"").ljust(16, b"\0")


def attribute(kind: int, payload: bytes) -> bytes:
    data = struct.pack("=HH", 4 + len(payload), kind) + payload
    return data.ljust((len(data) + 3) & ~3, b"\0")


def algorithm(kind: int, name: str) -> bytes:
    return attribute(kind, struct.pack("=64sI", name.encode(), 0))


def selector(sel: Sel | None) -> bytes:
    if sel is None:
        return bytes(56)
    ports = struct.pack("!4H", *sel.dport, *sel.sport)
    bits = (sel.dst.network.prefixlen, sel.src.network.prefixlen)
    tail = struct.pack("=H3B3xiI", FAMILY[sel.dst.version], *bits, sel.proto, sel.ifindex, 0)
    return address(sel.dst.ip) + address(sel.src.ip) + ports + tail


def template(tmpl: Tmpl) -> bytes:
    identity = address(tmpl.dst) + struct.pack("!IB3x", tmpl.spi, tmpl.proto)
    tail = struct.pack("=I4B3I", tmpl.reqid, tmpl.mode, 0, tmpl.optional, 0, *[2**32 - 1] * 3)
    return identity + struct.pack("=H2x", FAMILY[tmpl.family]) + address(tmpl.src) + tail


def policy(one: Policy) -> bytes:
    body = selector(one.sel) + INFINITE + bytes(32)
    body += struct.pack("=IIBBBB4x", one.priority, 0, 1, one.block, 0, 0)
    if one.tmpls:
        body += attribute(TMPL, b"".join(map(template, one.tmpls)))
    return body + scope(one.mark, one.if_id)


def scope(mark: Masked, if_id: int) -> bytes:
    found = attribute(MARK, struct.pack("=II", *mark)) if mark != (0, 0) else b""
    return found + (attribute(IF_ID, struct.pack("=I", if_id)) if if_id else b"")


def state(one: State) -> bytes:
    identity = address(one.dst) + struct.pack("!IB3x", one.spi, one.proto)
    body = selector(one.sel) + identity + address(one.src) + INFINITE + bytes(32 + 12)
    flags = STATE_AF_UNSPEC if one.unspec else 0
    tail = (0, one.reqid, FAMILY[one.dst.version], one.mode, 0, flags)
    return body + struct.pack("=IIHBBB7x", *tail)


def keys(one: State) -> bytes:
    if one.proto == COMP:
        return algorithm(ALG_COMP, "deflate")
    found = algorithm(ALG_AUTH, "digest_null")
    if one.proto != AH:
        found += algorithm(ALG_CRYPT, "ecb(cipher_null)")
    if one.encap:
        ports = struct.pack("!HH", 4500, 4500)
        found += attribute(ENCAP, struct.pack("=H", ESP_IN_UDP) + ports + bytes(2 + 16))
    return found


class Installer:
    """An XFRM socket in the current namespace."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_XFRM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._socket.settimeout(10)

    def close(self) -> None:
        self._socket.close()

    def flush(self) -> None:
        """Empty both databases."""
        codes = self._send([(FLUSHPOLICY, b""), (FLUSHSA, bytes(8))])
        assert set(codes) <= {0, ESRCH}, codes

    def install(self, world: World) -> list[int]:
        """Replace the installed world; return the errno of each policy and state, 0 if accepted."""
        self.flush()
        messages = [(NEWPOLICY, policy(one)) for one in world.policies]
        messages += [self._birth(one) for one in world.states]
        codes = self._send(messages)
        self._send([
            (EXPIRE, state(one) + struct.pack("=B7x", one.life is Life.EXPIRED)
             + scope(one.mark, 0))
            for one, code in zip(world.states, codes[len(world.policies) :], strict=True)
            if not code and one.life in (Life.EXPIRED, Life.DYING)
        ])  # fmt: skip
        return codes

    def _birth(self, one: State) -> tuple[int, bytes]:
        if one.life is Life.LARVAL:
            span = struct.pack("=II", one.spi, one.spi)
            return ALLOCSPI, state(one) + span + scope(one.mark, one.if_id)
        return NEWSA, state(one) + keys(one) + scope(one.mark, one.if_id)

    def _send(self, messages: Sequence[tuple[int, bytes]]) -> list[int]:
        """Send requests and return their errnos in order."""
        parts = (messages[at : at + PART] for at in range(0, len(messages), PART))
        return [code for part in parts for code in self._send_part(part)]

    def _send_part(self, messages: Sequence[tuple[int, bytes]]) -> list[int]:
        data = b""
        for number, (kind, body) in enumerate(messages):
            data += struct.pack("=IHHII", 16 + len(body), kind, REQUEST | ACK, number, 0) + body
        self._socket.send(data)
        codes: dict[int, int] = {}
        while len(codes) < len(messages):
            answer = self._socket.recv(1 << 16)
            at = 0
            while at < len(answer):
                length, kind, _, number, _ = struct.unpack_from("=IHHII", answer, at)
                if kind == NLMSG_ERROR:
                    codes[number] = -struct.unpack_from("=i", answer, at + 16)[0]
                at += (length + 3) & ~3
        return [codes[number] for number in range(len(messages))]
