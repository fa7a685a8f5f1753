"""A hub's connections: sites of mixed prefix lengths, and road warriors with one address each.

    sites           a trap policy each; local and remote networks from /8 to /32
    road warriors   the hub only responds, from any address, so the kernel has no policy until one
                    is up; for the hub's /24, remote networks are /32

No two remote networks overlap, so each flow belongs to one tunnel. They are taken from 240.0.0.0/4
(RFC 1112: reserved), because the documentation ranges have no space for a /8. Peers are in
198.18.0.0/15 (RFC 2544).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from random import Random
from typing import Any

from ipsecgate.core.model.flow import Address
from ipsecgate.lab.connections import ConnSpec, End, connection

REMOTE = IPv4Network("240.0.0.0/4")
PEERS = IPv4Network("198.18.0.0/15")
WARRIORS_FROM = IPv4Address("254.0.0.1")
WARRIOR_PEERS_FROM = IPv4Address("198.19.0.1")
SHORT, LONG = (
    (8, 9, 10, 11, 12, 13) * 4,
    range(14, 33),
)  # lengths: the address space limits /8 to /13
ANY = "%any"


@dataclass(frozen=True, slots=True)
class Tunnel:
    """One connection with one child. `peer`: the other gateway; `inside`: a host behind it."""

    name: str
    is_site: bool
    local: IPv4Network
    remote: IPv4Network
    peer: IPv4Address
    inside: IPv4Address

    @property
    def ends(self) -> tuple[Address, Address]:
        """The addresses by which XFRM notifications name the outbound policy."""
        return self.local.network_address, self.remote.network_address

    def at_hub(self, hub: Address) -> dict[str, Any]:
        """Return the hub's load-conn section."""
        section = self._section(hub, self.peer, "trap" if self.is_site else "none")
        if not self.is_site:
            section[self.name]["remote_addrs"] = [ANY]
        return section

    def at_peer(self, hub: Address) -> dict[str, Any]:
        """Return the peer's load-conn section."""
        return self._section(hub, self.peer, "none", turned=True)

    def _section(
        self, hub: Address, peer: Address, start_action: str, turned: bool = False
    ) -> dict[str, Any]:
        here = End(f"{self.name}@hub.example", hub, (str(self.local),))
        there = End(f"{self.name}@peer.example", peer, (str(self.remote),))
        spec = ConnSpec(self.name, "tunnel", 4)
        ends = (there, here) if turned else (here, there)
        return connection(spec, *ends, start_action)


def make_tunnels(dice: Random, hub: Address, sites: int, warriors: int) -> list[Tunnel]:
    """Return the tunnels of a hub whose address inside is `hub`: first the sites."""
    lengths = [*SHORT[:sites], *(dice.choice(LONG) for _ in range(sites - len(SHORT)))]
    found = []
    for number, remote in enumerate(_disjoint(lengths)):
        local = IPv4Network(f"{hub}/{dice.randint(8, 32)}", strict=False)
        inside = remote[min(1, remote.num_addresses - 1)]
        found.append(Tunnel(f"site{number}", True, local, remote, PEERS[number + 1], inside))
    home = IPv4Network(f"{hub}/24", strict=False)
    for number in range(warriors):
        inside = WARRIORS_FROM + number
        peer = WARRIOR_PEERS_FROM + number
        found.append(Tunnel(f"road{number}", False, home, IPv4Network(inside), peer, inside))
    return found


def _disjoint(lengths: Iterable[int]) -> list[IPv4Network]:
    """Return adjacent networks of these lengths, the widest first, so that each is aligned."""
    at, found = int(REMOTE[0]), []
    for length in sorted(lengths):
        found.append(IPv4Network((at, length)))
        at += 1 << 32 - length
    if at > int(WARRIORS_FROM):
        raise ValueError("the networks take more than the address space")
    return found
