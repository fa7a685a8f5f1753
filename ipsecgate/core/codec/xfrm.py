"""Codec for NETLINK_XFRM: the kernel's datagrams into events, and requests for dumps.

Rules of this module: bytes in, values out, no socket. Sizes and offsets are those of
linux/xfrm.h, whose structures "may not change size"; x86-64 and aarch64 lay them out alike.
Priorities, reqids and marks are host order, SPIs and ports network order; an IPv4 address is
the first 4 of an xfrm_address_t's 16 bytes. What an application's flow and its answers can meet
is decoded: main policies with dir in or out, and states (which don't say their direction).
Well-formed messages about anything else are skipped: forward policies, per-socket ones (dir 3 and
4, an IKE daemon's), sub policies (Mobile IPv6), soft expiries, unknown types.
MIGRATE counts as a flush: it rewrites policies and states without saying what they became.

It does not judge: a larval state or one that no policy uses is passed on as it is.

    structure (bytes)           what is read, as offset:field
    xfrm_selector (56)          0:daddr 16:saddr 32:dport 34:dport_mask 36:sport 38:sport_mask
                                40:family 42:prefixlen_d 43:prefixlen_s 44:proto 48:ifindex
    xfrm_usersa_info (224)      0:sel 56:id.daddr 72:id.spi 76:id.proto 80:saddr
                                136:lft.hard_add_expires_seconds 176:curlft.add_time
                                208:reqid 212:family 214:mode
    xfrm_usersa_id (24)         0:daddr 16:spi 20:family 22:proto
    xfrm_userpolicy_info (168)  0:sel 152:priority 156:index 160:dir 161:action
    xfrm_userpolicy_id (64)     nothing: DELPOLICY has the policy in XFRMA_POLICY
    xfrm_user_tmpl (64)         0:id.daddr 16:id.spi 20:id.proto 24:family 28:saddr 44:reqid
                                48:mode 50:optional
    xfrm_user_expire (232)      0:state (xfrm_usersa_info) 224:hard
    xfrm_user_polexpire (176)   0:pol (xfrm_userpolicy_info) 168:hard

Source: linux/xfrm.h for the layout; net/xfrm/xfrm_user.c for what each message carries.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from socket import AF_INET, AF_INET6

from ipsecgate.core.codec.netlink import Message, Span, encode_dump, messages
from ipsecgate.core.model.events import (
    PoliciesFlushed,
    PolicyGone,
    PolicySet,
    SaGone,
    SaSet,
    SasFlushed,
    XfrmEvent,
)
from ipsecgate.core.model.flow import Address, Network, Selector
from ipsecgate.core.model.ipsec import (
    Action,
    Direction,
    Mark,
    Mode,
    Sa,
    SaId,
    SpdEntry,
    SpdKey,
    Template,
)

NEWSA, DELSA, GETSA, NEWPOLICY, DELPOLICY, GETPOLICY = range(0x10, 0x16)
EXPIRE, UPDPOLICY, UPDSA, POLEXPIRE, FLUSHSA, FLUSHPOLICY = range(0x18, 0x1E)
MIGRATE = 0x21

XFRMA_TMPL, XFRMA_SA, XFRMA_POLICY, XFRMA_POLICY_TYPE, XFRMA_MARK, XFRMA_IF_ID = 5, 6, 7, 16, 21, 31
XFRMA_SA_PCPU = 35
XFRMA_ALGORITHMS = frozenset({1, 2, 3, 18, 20})  # AUTH, CRYPT, COMP, AEAD, AUTH_TRUNC

SELECTOR_SIZE, SA_SIZE, SA_ID_SIZE, POLICY_SIZE, POLICY_ID_SIZE = 56, 224, 24, 168, 64
TEMPLATE_SIZE, EXPIRE_SIZE, POLEXPIRE_SIZE = 64, 232, 176

POLICY_BLOCK = 1
LIFETIME_UNLIMITED = (0, 2**64 - 1)  # unset, XFRM_INF

_SELECTOR = struct.Struct("=16s16s8sHBBB3xi4x")
_PORTS = struct.Struct("!HHHH")
_SA = struct.Struct("=56s16s4sB3x16s40xQ32xQ24xIHB9x")
_SA_ID = struct.Struct("=16s4sHBx")
_POLICY = struct.Struct("=56s96xIIBB6x")
_TEMPLATE = struct.Struct("=16s4sB3xH2x16sIBxB13x")
_MARK = struct.Struct("=II")
_U32 = struct.Struct("=I")

_DIRECTIONS = frozenset(Direction)

Attributes = Mapping[int, Span]


def decode(datagram: bytes) -> Iterator[XfrmEvent]:
    """Yield the events of a datagram in order; messages that hold none for us are skipped.

    Raises: DecodeError at the first bad message, after the events of those before it.
    """
    for message in messages(datagram):
        decoder = _DECODERS.get(message.type)
        if decoder is not None and (event := decoder(message)) is not None:
            yield event


def encode_policy_dump(sequence: int) -> bytes:
    """Encode XFRM_MSG_GETPOLICY for all policies.

    The kernel insists on the whole structure, though a dump reads nothing from it.
    Source: xfrm_msg_min[] in net/xfrm/xfrm_user.c.
    """
    return encode_dump(GETPOLICY, bytes(POLICY_ID_SIZE), sequence)


def encode_sa_dump(sequence: int) -> bytes:
    """Encode XFRM_MSG_GETSA for all states."""
    return encode_dump(GETSA, bytes(SA_ID_SIZE), sequence)


# --- messages -----------------------------------------------------------------------


def _new_policy(message: Message) -> PolicySet | None:
    at = message.structure(POLICY_SIZE, "xfrm_userpolicy_info")
    entry = _policy(message, at, message.attributes(POLICY_SIZE))
    return PolicySet(entry) if entry else None


def _del_policy(message: Message) -> PolicyGone | None:
    message.structure(POLICY_ID_SIZE, "xfrm_userpolicy_id")
    attributes = message.attributes(POLICY_ID_SIZE)
    at = message.payload(attributes, XFRMA_POLICY, POLICY_SIZE, "XFRMA_POLICY")
    if at is None:
        raise message.bad("XFRMA_POLICY (missing)", message.end)
    entry = _policy(message, at, attributes)
    return PolicyGone(entry.key) if entry else None


def _policy_expired(message: Message) -> PolicyGone | None:
    at = message.structure(POLEXPIRE_SIZE, "xfrm_user_polexpire")
    entry = _policy(message, at, message.attributes(POLEXPIRE_SIZE))
    return PolicyGone(entry.key) if entry and message.data[at + POLICY_SIZE] else None


def _flush_policies(message: Message) -> PoliciesFlushed | None:
    return PoliciesFlushed() if _is_main(message, message.attributes(0)) else None


def _new_sa(message: Message) -> SaSet:
    at = message.structure(SA_SIZE, "xfrm_usersa_info")
    return SaSet(_sa(message, at, message.attributes(SA_SIZE)))


def _del_sa(message: Message) -> SaGone:
    at = message.structure(SA_ID_SIZE, "xfrm_usersa_id")
    message.attributes(SA_ID_SIZE)
    daddr, spi, family, proto = _SA_ID.unpack_from(message.data, at)
    destination = _address(message, family, daddr, at + 20)
    return SaGone(SaId(destination, int.from_bytes(spi, "big"), proto))


def _sa_expired(message: Message) -> SaGone | None:
    at = message.structure(EXPIRE_SIZE, "xfrm_user_expire")
    sa = _sa(message, at, message.attributes(EXPIRE_SIZE))
    return SaGone(sa.id) if message.data[at + SA_SIZE] else None


def _flush_sas(message: Message) -> SasFlushed:
    message.structure(1, "xfrm_usersa_flush")
    return SasFlushed()


_DECODERS: Mapping[int, Callable[[Message], XfrmEvent | None]] = {
    NEWPOLICY: _new_policy,
    UPDPOLICY: _new_policy,
    DELPOLICY: _del_policy,
    POLEXPIRE: _policy_expired,
    FLUSHPOLICY: _flush_policies,
    NEWSA: _new_sa,
    UPDSA: _new_sa,
    DELSA: _del_sa,
    EXPIRE: _sa_expired,
    FLUSHSA: _flush_sas,
    MIGRATE: lambda _message: PoliciesFlushed(),
}

# --- structures and attributes ------------------------------------------------------


def _policy(message: Message, at: int, attributes: Attributes) -> SpdEntry | None:
    """Decode an xfrm_userpolicy_info and its attributes; None if it is not ours to follow."""
    sel, priority, index, direction, action = _POLICY.unpack_from(message.data, at)
    if direction not in _DIRECTIONS or not _is_main(message, attributes):
        return None
    selector = _selector(message, sel, at)
    if selector is None:
        raise message.bad("sel.family", at + 40)
    templates = tuple(_templates(message, attributes))
    if action == POLICY_BLOCK:
        meaning = Action.DISCARD
    else:
        meaning = Action.PROTECT if templates else Action.BYPASS
    key = SpdKey(
        selector,
        _mark(message, attributes),
        _if_id(message, attributes),
        _host_bits(sel, selector),
        Direction(direction),
    )
    return SpdEntry(key, priority, meaning, templates, index)


def _templates(message: Message, attributes: Attributes) -> Iterator[Template]:
    start, end = attributes.get(XFRMA_TMPL, (0, 0))
    if (end - start) % TEMPLATE_SIZE:
        raise message.bad("XFRMA_TMPL", start)
    for at in range(start, end, TEMPLATE_SIZE):
        daddr, spi, proto, family, saddr, reqid, mode, optional = _TEMPLATE.unpack_from(
            message.data, at
        )
        yield Template(
            proto=proto,
            mode=_mode(mode),
            reqid=reqid,
            spi=int.from_bytes(spi, "big"),
            saddr=_address(message, family, saddr, at + 24) if any(saddr) else None,
            daddr=_address(message, family, daddr, at + 24) if any(daddr) else None,
            optional=bool(optional),
        )


def _sa(message: Message, at: int, attributes: Attributes) -> Sa:
    """Decode an xfrm_usersa_info and its attributes."""
    sel, daddr, spi, proto, saddr, lifetime, added, reqid, family, mode = _SA.unpack_from(
        message.data, at
    )
    destination = _address(message, family, daddr, at + 212)
    identity = SaId(destination, int.from_bytes(spi, "big"), proto)
    return Sa(
        id=identity,
        saddr=_address(message, family, saddr, at + 212),
        reqid=reqid,
        mode=_mode(mode),
        selector=_selector(message, sel, at),
        mark=_mark(message, attributes),
        if_id=_if_id(message, attributes),
        cpu=_cpu(message, attributes),
        larval=identity.spi == 0 or XFRMA_ALGORITHMS.isdisjoint(attributes),
        hard_lifetime=None if lifetime in LIFETIME_UNLIMITED else lifetime,
        installed_at=added,
    )


def _selector(message: Message, raw: bytes, at: int) -> Selector | None:
    """Decode an xfrm_selector; None: no family, it matches flows of both."""
    daddr, saddr, ports, family, bits_d, bits_s, proto, ifindex = _SELECTOR.unpack(raw)
    if family == 0:
        return None
    dport, dport_mask, sport, sport_mask = _PORTS.unpack(ports)
    try:
        src, dst = _network(family, saddr, bits_s), _network(family, daddr, bits_d)
    except ValueError as error:
        raise message.bad(f"sel ({error})", at) from None
    return Selector(src, dst, proto, sport, sport_mask, dport, dport_mask, ifindex)


def _host_bits(raw: bytes, selector: Selector) -> tuple[int, int]:
    """Return what a selector's addresses, source and destination, have beyond their prefixes."""
    size = selector.src.max_prefixlen // 8
    source, destination = raw[16 : 16 + size], raw[:size]
    return (
        int.from_bytes(source, "big") - int(selector.src.network_address),
        int.from_bytes(destination, "big") - int(selector.dst.network_address),
    )


# Few addresses and sources occur again and again, and making one is most of the cost.
@lru_cache(maxsize=4096)
def _network(family: int, raw: bytes, bits: int) -> Network:
    if family == AF_INET:
        return IPv4Network((int.from_bytes(raw[:4], "big"), bits), strict=False)
    if family == AF_INET6:
        return IPv6Network((int.from_bytes(raw, "big"), bits), strict=False)
    raise ValueError(f"family {family}")


@lru_cache(maxsize=4096)
def _ip(family: int, raw: bytes) -> Address:
    if family == AF_INET:
        return IPv4Address(raw[:4])
    if family == AF_INET6:
        return IPv6Address(raw)
    raise ValueError(f"family {family}")


def _address(message: Message, family: int, raw: bytes, family_at: int) -> Address:
    try:
        return _ip(family, raw)
    except ValueError as error:
        raise message.bad(str(error), family_at) from None


def _mode(number: int) -> Mode:
    try:
        return Mode(number)
    except ValueError:
        return Mode.UNKNOWN


def _mark(message: Message, attributes: Attributes) -> Mark:
    at = message.payload(attributes, XFRMA_MARK, _MARK.size, "XFRMA_MARK")
    return Mark() if at is None else Mark(*_MARK.unpack_from(message.data, at))


def _if_id(message: Message, attributes: Attributes) -> int:
    at = message.payload(attributes, XFRMA_IF_ID, _U32.size, "XFRMA_IF_ID")
    return 0 if at is None else int(_U32.unpack_from(message.data, at)[0])


def _cpu(message: Message, attributes: Attributes) -> int | None:
    at = message.payload(attributes, XFRMA_SA_PCPU, _U32.size, "XFRMA_SA_PCPU")
    return None if at is None else int(_U32.unpack_from(message.data, at)[0])


def _is_main(message: Message, attributes: Attributes) -> bool:
    """Tell a main policy from a sub policy; the attribute is absent without sub policies."""
    at = message.payload(attributes, XFRMA_POLICY_TYPE, 1, "XFRMA_POLICY_TYPE")
    return at is None or message.data[at] == 0
