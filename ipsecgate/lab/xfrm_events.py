"""Parse the kernel's XFRM notifications: SAs and policies that come and go.

The parser is independent of the gate's decoder, because it judges the gate. It reads only the few
header fields that a judge needs.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address

from ipsecgate.core.model.flow import Address

# linux/xfrm.h: message types, and the groups XFRMNLGRP_EXPIRE, _SA and _POLICY as bits.
NAMES = {
    0x10: "NEWSA",
    0x11: "DELSA",
    0x13: "NEWPOLICY",
    0x14: "DELPOLICY",
    0x18: "EXPIRE",
    0x19: "UPDPOLICY",
    0x1A: "UPDSA",
    0x1C: "FLUSHSA",
    0x1D: "FLUSHPOLICY",
}
POLICY_ADDED = ("NEWPOLICY", "UPDPOLICY")
GROUPS = 1 << 1 | 1 << 2 | 1 << 3
HEADER = 16
POLICY_OUT = 1
# Offsets in struct xfrm_usersa_info: the SA's id, its source, its family.
SA_ID, SA_SOURCE, SA_FAMILY = 56, 80, 212
EXPIRE_HARD = 224  # after a whole struct xfrm_usersa_info
# struct xfrm_usersa_id of DELSA: daddr, spi, family.
# Where dir is in struct xfrm_userpolicy_info and in struct xfrm_userpolicy_id.
POLICY_DIR, POLICY_ID_DIR, POLICY_FAMILY = 160, 60, 40
# Attributes follow struct xfrm_userpolicy_info.
POLICY_SIZE, XFRMA_TMPL = 168, 5


@dataclass(frozen=True, slots=True)
class XfrmEvent:
    """One notification. `name`: as in linux/xfrm.h without XFRM_MSG_. `time`: CLOCK_MONOTONIC.

    `outbound`: None if the message does not say. `spi`: for a policy, that of its first template; 0
    for a trap. `hard`: an EXPIRE that removes the SA, without a DELSA.
    """

    time: float
    name: str
    outbound: bool | None = None
    saddr: Address | None = None
    daddr: Address | None = None
    spi: int = 0
    hard: bool = False


def parse(data: bytes, now: float, local: set[Address]) -> Iterator[XfrmEvent]:
    """Parse a datagram of XFRM notifications; skip types that are not in `NAMES`."""
    at = 0
    while at + HEADER <= len(data):
        length, number = struct.unpack_from("=IH", data, at)
        body = data[at + HEADER : at + length]
        at += max((length + 3) & ~3, HEADER)
        if number in NAMES:
            yield _event(NAMES[number], body, now, local)


def _event(name: str, body: bytes, now: float, local: set[Address]) -> XfrmEvent:
    with contextlib.suppress(struct.error, IndexError, ValueError):
        if name in ("NEWSA", "UPDSA", "EXPIRE"):
            (family,) = struct.unpack_from("=H", body, SA_FAMILY)
            saddr = _address(body, SA_SOURCE, family)
            daddr = _address(body, SA_ID, family)
            (spi,) = struct.unpack_from("!I", body, SA_ID + 16)
            hard = name == "EXPIRE" and body[EXPIRE_HARD] != 0
            return XfrmEvent(now, name, saddr in local, saddr, daddr, spi, hard)
        if name == "DELSA":
            spi, family = struct.unpack_from("!I", body, 16)[0], body[20]
            daddr = _address(body, 0, family)
            return XfrmEvent(now, name, daddr not in local, None, daddr, spi)
        if name in ("NEWPOLICY", "UPDPOLICY", "DELPOLICY"):
            at = POLICY_ID_DIR if name == "DELPOLICY" else POLICY_DIR
            (family,) = struct.unpack_from("=H", body, POLICY_FAMILY)
            saddr, daddr = _address(body, 16, family), _address(body, 0, family)
            spi = _template_spi(body[POLICY_SIZE:]) if name != "DELPOLICY" else 0
            return XfrmEvent(now, name, body[at] == POLICY_OUT, saddr, daddr, spi)
    return XfrmEvent(now, name)


def _template_spi(attributes: bytes) -> int:
    """Return the SPI of the first template, 0 if there is none."""
    at = 0
    while at < len(attributes):
        length, kind = struct.unpack_from("=HH", attributes, at)
        if kind == XFRMA_TMPL:
            return int(struct.unpack_from("!I", attributes, at + 4 + 16)[0])
        at += max((length + 3) & ~3, 4)
    return 0


def _address(body: bytes, at: int, family: int) -> Address:
    return ip_address(body[at : at + (16 if family == socket.AF_INET6 else 4)])
