"""The host floor: XFRM block policies behind all others, for every process of the host.

A protect policy becomes a policy that blocks its networks, a bypass policy one that allows them.
They have the highest priority numbers, in the operator's order, so every policy of the IKE daemon
wins over them. The daemon's own sockets have per-socket policies.

Rules of this module: a floor policy is recognised by its priority and by a tag in the host bits of
its source, a /0 that matches every address. The kernel treats policies with the same selector as
one, whatever their priorities; the tag makes each instance's selectors distinct.

Source: linux/xfrm.h; xfrm_policy_insert_list(), selector_cmp().
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_network
from itertools import product
from zlib import crc32

from ipsecgate.core.model.flow import ANY_V6, DHCP, PORT_MASK, UDP, Address
from ipsecgate.core.model.ipsec import Action, Direction, SpdEntry
from ipsecgate.core.model.policy import FLOOR_PRIORITY, FloorPolicy, Policy
from ipsecgate.core.model.prefixes import PrefixSet, as_prefix
from ipsecgate.core.tables.table import port_masks

_LAST = 0xFFFF  # the last place

ICMPV6 = 58
# The ICMPv6 types of neighbour discovery, 133 to 136, as two aligned blocks; one contains 132.
NEIGHBOURS = ((132, PORT_MASK & ~3), (136, PORT_MASK))
LOOPBACK = ip_network("::1/128")  # subject to XFRM policies, unlike 127.0.0.1


def instance_tag(instance: str) -> int:
    """Return the tag of an instance's policies; never 0."""
    return crc32(f"ipsecgate/{instance}".encode()) | 1


def floor_policies(
    policies: Iterable[Policy], own: Iterable[Address] = ()
) -> tuple[FloorPolicy, ...]:
    """Return the floor for the operator's policies; empty without a protect policy.

    `own`: the host's addresses. Nothing leaves to them, but for IPv6, XFRM looks up policies.
    """
    found: list[FloorPolicy] = []
    for place, policy in enumerate(policies, 1):
        if policy.action is Action.DISCARD:
            continue  # discard is a promise about gated processes only
        block = policy.action is Action.PROTECT
        for network in policy.remote:
            for sport, dport in product(*map(_blocks, (policy.local_ports, policy.ports))):
                found.append(
                    FloorPolicy(min(place, _LAST), block, network, policy.proto, sport, dport)
                )
    if not any(policy.block for policy in found):
        return ()
    blocked = PrefixSet(policy.dst for policy in found if policy.block)
    found[:0] = [one for one in _exempt(own) if blocked.overlaps(as_prefix(one.dst))]
    return tuple(dict.fromkeys(found))


def _exempt(own: Iterable[Address]) -> list[FloorPolicy]:
    """Return what the hooks exempt as well, if it meets XFRM's policies at all."""
    here = sorted(ip_network(address) for address in own if address.version == 6)
    return [
        *(FloorPolicy(0, False, network) for network in (LOOPBACK, *here)),
        *(FloorPolicy(0, False, ANY_V6, ICMPV6, sport=types) for types in NEIGHBOURS),
        *(
            FloorPolicy(0, False, ip_network(to), UDP, (sport, PORT_MASK), (dport, PORT_MASK))
            for to, sport, dport in DHCP
        ),
    ]


def _blocks(ports: tuple[int, int]) -> list[tuple[int, int]]:
    return [(value & mask, mask) for value, mask in port_masks(*ports)]


def is_floor(entry: SpdEntry) -> bool:
    """Return whether a kernel policy belongs to the floor of any instance."""
    key = entry.key
    tagged = key.direction is Direction.OUT and key.host_bits[0] != 0
    return tagged and entry.priority >= FLOOR_PRIORITY and not entry.templates


def parse_own(entry: SpdEntry, tag: int) -> FloorPolicy | None:
    """Parse a kernel policy of the floor with this tag; return None for any other policy."""
    sel = entry.key.selector
    if not is_floor(entry) or entry.key.host_bits != (tag, 0) or sel.src.prefixlen:
        return None
    return FloorPolicy(
        entry.priority - FLOOR_PRIORITY,
        entry.action is Action.DISCARD,
        sel.dst,
        sel.proto,
        (sel.sport, sel.sport_mask),
        (sel.dport, sel.dport_mask),
    )
