"""A destination as people write it: HOST:PORT, or HOST:PORT/udp."""

from __future__ import annotations

import re
import socket

from ipsecgate.core.model.flow import TCP, UDP, Address, Flow, parse_address
from ipsecgate.errors import GateError, UsageError
from ipsecgate.printable import printable

_TARGET = re.compile(
    r"(?:\[(?P<v6>[^\]]+)\]|(?P<host>[^:\[\]/]+)):(?P<port>[0-9]{1,5})(?:/(?P<proto>tcp|udp))?"
)


def flows_to(target: str, source: str | None = None) -> list[Flow]:
    """Return the flows that HOST:PORT/PROTOCOL names: one for each address of the host.

    Raises: UsageError; GateError if the host's name cannot be resolved.
    """
    match = _TARGET.fullmatch(target)
    if match is None or not 0 < int(match["port"]) <= 0xFFFF:
        raise UsageError(
            f"{printable(target)} is not HOST:PORT or HOST:PORT/udp",
            hint="for example 10.2.0.5:5432, or [2001:db8::5]:53/udp",
        )
    saddr = None if source is None else _address(source, "--from")
    daddrs = [_address(match["v6"], "HOST")] if match["v6"] else _resolve(match["host"])
    proto = UDP if match["proto"] == "udp" else TCP
    flows = [
        Flow(daddr, proto, int(match["port"]), saddr)
        for daddr in daddrs
        if saddr is None or saddr.version == daddr.version
    ]
    if not flows:
        raise UsageError(f"--from {source} is of another address family than {target}")
    return flows


def _address(text: str, what: str) -> Address:
    try:
        return parse_address(text)
    except ValueError as error:
        raise UsageError(f"{what}: {printable(text)} is not an IPv4 or IPv6 address") from error


def _resolve(host: str) -> list[Address]:
    try:
        found = socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)
    except (OSError, UnicodeError) as error:
        raise GateError(
            f"{printable(host)} cannot be resolved: {getattr(error, 'strerror', error)}",
            hint="name an address; if the resolver itself is refused, `ipsecgate events` shows it",
        ) from error
    return list(dict.fromkeys(parse_address(str(info[4][0])) for info in found))
