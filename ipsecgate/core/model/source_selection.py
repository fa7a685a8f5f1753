"""Where the kernel's choice among its IPv6 source addresses can change with the destination.

A route without a `src` leaves the choice to RFC 6724. Rule 2 compares scopes, rule 6 labels, rule 8
how many first bits an address has in common with the destination; before that, Linux compares
whether both are ORCHIDs. So the choice can differ within one route, but only at a few prefixes.

Source: RFC 6724 section 5; ipv6_get_saddr_eval(), ipv6_addr_scope2type().
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv6Address, IPv6Network
from itertools import pairwise

from ipsecgate.core.model.namespace import DeviceAddress
from ipsecgate.core.model.prefixes import WIDTH, Prefix, as_prefix

BITS = WIDTH[6]
# Site-local and multicast destinations: of an interface, a link, a site, an organisation, global;
# each well known, transient, and by the sender's prefix.
SCOPES = frozenset(
    as_prefix(IPv6Network(text))
    for text in ("fec0::/10", *(f"ff{kind}{scope}::/16" for kind in "013" for scope in "1258e"))
)
ORCHID = as_prefix(IPv6Network("2001:10::/28"))


def boundaries(addresses: Iterable[DeviceAddress], labels: Iterable[Prefix]) -> set[Prefix]:
    """Return the prefixes at which the choice among these addresses can change.

    `labels`: the prefixes of the label table (`ip addrlabel`). Between two addresses, the choice
    changes where a destination shares the first bit in which they differ. Bits beyond an address's
    prefix length do not count, so of two the one with the longer prefix wins where a destination
    shares more bits than the shorter prefix has.
    """
    own = {
        (int(item.address), item.network.prefixlen)
        for item in addresses
        if isinstance(item.address, IPv6Address)
        and not (item.address.is_link_local or item.address.is_loopback)
    }
    if not own:
        return set()
    found = set(SCOPES)
    distinct = sorted({address for address, _ in own})
    if len(distinct) > 1:
        found |= {ORCHID, *labels}
    for low, high in pairwise(distinct):
        differs_at = BITS - (low ^ high).bit_length() + 1
        found |= {_prefix(low, differs_at), _prefix(high, differs_at)}
    lengths = {length for _, length in own}
    for address, length in own:
        found |= {_prefix(address, other + 1) for other in lengths if other < length}
    return found


def _prefix(address: int, bits: int) -> Prefix:
    rest = BITS - bits
    return 6, address >> rest << rest, bits
