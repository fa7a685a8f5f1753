"""strongSwan's VICI messages, parsed into configurations, CHILD_SAs and events.

    list-conn    {ike: {local_addrs: [...], remote_addrs: [...], remote-N: {class, id},
                        children: {child: {mode, local-ts: [...], remote-ts: [...]}}}}
    list-sa      {ike: {local-host, remote-host, child-sas: {child-N: {
                        name, uniqueid, reqid, state, protocol, spi-in, spi-out (hex),
                        local-ts: [...], remote-ts: [...]}}}}
    child-updown {up: yes?, ike: as in list-sa, with the one child}
    ike-updown   {up: yes?, ike: {uniqueid, remote-host, ...}}

Rules of this module: messages in, values out. It opens no socket and resolves no names itself
(see `Names`). A child that cannot be parsed is an error; `split_children` confines it to that
child.

Source: README.md of strongSwan's vici plugin.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ipaddress import ip_network

from ipsecgate.core.codec.vici_sections import (
    Section,
    ViciError,
    number,
    sections,
    subsection,
    text,
    texts,
)
from ipsecgate.core.codec.vici_selectors import Names, selectors
from ipsecgate.core.model.events import ChildDown, ChildUp, IkeDown, IkeUp
from ipsecgate.core.model.flow import Network, parse_address
from ipsecgate.core.model.ipsec import AH, ESP, ChildConfig, ChildName, ChildSa, Mode

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


# --- configurations -----------------------------------------------------------------


def child_configs(conn: Section, names: Names) -> Iterator[ChildConfig]:
    """Yield the children of a list-conn event, without shunts (PASS, DROP), which have no SA.

    Raises: ViciError.
    """
    for ike, body in sections(conn):
        local_addresses = literal_addresses(texts(body, "local_addrs"))
        remote_addresses = literal_addresses(texts(body, "remote_addrs"))
        expected = tuple(_expected(body, key) for key in ("id", "class"))
        for child, config in sections(subsection(body, "children")):
            name = ChildName(ike, child)
            mode = text(config, "mode")
            if mode in SHUNTS:
                continue
            if mode not in MODES:
                raise ViciError(f"child {name} has unknown mode {mode}")
            yield ChildConfig(
                name=name,
                mode=MODES[mode],
                local=selectors(texts(config, "local-ts"), local_addresses, names),
                remote=selectors(texts(config, "remote-ts"), remote_addresses, names),
                wildcard=MODES[mode] is Mode.TRANSPORT and is_wildcard(texts(body, "remote_addrs")),
                peer_id=expected[0],
                peer_auth=expected[1],
            )


def _expected(conn: Section, key: str) -> str:
    """Return what a connection expects of its peer; several rounds are joined by commas."""
    rounds = [side for name, side in sections(conn) if name.startswith("remote")]
    values = (text(side, key) for side in rounds if isinstance(side.get(key), bytes))
    return ", ".join(dict.fromkeys(value for value in values if value != "%any"))


def widen(conn: Section) -> Section:
    """Return a list-conn event whose traffic selectors cover all protocols and ports.

    For a child whose protocols or ports cannot be parsed: the result includes all that it protects.
    """

    def widen_child(child: Section) -> Section:
        wide = {
            side: [one.partition(b"[")[0] for one in child.get(side, ())]
            for side in ("local-ts", "remote-ts")
        }
        return {**child, **wide}

    return {
        ike: {
            **body,
            "children": {n: widen_child(c) for n, c in sections(subsection(body, "children"))},
        }
        for ike, body in sections(conn)
    }


def is_wildcard(addresses: Sequence[str]) -> bool:
    """Return whether IKE addresses name no host: only %any, networks and ranges of addresses.

    Source: resolve_other() in strongSwan's ike_cfg.c, which takes the first that is a host.
    """
    return all(map(_names_no_host, addresses))


def _names_no_host(address: str) -> bool:
    first, dash, last = address.partition("-")
    if "/" in address or address.startswith("%any"):
        return True
    return bool(dash) and bool(literal_addresses((first,)) and literal_addresses((last,)))


def literal_addresses(addresses: Sequence[str]) -> tuple[Network, ...]:
    """Return the IKE addresses that are literal: not %any, a host name or a range."""
    found: list[Network] = []
    for address in addresses:
        try:
            found.append(ip_network(parse_address(address)))
        except ValueError:
            continue
    return tuple(found)


# --- the daemon ---------------------------------------------------------------------


def is_userspace_esp(stats: Section) -> bool:
    """Return whether the daemon does ESP in userspace (kernel-libipsec), given its `stats`.

    The daemon has one IPsec backend: that of the first plugin that offers one, and `stats` lists
    the plugins in that order. A kernel-libipsec after kernel-netlink is loaded and has a TUN
    device, but does nothing.

    Raises: ViciError.
    Source: "Plugin Load Options" in strongSwan's documentation; both orders tested with 5.9.8.
    """
    backends = (name for name in texts(stats, "plugins") if name.startswith("kernel-"))
    return next(backends, "") == "kernel-libipsec"


# --- SAs ----------------------------------------------------------------------------


def child_sas(message: Section, names: Names) -> Iterator[ChildSa]:
    """Yield the CHILD_SAs of a list-sa event that can carry traffic. Raises: ViciError."""
    for sa, state in _children(message, names):
        if state in USABLE:
            yield sa


def _children(message: Section, names: Names) -> Iterator[tuple[ChildSa, str]]:
    """Yield every CHILD_SA that has SPIs, with its state."""
    for ike, body in sections(message):
        for _, child in sections(subsection(body, "child-sas")):
            if "spi-out" in child:
                yield _child_sa(ike, body, child, names), text(child, "state")


def _child_sa(ike: str, body: Section, child: Section, names: Names) -> ChildSa:
    try:
        local_host = parse_address(text(body, "local-host"))
        remote_host = parse_address(text(body, "remote-host"))
    except ValueError as error:
        raise ViciError(f"CHILD_SA of {ike}: {str(error)[:80]}") from error
    protocol = text(child, "protocol")
    if protocol not in PROTOCOLS:
        raise ViciError(f"CHILD_SA of {ike}: unknown protocol {protocol[:40]!r}")
    return ChildSa(
        name=ChildName(ike, text(child, "name")),
        reqid=number(child, "reqid"),
        spi_in=number(child, "spi-in", 16),
        spi_out=number(child, "spi-out", 16),
        remote_host=remote_host,
        local=selectors(texts(child, "local-ts"), (), names),
        remote=selectors(texts(child, "remote-ts"), (), names),
        unique=number(child, "uniqueid"),
        proto=PROTOCOLS[protocol],
        local_host=local_host,
    )


def child_updown(message: Section, names: Names) -> Iterator[ChildUp | ChildDown]:
    """Yield the events in a child-updown message. Raises: ViciError."""
    up = message.get("up") == b"yes"
    for sa, _state in _children(message, names):
        yield ChildUp(sa) if up else ChildDown(sa)


def child_rekey(message: Section, names: Names) -> Iterator[ChildUp | ChildDown]:
    """Yield the events in a child-rekey message: the new SA is up, the old one is down.

    Raises: ViciError.
    """
    for ike, body in sections(message):
        for _, pair in sections(subsection(body, "child-sas")):
            yield ChildUp(_child_sa(ike, body, subsection(pair, "new"), names))
            yield ChildDown(_child_sa(ike, body, subsection(pair, "old"), names))


def ike_updown(message: Section) -> Iterator[IkeUp | IkeDown]:
    """Yield the events in an ike-updown message. Raises: ViciError."""
    up = message.get("up") == b"yes"
    for ike, body in sections(message):
        unique = number(body, "uniqueid")
        yield IkeUp(ike, unique) if up else IkeDown(ike, unique)
