"""Traffic selectors as strongSwan prints them.

    NET                  all protocols and ports
    NET[PROTO]           all ports
    NET[PROTO/PORTS]

NET is a prefix, a range `a..b`, or `dynamic` (the IKE peer's address). PROTO is a name or a
number, 0 for any. PORTS is a name, a number, a range `a-b`, or OPAQUE (RFC 7296 section 3.13.1);
for ICMP it is `TYPE` or `TYPE(CODE)`, or a range of them.

Rules of this module: a selector that cannot be parsed is an error and is never skipped, because
the flows of a skipped selector would not be protected. strongSwan prints well-known protocols
and ports as names; `Names` turns them back into numbers.

Source: traffic_selector_printf_hook() in strongSwan's traffic_selector.c.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_network, summarize_address_range

from ipsecgate.core.codec.vici_sections import DIGITS, ViciError
from ipsecgate.core.model.flow import (
    ICMP,
    OPAQUE,
    PORT_MASK,
    Network,
    TrafficSelector,
    parse_address,
)
from ipsecgate.core.model.value import value

_SELECTOR = re.compile(r"([^\[\]]+)(?:\[([^/\]]+)(?:/([^\]]+))?\])?")
_PORT_RANGE = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_BYTE = r"([0-9]{1,3})"
_ICMP_RANGE = re.compile(rf"{_BYTE}(?:\({_BYTE}\))?(?:-{_BYTE}(?:\({_BYTE}\))?)?")


@value
class Names:
    """Lookups for names: protocol -> number; (service, protocol name or None) -> port.

    Both raise OSError for an unknown name, as the functions of the socket module do.
    """

    protocol: Callable[[str], int]
    service: Callable[[str, str | None], int]


def selectors(
    written: Sequence[str], dynamic: Sequence[Network], names: Names
) -> tuple[TrafficSelector, ...]:
    """Parse traffic selectors; `dynamic` lists the networks that the word stands for.

    Raises: ViciError.
    """
    return tuple(ts for one in written for ts in _selector(one, dynamic, names))


def _selector(written: str, dynamic: Sequence[Network], names: Names) -> Iterator[TrafficSelector]:
    match = _SELECTOR.fullmatch(written)
    if match is None:
        raise ViciError(f"traffic selector {written[:80]!r} cannot be parsed")
    net, protocol, ports = match.groups()
    try:
        proto = _protocol(protocol, names)
        port_range = _ports(ports, proto, protocol, names)
        networks = dynamic if net == "dynamic" else tuple(_networks(net))
    except (ValueError, TypeError, OSError) as error:
        raise ViciError(f"traffic selector {written[:80]!r}: {str(error)[:80]}") from error
    for network in networks:
        yield TrafficSelector(network, proto, port_range)


def _networks(written: str) -> Iterator[Network]:
    if "%" in written:
        raise ValueError("names an interface")
    first, dots, last = written.partition("..")
    if dots:
        yield from summarize_address_range(parse_address(first), parse_address(last))
    else:
        yield ip_network(written, strict=False)


def _protocol(written: str | None, names: Names) -> int:
    if written is None:
        return 0
    proto = int(written) if DIGITS[10].fullmatch(written) else names.protocol(written)
    if not 0 <= proto <= 0xFF:
        raise ValueError(f"unknown protocol {proto}")
    return proto


def _ports(written: str | None, proto: int, protocol: str | None, names: Names) -> tuple[int, int]:
    if written is None:
        return (0, PORT_MASK)
    if written == "OPAQUE":
        return OPAQUE
    if proto in ICMP and (match := _ICMP_RANGE.fullmatch(written)):
        kind, code, last_kind, last_code = (int(part) if part else 0 for part in match.groups())
        if max(kind, code, last_kind, last_code) > 0xFF:
            raise ValueError(f"invalid ICMP type {written}")
        low = kind << 8 | code
        high = last_kind << 8 | last_code if match[3] else low
    elif match := _PORT_RANGE.fullmatch(written):
        low, high = int(match[1]), int(match[2] or match[1])
    else:
        low = high = names.service(written, protocol if proto else None)
    if not 0 <= low <= high <= PORT_MASK:
        raise ValueError(f"invalid ports {low}-{high}")
    return low, high
