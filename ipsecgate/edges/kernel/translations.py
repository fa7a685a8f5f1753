"""What the NAT rules of this namespace make of its own flows: of their sources and destinations.

Nothing is asked and nothing is computed while there are no such rules.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Address, IPv6Address, summarize_address_range

from ipsecgate.core.codec.forwarding import decode_packet, encode_packet_get
from ipsecgate.core.codec.links import decode_addresses, encode_address_dump
from ipsecgate.core.model.flow import TCP, UDP, Address, FlowPath, Network
from ipsecgate.core.model.namespace import DeviceAddress, masquerade_address
from ipsecgate.core.model.nat import AddressType, Device, Hook, Packet, Ruleset, Service
from ipsecgate.core.model.prefixes import PrefixSet, as_prefix
from ipsecgate.core.nat import local
from ipsecgate.core.nat.mentions import Candidate, Mentions
from ipsecgate.core.nat.translation import Nat
from ipsecgate.edges.kernel.netlink import Requests

WIDEST = 16  # addresses of a service network; flows to a wider one are left to the backstop


class Translations:
    """The rules, and the addresses from which MASQUERADE chooses."""

    def __init__(self, nat: Nat | None = None) -> None:
        self._nat = nat or Nat(Ruleset())
        self._named: set[Network] = set()
        self._addresses: list[DeviceAddress] = []
        self._services = tuple(self._candidates()) if self._nat.translates else ()
        if self._nat.translates:
            for version in (4, 6):
                found = Mentions(self._nat.ruleset, Hook.POSTROUTING, version).networks
                self._named |= found or set()

    def _candidates(self) -> Iterator[Candidate]:
        for version in (4, 6):
            found = Mentions(self._nat.ruleset, Hook.OUTPUT, version).services
            for one in found or ():
                if one.network.num_addresses <= WIDEST:
                    yield one

    async def services(self, requests: Requests, followed: PrefixSet) -> tuple[Service, ...]:
        """Return the service addresses that rules lead to the followed networks.

        Raises: OSError.
        """
        found: set[Service] = set()
        asked: set[tuple[Address, int, tuple[int, int]]] = set()
        for one in self._services:
            if one.target is not None and not _overlaps(followed, one):
                continue
            for address in one.network:
                for proto in (one.proto,) if one.proto else (TCP, UDP):
                    packet = self._packet(requests, one, Packet(address, proto))
                    if packet is None or (address, proto, one.ports) in asked:
                        continue
                    asked.add((address, proto, one.ports))
                    # In a thread: thousands of rules take a tenth of a second.
                    service = await asyncio.to_thread(
                        local.service, one, self._nat, packet, followed
                    )
                    found |= {service} if service is not None else set()
        return tuple(sorted(found, key=str))

    def _packet(self, requests: Requests, at: Candidate, packet: Packet) -> Packet | None:
        """Return a packet as routing makes it, None if there is no route."""
        try:
            routes = requests.ask(partial(encode_packet_get, packet.daddr), decode_packet)
        except OSError:
            return None
        if not routes:
            return None
        return replace(
            packet,
            saddr=routes[0].source,
            dport=at.ports[0] if at.ports[0] == at.ports[1] else 0,
            saddr_type=AddressType.LOCAL,
            daddr_type=AddressType.LOCAL if routes[0].is_local else AddressType.UNICAST,
        )

    @property
    def networks(self) -> Iterable[Network]:
        """Return the destinations that the rules name, at which the answer can change."""
        return self._named

    async def refresh(self, requests: Requests) -> None:
        """Read the addresses. Raises: OSError, DecodeError."""
        if self._nat.translates:
            self._addresses = await requests.dump(encode_address_dump, decode_addresses)

    def apply(
        self, requests: Requests, to: Address, path: FlowPath, device: Device | None
    ) -> FlowPath:
        """Return a path to a destination with its source translated. `device`: of the output."""
        if not self._nat.translates or path.source is None or device is None:
            return path
        encode = partial(encode_packet_get, to, leaves=device.index)
        try:
            routes = requests.ask(encode, decode_packet)
        except OSError:
            return path
        hop = next((route.gateway for route in routes if route.gateway is not None), to)
        masquerade = masquerade_address(self._addresses, device.index, hop)
        return local.translated(path, self._nat, to, oif=device, masquerade=masquerade)


def _overlaps(followed: PrefixSet, one: Candidate) -> bool:
    """Tell whether a followed network has one of the addresses that rules may lead to."""
    ends = one.target or (0, 0)
    if one.network.version == 4:
        networks = summarize_address_range(*map(IPv4Address, ends))
        return any(followed.overlaps(as_prefix(network)) for network in networks)
    wide = summarize_address_range(*map(IPv6Address, ends))
    return any(followed.overlaps(as_prefix(network)) for network in wide)
