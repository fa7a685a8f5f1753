"""XFRM messages made by hand from linux/xfrm.h, with their events; nothing uses the codec."""

from __future__ import annotations

import struct
from ipaddress import ip_address, ip_network
from typing import Any

from ipsecgate.core.model.events import (
    PoliciesFlushed,
    PolicyGone,
    PolicySet,
    SaGone,
    SaSet,
    SasFlushed,
    XfrmEvent,
)
from ipsecgate.core.model.flow import Selector
from ipsecgate.core.model.ipsec import ESP, Action, Mode, Sa, SaId, SpdEntry, SpdKey, Template

V4, V6 = 2, 10
FAMILY = {4: V4, 6: V6}
LIFETIME = struct.Struct("=8Q")
FOREVER = 2**64 - 1


def address(text: str | None) -> bytes:
    return (ip_address(text).packed if text else b"").ljust(16, b"\0")


def message(kind: int, body: bytes, flags: int = 0, sequence: int = 7) -> bytes:
    data = struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body
    return data.ljust((len(data) + 3) & ~3, b"\0")


def attribute(kind: int, payload: bytes) -> bytes:
    data = struct.pack("=HH", 4 + len(payload), kind) + payload
    return data.ljust((len(data) + 3) & ~3, b"\0")


def selector(
    src: str = "10.1.0.0/16",
    dst: str = "10.2.0.0/16",
    *,
    family: int | None = None,
    proto: int = 0,
    ports: tuple[int, int, int, int] = (0, 0, 0, 0),
    ifindex: int = 0,
) -> bytes:
    """Return an xfrm_selector; `ports`: dport, dport_mask, sport, sport_mask."""
    source, _, source_bits = src.partition("/")
    destination, _, destination_bits = dst.partition("/")
    return (
        address(destination)
        + address(source)
        + struct.pack("!4H", *ports)
        + struct.pack(
            "=H3B3xiI",
            FAMILY[ip_address(source).version] if family is None else family,
            *(int(destination_bits), int(source_bits), proto, ifindex, 0),
        )
    )


def policy(
    sel: bytes, priority: int = 100, index: int = 9, direction: int = 1, action: int = 0
) -> bytes:
    tail = struct.pack("=IIBBBB4x", priority, index, direction, action, 0, 0)
    return sel + bytes(64) + bytes(32) + tail


def template(
    src: str | None, dst: str | None, family: int, reqid: int, mode: int, **more: Any
) -> bytes:
    return (
        address(dst)
        + struct.pack("!IB3x", more.get("spi", 0), more.get("proto", ESP))
        + struct.pack("=H2x", family)
        + address(src)
        + struct.pack("=I4B3I", reqid, mode, 0, more.get("optional", 0), 0, 1, 2, 3)
    )


def state(
    src: str = "192.0.2.1",
    dst: str = "192.0.2.2",
    spi: int = 0xC0FFEE01,
    *,
    sel: bytes = bytes(56),
    reqid: int = 1,
    mode: int = 1,
    hard: int = 3600,
    added: int = 1_700_000_000,
    family: int | None = None,
) -> bytes:
    return (
        sel
        + address(dst)
        + struct.pack("!IB3x", spi, ESP)
        + address(src)
        + LIFETIME.pack(FOREVER, FOREVER, FOREVER, FOREVER, 3000, hard, 0, 0)
        + struct.pack("=4Q", 11, 12, added, 13)
        + struct.pack("=3I", 0, 0, 0)
        + struct.pack(
            "=IIHBBB7x", 0, reqid, FAMILY[ip_address(dst).version] if family is None else family,
            mode, 32, 0,
        )
    )  # fmt: skip


NEWSA, DELSA, NEWPOLICY, DELPOLICY = 0x10, 0x11, 0x13, 0x14
EXPIRE, UPDPOLICY, UPDSA, POLEXPIRE, FLUSHSA, FLUSHPOLICY = 0x18, 0x19, 0x1A, 0x1B, 0x1C, 0x1D
MIGRATE = 0x21
TMPL, SA, POLICY, POLICY_TYPE, AEAD, MARK, IF_ID, SA_PCPU = 5, 6, 7, 16, 18, 21, 31, 35

# --- one message of each type, and its event -----------------------------------------

TUNNEL = template("192.0.2.1", "192.0.2.2", V4, reqid=1, mode=1, spi=0xC0FFEE01)
CIPHER = attribute(AEAD, b"rfc4106(gcm(aes))".ljust(64, b"\0") + bytes(28))

NET_KEY = SpdKey(Selector(ip_network("10.1.0.0/16"), ip_network("10.2.0.0/16")))
NET = SpdEntry(
    NET_KEY,
    100,
    Action.PROTECT,
    (Template(ESP, Mode.TUNNEL, 1, 0xC0FFEE01, ip_address("192.0.2.1"), ip_address("192.0.2.2")),),
    9,
)
OUT = Sa(
    SaId(ip_address("192.0.2.2"), 0xC0FFEE01, ESP),
    ip_address("192.0.2.1"),
    1,
    Mode.TUNNEL,
    hard_lifetime=3600,
    installed_at=1_700_000_000,
)

POLICY_BODY = policy(selector()) + attribute(TMPL, TUNNEL)
TYPES: dict[str, tuple[bytes, XfrmEvent]] = {
    "NEWPOLICY": (message(NEWPOLICY, POLICY_BODY), PolicySet(NET)),
    "UPDPOLICY": (message(UPDPOLICY, POLICY_BODY), PolicySet(NET)),
    "DELPOLICY": (
        message(DELPOLICY, selector() + bytes(8) + attribute(POLICY, policy(selector()))),
        PolicyGone(NET_KEY),
    ),
    "DELPOLICY by index": (
        message(DELPOLICY, bytes(56) + struct.pack("=IB3x", 9, 1)
                + attribute(POLICY, policy(selector()))),
        PolicyGone(NET_KEY),
    ),
    "POLEXPIRE": (
        message(POLEXPIRE, policy(selector()) + b"\1" + bytes(7) + attribute(TMPL, TUNNEL)),
        PolicyGone(NET_KEY),
    ),
    "FLUSHPOLICY": (message(FLUSHPOLICY, b""), PoliciesFlushed()),
    "MIGRATE": (message(MIGRATE, bytes(64)), PoliciesFlushed()),
    "NEWSA": (message(NEWSA, state() + CIPHER), SaSet(OUT)),
    "UPDSA": (message(UPDSA, state() + CIPHER), SaSet(OUT)),
    "DELSA": (
        message(DELSA, address("192.0.2.2") + struct.pack("!I", 0xC0FFEE01)
                + struct.pack("=HBx", V4, ESP) + attribute(SA, state())),
        SaGone(OUT.id),
    ),
    "EXPIRE": (message(EXPIRE, state() + b"\1" + bytes(7)), SaGone(OUT.id)),
    "FLUSHSA": (message(FLUSHSA, b"\x32"), SasFlushed()),
}  # fmt: skip
ALL = b"".join(data for data, _ in TYPES.values())
