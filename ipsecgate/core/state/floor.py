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

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_network
from zlib import crc32

from ipsecgate.core.codec.netlink import encode_request
from ipsecgate.core.codec.xfrm import DELPOLICY, UPDPOLICY
from ipsecgate.core.codec.xfrm_structures import POLICY_BLOCK
from ipsecgate.core.model.flow import ANY_V6, PORT_MASK, Network
from ipsecgate.core.model.ipsec import Action, Direction, SpdEntry
from ipsecgate.core.model.policy import Policy
from ipsecgate.core.tables.table import port_masks

PRIORITY = 0xFFFF_0000
_LAST = 0xFFFF

ICMPV6 = 58
# The ICMPv6 types of neighbour discovery, 133 to 136, as two aligned blocks; one contains 132.
NEIGHBOURS = ((132, PORT_MASK & ~3), (136, PORT_MASK))
LOOPBACK = ip_network("::1/128")  # subject to XFRM policies, unlike 127.0.0.1

_FAMILY = {4: 2, 6: 10}
_SELECTOR = struct.Struct("!16s16sHHHH")  # and then, in host order:
_REST = struct.Struct("=HBBB3xiI")
_LIFETIME = struct.pack("=8Q", *([2**64 - 1] * 4), *([0] * 4))  # XFRM_INF; no times
_POLICY = struct.Struct("=IIBBBB4x")
_POLICY_ID = struct.Struct("=IB3x")


@dataclass(frozen=True, slots=True)
class FloorPolicy:
    """One policy of the floor; `place` gives the order. Ports are (value, mask)."""

    place: int
    block: bool
    dst: Network
    proto: int = 0
    sport: tuple[int, int] = (0, 0)
    dport: tuple[int, int] = (0, 0)


def instance_tag(instance: str) -> int:
    """Return the tag of an instance's policies; never 0."""
    return crc32(f"ipsecgate/{instance}".encode()) | 1


def floor_policies(policies: Iterable[Policy]) -> tuple[FloorPolicy, ...]:
    """Return the floor for the operator's policies; empty without a protect policy."""
    found: list[FloorPolicy] = []
    for place, policy in enumerate(policies, 1):
        if policy.action is Action.DISCARD:
            continue  # discard is a promise about gated processes only
        block = policy.action is Action.PROTECT
        for network in policy.remote:
            for value, mask in port_masks(*policy.ports):
                dport = (value & mask, mask)
                found.append(
                    FloorPolicy(min(place, _LAST), block, network, policy.proto, dport=dport)
                )
    if not any(policy.block for policy in found):
        return ()
    if any(policy.block and policy.dst.version == 6 for policy in found):
        found[:0] = [
            FloorPolicy(0, False, LOOPBACK),
            *(FloorPolicy(0, False, ANY_V6, ICMPV6, sport=types) for types in NEIGHBOURS),
        ]
    return tuple(dict.fromkeys(found))


def is_floor(entry: SpdEntry) -> bool:
    """Return whether a kernel policy belongs to the floor of any instance."""
    key = entry.key
    tagged = key.direction is Direction.OUT and key.host_bits[0] != 0
    return tagged and entry.priority >= PRIORITY and not entry.templates


def parse_own(entry: SpdEntry, tag: int) -> FloorPolicy | None:
    """Parse a kernel policy of the floor with this tag; return None for any other policy."""
    sel = entry.key.selector
    if not is_floor(entry) or entry.key.host_bits != (tag, 0) or sel.src.prefixlen:
        return None
    return FloorPolicy(
        entry.priority - PRIORITY,
        entry.action is Action.DISCARD,
        sel.dst,
        sel.proto,
        (sel.sport, sel.sport_mask),
        (sel.dport, sel.dport_mask),
    )


def encode_set(policy: FloorPolicy, tag: int, sequence: int) -> bytes:
    """Encode XFRM_MSG_UPDPOLICY, which adds or replaces the policy."""
    action = POLICY_BLOCK if policy.block else 0
    tail = _POLICY.pack(PRIORITY + policy.place, 0, Direction.OUT, action, 0, 0)
    body = _selector(policy, tag) + _LIFETIME + bytes(32) + tail
    return encode_request(UPDPOLICY, body, sequence)


def encode_delete(policy: FloorPolicy, tag: int, sequence: int) -> bytes:
    """Encode XFRM_MSG_DELPOLICY, by selector."""
    body = _selector(policy, tag) + _POLICY_ID.pack(0, Direction.OUT)
    return encode_request(DELPOLICY, body, sequence)


def _selector(policy: FloorPolicy, tag: int) -> bytes:
    """Return struct xfrm_selector, 56 bytes."""
    size = policy.dst.max_prefixlen // 8
    return _SELECTOR.pack(
        policy.dst.network_address.packed.ljust(16, b"\0"),
        tag.to_bytes(size).ljust(16, b"\0"),
        *policy.dport,
        *policy.sport,
    ) + _REST.pack(_FAMILY[policy.dst.version], policy.dst.prefixlen, 0, policy.proto, 0, 0)
