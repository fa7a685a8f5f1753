"""What matters in the gate's own namespace for packets that others send through it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from socket import AF_INET, AF_INET6

from ipsecgate.core.codec.links import (
    decode_addresses,
    decode_ingress,
    decode_labels,
    decode_links,
    encode_address_dump,
    encode_label_dump,
    encode_link_dump,
    encode_qdisc_dump,
)
from ipsecgate.core.codec.netlink import DecodeError, messages
from ipsecgate.core.codec.rtnetlink import (
    PREFIXED,
    ROUTES,
    decode_prefixes,
    encode_route_dump,
    encode_rule_dump,
)
from ipsecgate.core.model.flow import Network
from ipsecgate.core.model.namespace import DeviceAddress, Link
from ipsecgate.core.model.prefixes import Prefix, PrefixSet
from ipsecgate.core.model.source_selection import boundaries
from ipsecgate.core.model.value import value
from ipsecgate.core.nat.translation import Nat
from ipsecgate.edges.kernel.namespaces import Namespace
from ipsecgate.edges.kernel.nat import NatError, NatRules
from ipsecgate.edges.kernel.netlink import Requests

NETLINK_ROUTE = 0


@value
class Here:
    """The gate's own namespace: its links, those with a filter for what arrives, its addresses.

    `prefixes`: the destinations of its routes and rules, at which an answer can change. `nat`: None
    if its rules can't be read.
    """

    links: dict[int, Link]
    ingress: frozenset[int]
    addresses: tuple[DeviceAddress, ...]
    prefixes: frozenset[Prefix]
    nat: Nat | None

    def differs(self, other: Here, used: Iterable[int]) -> bool:
        """Tell whether this makes a difference for flows that pass these links of the two."""
        return (
            self.prefixes != other.prefixes
            or self._own_addresses() != other._own_addresses()
            or (self.nat and self.nat.ruleset) != (other.nat and other.nat.ruleset)
            or any(
                self.links.get(index) != other.links.get(index)
                or (index in self.ingress) != (index in other.ingress)
                for index in used
            )
        )

    def _own_addresses(self) -> list[DeviceAddress]:
        """Return the addresses, but for those that IPv6 gives by itself to containers' links."""
        return [item for item in self.addresses if not _is_automatic(item, self.links)]


def _is_automatic(item: DeviceAddress, links: Mapping[int, Link]) -> bool:
    link = links.get(item.link)
    return item.address.is_link_local and link is not None and link.kind == "veth"


def concerns(datagram: bytes, followed: PrefixSet) -> bool:
    """Tell whether a notification may change how this host sends packets on to these networks.

    What it does not tell is in `Here`: links, addresses, and at which prefixes an answer changes.
    """
    try:
        return any(
            message.type in PREFIXED
            and (
                message.type not in ROUTES or any(map(followed.overlaps, decode_prefixes(datagram)))
            )
            for message in messages(datagram)
        )
    except DecodeError:
        return True  # something changed, even if we cannot read what


async def read_here(destinations: Iterable[Network]) -> Here:
    """Return what matters here for these destinations. Raises: OSError, DecodeError."""
    async with Requests(NETLINK_ROUTE) as requests:
        links = await read_links(requests)
        ingress = await requests.dump(encode_qdisc_dump, decode_ingress)
        addresses = await read_addresses(requests)
        prefixes = await prefixes_in(requests, PrefixSet(destinations), addresses)
    return Here(links, frozenset(ingress), addresses, prefixes, await read_nat())


async def read_links(requests: Requests) -> dict[int, Link]:
    """Return the links of a namespace by index. Raises: OSError, DecodeError."""
    return {link.index: link for link in await requests.dump(encode_link_dump, decode_links)}


async def read_addresses(requests: Requests) -> tuple[DeviceAddress, ...]:
    """Return the addresses of a namespace, in the kernel's order. Raises: OSError, DecodeError."""
    return tuple(await requests.dump(encode_address_dump, decode_addresses))


async def read_nat(namespace: Namespace | None = None) -> Nat | None:
    """Return the NAT rules of a namespace, or of this one; None if they can't be read."""
    try:
        async with NatRules(namespace) as rules:
            return Nat(await rules.read())
    except NatError:
        return None


async def prefixes_in(
    requests: Requests,
    followed: PrefixSet,
    addresses: Iterable[DeviceAddress],
    on_rules: Callable[[bytes], None] = lambda _datagram: None,
) -> frozenset[Prefix]:
    """Return the prefixes inside the followed networks at which the answer can change.

    These are the destinations of routes and rules, and those at which IPv6 may choose another of
    the namespace's addresses. `on_rules` gets the datagrams of the rules.

    Raises: OSError, DecodeError.
    """

    def routes(datagram: bytes) -> list[Prefix]:
        return [item for item in decode_prefixes(datagram) if followed.contains(item)]

    def rules(datagram: bytes) -> list[Prefix]:
        on_rules(datagram)
        return routes(datagram)

    found: set[Prefix] = set()
    for family in (AF_INET, AF_INET6):
        for encode, decode in ((encode_route_dump, routes), (encode_rule_dump, rules)):
            try:
                found.update(await requests.dump(partial(encode, family), decode))
            except OSError as error:
                if error.errno != errno.EAFNOSUPPORT:
                    raise
                # The kernel has no IPv6, or its module is not loaded: it routes none.
    if any(item.address.version == 6 for item in addresses):
        labels = await requests.dump(encode_label_dump, decode_labels)
        found.update(filter(followed.contains, boundaries(addresses, labels)))
    return frozenset(found)
