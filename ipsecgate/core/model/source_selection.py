"""Where the kernel's choice among its IPv6 source addresses can change with the destination.

A route without a `src` leaves the choice to RFC 6724. Rule 8 compares how many first bits each of
our addresses has in common with the destination, and rule 6 their labels. So the choice can differ
within one route, but only at a few prefixes, which are returned here.

Source: RFC 6724 section 5; ipv6_get_saddr_eval().
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from ipsecgate.core.model.namespace import DeviceAddress
from ipsecgate.core.model.prefixes import WIDTH, Prefix

BITS = WIDTH[6]


def boundaries(addresses: Iterable[DeviceAddress], labels: Iterable[Prefix]) -> set[Prefix]:
    """Return the prefixes at which the choice among these addresses can change.

    `labels`: the prefixes of the label table (`ip addrlabel`). Between two addresses, the choice
    changes where a destination shares the first bit in which they differ. A prefix length limits
    how many bits count; the address with the longer one wins behind the end of the shorter.
    """
    own = {
        (int(item.address), item.network.prefixlen)
        for item in addresses
        if item.address.version == 6 and item.is_global
    }
    distinct = sorted({address for address, _ in own})
    if len(distinct) < 2:
        return set()
    found = set(labels)
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
