"""The addresses of this host."""

from __future__ import annotations

from ipsecgate.core.codec.links import decode_addresses, encode_address_dump
from ipsecgate.core.model.flow import Address
from ipsecgate.edges.kernel.netlink import Requests

NETLINK_ROUTE = 0


async def own() -> frozenset[Address]:
    """Return the addresses in this network namespace. Raises: OSError, DecodeError."""
    async with Requests(NETLINK_ROUTE) as requests:
        found = await requests.dump(encode_address_dump, decode_addresses)
    return frozenset(item.address for item in found)
