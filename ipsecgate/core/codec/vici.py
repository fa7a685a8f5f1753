"""What strongSwan's VICI messages mean: sections of text into the domain's words.

Rules of this module: parsed messages in, values out; no socket, no name look-up of its own:
charon writes well-known ports and protocols as names, and `Names` turns them back. A selector
that is not understood is an error, never left out: what is left out would not be protected.
The error is that of its child alone: `apart` gives every child a message of its own.

    list-conn    {ike: {local_addrs: [...], remote_addrs: [...],
                        children: {child: {mode, local-ts: [...], remote-ts: [...]}}}}
    list-sa      {ike: {local-host, remote-host, child-sas: {child-N: {
                        name, uniqueid, reqid, state, protocol, spi-in, spi-out (hex),
                        local-ts: [...], remote-ts: [...]}}}}
    child-updown {up: yes?, ike: as in list-sa, with the one child}
    ike-updown   {up: yes?, ike: {uniqueid, remote-host, ...}}

A traffic selector is `NET`, `NET[PROTO]` or `NET[PROTO/PORTS]`: NET a prefix, `a..b` or
`dynamic` (the IKE peer's address); PROTO a name or number, 0 any; PORTS a name, a number,
`a-b` or OPAQUE (present in no packet), for ICMP `TYPE` or `TYPE(CODE)`.

Source: README.md of strongSwan's vici plugin; traffic_selector_printf_hook() for the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_network, summarize_address_range
from typing import Any

from ipsecgate.core.model.events import ChildDown, ChildUp, IkeDown, IkeUp
from ipsecgate.core.model.flow import PORT_MASK, Network, TrafficSelector, parse_address
from ipsecgate.core.model.ipsec import AH, ESP, ChildConfig, ChildName, ChildSa, Mode
from ipsecgate.errors import GateError

Section = Mapping[str, Any]

MODES = {
    "TRANSPORT": Mode.TRANSPORT,
    "TRANSPORT_PROXY": Mode.TRANSPORT,
    "TUNNEL": Mode.TUNNEL,
    "BEET": Mode.BEET,
    "IPTFS": Mode.IPTFS,
}
PROTOCOLS = {"ESP": ESP, "AH": AH}
SHUNTS = frozenset({"PASS", "DROP"})
USABLE = frozenset({"INSTALLED", "REKEYING", "REKEYED"})
OPAQUE = (PORT_MASK, 0)
ICMP = frozenset({1, 58})

_SELECTOR = re.compile(r"([^\[\]]+)(?:\[([^/\]]+)(?:/([^\]]+))?\])?")
_PORT_RANGE = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_BYTE = r"([0-9]{1,3})"
_ICMP_RANGE = re.compile(rf"{_BYTE}(?:\({_BYTE}\))?(?:-{_BYTE}(?:\({_BYTE}\))?)?")
_NUMBER = {10: re.compile(r"[0-9]{1,10}"), 16: re.compile(r"[0-9a-fA-F]{1,8}")}


class ViciError(GateError):
    """A VICI message that does not say what it should."""

    def __init__(self, message: str) -> None:
        super().__init__(
            f"VICI: {message}",
            hint="use strongSwan 5.9 or later; else report a bug, with `swanctl --list-conns`",
        )


@dataclass(frozen=True, slots=True)
class Names:
    """How to read names: protocol -> number, (service, protocol's name or None) -> port.

    Both raise OSError for a name they don't know, as the socket module's do.
    """

    protocol: Callable[[str], int]
    service: Callable[[str, str | None], int]


def text(section: Section, key: str) -> str:
    """Return a value as text. Raises: ViciError if there is none."""
    value = section.get(key)
    if not isinstance(value, bytes):
        raise ViciError(f"no value {key!r} among {sorted(section)}")
    return value.decode(errors="replace")


def texts(section: Section, key: str) -> list[str]:
    """Return a list of values as text, empty if there is none. Raises: ViciError."""
    values = section.get(key, [])
    if not isinstance(values, list):
        raise ViciError(f"{key!r} is not a list")
    return [item.decode(errors="replace") for item in values]


def number(section: Section, key: str, base: int = 10) -> int:
    """Return a value of 32 bits, as strongSwan writes it. Raises: ViciError."""
    written = text(section, key)
    found = int(written, base) if _NUMBER[base].fullmatch(written) else -1
    if not 0 <= found < 1 << 32:
        raise ViciError(f"{key!r} is not a number: {written[:40]!r}")
    return found


def part(section: Section, key: str) -> Section:
    """Return a section inside another, empty if there is none. Raises: ViciError."""
    found = section.get(key, {})
    if not isinstance(found, Mapping):
        raise ViciError(f"{key!r} is not a section")
    return found


def sections(section: Section) -> Iterator[tuple[str, Section]]:
    """Yield the named sections, not the values beside them."""
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield name, value


def apart(message: Section, children: str) -> Iterator[Section]:
    """Yield the message once for each child of its section `children`, with that child alone.

    So what one peer agreed to, or one connection says, is read whatever another's is like.
    """
    for ike, body in message.items():
        found = body.get(children) if isinstance(body, Mapping) else None
        if not isinstance(found, Mapping):
            yield {ike: body}
            continue
        for name, child in found.items():
            yield {ike: {**body, children: {name: child}}}


# --- configurations -----------------------------------------------------------------


def child_configs(conn: Section, names: Names) -> Iterator[ChildConfig]:
    """Yield the children of a list-conn event; shunts (PASS, DROP) are no SAs and left out.

    Raises: ViciError.
    """
    for ike, body in sections(conn):
        local_addresses = concrete(texts(body, "local_addrs"))
        remote_addresses = concrete(texts(body, "remote_addrs"))
        for child, config in sections(part(body, "children")):
            name = ChildName(ike, child)
            mode = text(config, "mode")
            if mode in SHUNTS:
                continue
            if mode not in MODES:
                raise ViciError(f"child {name} has the unknown mode {mode}")
            yield ChildConfig(
                name=name,
                mode=MODES[mode],
                local=selectors(texts(config, "local-ts"), local_addresses, names),
                remote=selectors(texts(config, "remote-ts"), remote_addresses, names),
            )


def widened(conn: Section) -> Section:
    """Return a list-conn event with its traffic selectors as networks, for all protocols and ports.

    For one whose protocols or ports are not understood: what it protects is among this.
    """

    def widen(child: Section) -> Section:
        wide = {
            side: [one.partition(b"[")[0] for one in child.get(side, ())]
            for side in ("local-ts", "remote-ts")
        }
        return {**child, **wide}

    return {
        ike: {**body, "children": {n: widen(c) for n, c in sections(part(body, "children"))}}
        for ike, body in sections(conn)
    }


def concrete(addresses: Sequence[str]) -> tuple[Network, ...]:
    """Return the IKE addresses that are one address each; %any, names and ranges are not."""
    found: list[Network] = []
    for address in addresses:
        try:
            found.append(ip_network(parse_address(address)))
        except ValueError:
            continue
    return tuple(found)


def selectors(
    written: Sequence[str], dynamic: Sequence[Network], names: Names
) -> tuple[TrafficSelector, ...]:
    """Parse traffic selectors; `dynamic` is what that word stands for. Raises: ViciError."""
    return tuple(ts for one in written for ts in _selector(one, dynamic, names))


def _selector(written: str, dynamic: Sequence[Network], names: Names) -> Iterator[TrafficSelector]:
    match = _SELECTOR.fullmatch(written)
    if match is None:
        raise ViciError(f"traffic selector {written[:80]!r} is not understood")
    where, protocol, ports = match.groups()
    try:
        proto = _protocol(protocol, names)
        port_range = _ports(ports, proto, protocol, names)
        networks = dynamic if where == "dynamic" else tuple(_networks(where))
    except (ValueError, TypeError, OSError) as error:
        raise ViciError(f"traffic selector {written[:80]!r}: {str(error)[:80]}") from error
    for network in networks:
        yield TrafficSelector(network, proto, port_range)


def _networks(where: str) -> Iterator[Network]:
    if "%" in where:
        raise ValueError("an interface")
    first, dots, last = where.partition("..")
    if dots:
        yield from summarize_address_range(parse_address(first), parse_address(last))
    else:
        yield ip_network(where, strict=False)


def _protocol(written: str | None, names: Names) -> int:
    if written is None:
        return 0
    proto = int(written) if _NUMBER[10].fullmatch(written) else names.protocol(written)
    if not 0 <= proto <= 0xFF:
        raise ValueError(f"protocol {proto}")
    return proto


def _ports(written: str | None, proto: int, protocol: str | None, names: Names) -> tuple[int, int]:
    if written is None:
        return (0, PORT_MASK)
    if written == "OPAQUE":
        return OPAQUE
    if proto in ICMP and (match := _ICMP_RANGE.fullmatch(written)):
        kind, code, last_kind, last_code = (int(part) if part else 0 for part in match.groups())
        if max(kind, code, last_kind, last_code) > 0xFF:
            raise ValueError(f"ICMP {written}")
        low = kind << 8 | code
        high = last_kind << 8 | last_code if match[3] else low
    elif match := _PORT_RANGE.fullmatch(written):
        low, high = int(match[1]), int(match[2] or match[1])
    else:
        low = high = names.service(written, protocol if proto else None)
    if not 0 <= low <= high <= PORT_MASK:
        raise ValueError(f"ports {low}-{high}")
    return low, high


# --- the daemon ---------------------------------------------------------------------


def is_userland(stats: Section) -> bool:
    """Tell from the answer to `stats` whether the daemon does ESP itself, by kernel-libipsec.

    It has one IPsec backend, of the first plugin that offers one, and lists its plugins in that
    order. kernel-libipsec behind kernel-netlink is loaded, has its TUN device, and does nothing.
    Raises: ViciError.
    Source: "Plugin Load Options" in strongSwan's documentation; tried both ways with 5.9.8.
    """
    backends = (name for name in texts(stats, "plugins") if name.startswith("kernel-"))
    return next(backends, "") == "kernel-libipsec"


# --- SAs ----------------------------------------------------------------------------


def child_sas(message: Section, names: Names) -> Iterator[ChildSa]:
    """Yield the CHILD_SAs that carry traffic in a list-sa event. Raises: ViciError."""
    for sa, state in _children(message, names):
        if state in USABLE:
            yield sa


def _children(message: Section, names: Names) -> Iterator[tuple[ChildSa, str]]:
    """Yield every CHILD_SA that has SPIs, with its state."""
    for ike, body in sections(message):
        for _, child in sections(part(body, "child-sas")):
            if "spi-out" in child:
                yield _child_sa(ike, body, child, names), text(child, "state")


def _child_sa(ike: str, body: Section, child: Section, names: Names) -> ChildSa:
    try:
        here = parse_address(text(body, "local-host"))
        peer = parse_address(text(body, "remote-host"))
    except ValueError as error:
        raise ViciError(f"CHILD_SA of {ike}: {str(error)[:80]}") from error
    protocol = text(child, "protocol")
    if protocol not in PROTOCOLS:
        raise ViciError(f"CHILD_SA of {ike}: protocol {protocol[:40]!r}")
    return ChildSa(
        name=ChildName(ike, text(child, "name")),
        reqid=number(child, "reqid"),
        spi_in=number(child, "spi-in", 16),
        spi_out=number(child, "spi-out", 16),
        remote_host=peer,
        local=selectors(texts(child, "local-ts"), (), names),
        remote=selectors(texts(child, "remote-ts"), (), names),
        unique=number(child, "uniqueid"),
        proto=PROTOCOLS[protocol],
        local_host=here,
    )


def child_updown(message: Section, names: Names) -> Iterator[ChildUp | ChildDown]:
    """Yield what a child-updown event says. Raises: ViciError."""
    up = message.get("up") == b"yes"
    for sa, _state in _children(message, names):
        yield ChildUp(sa) if up else ChildDown(sa)


def child_rekey(message: Section, names: Names) -> Iterator[ChildUp | ChildDown]:
    """Yield what a child-rekey event says: the new one, then the old. Raises: ViciError."""
    for ike, body in sections(message):
        for _, pair in sections(part(body, "child-sas")):
            yield ChildUp(_child_sa(ike, body, part(pair, "new"), names))
            yield ChildDown(_child_sa(ike, body, part(pair, "old"), names))


def ike_updown(message: Section) -> Iterator[IkeUp | IkeDown]:
    """Yield what an ike-updown event says. Raises: ViciError."""
    up = message.get("up") == b"yes"
    for ike, body in sections(message):
        unique = number(body, "uniqueid")
        yield IkeUp(ike, unique) if up else IkeDown(ike, unique)
