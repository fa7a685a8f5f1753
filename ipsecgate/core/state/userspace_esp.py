"""Protection where the IKE daemon does ESP itself: its CHILD_SAs joined with routing.

With strongSwan's kernel-libipsec plugin the daemon does ESP in userspace, behind a TUN device. The
kernel's SPD and SAD are empty, XFRM sends no notifications, and VICI is the only source.

Rules of this module:
- A flow is protected when an established CHILD_SA has it in its traffic selectors, exactly as
  negotiated, *and* routing sends it into the daemon's TUN device. Without the route it would leave
  in clear; without the SA the daemon drops it. A daemon that uses the kernel's ESP but is
  configured as one that does not therefore opens nothing: it has no TUN device.
- Events and lists arrive on two connections, so a list may be older than an event that we have
  already handled. A list never restores a child that an event has removed, and it need not contain
  one that an event has added since the last list. Any other child that is not listed is gone.
- When the daemon is gone, so are its SAs.

It does not read the kernel's SPD and SAD, and protects no ICMP selector with a type or code.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import replace

from ipsecgate.core.model.flow import PORT_MASK, Network
from ipsecgate.core.model.ipsec import ChildName, ChildSa
from ipsecgate.core.model.prefixes import PrefixSet, as_prefix
from ipsecgate.core.state.spd import DEAD, LIVE, negotiated_regions
from ipsecgate.core.tables.table import Rule, Ternary, ternary

TunRoutes = tuple[tuple[Network, bool], ...]
"""Destinations, and whether each is routed into the TUN device; the longest prefix wins."""


class UserspaceEsp:
    """The daemon's CHILD_SAs and the routes into its TUN device; the twin of `KernelState`."""

    def __init__(self) -> None:
        self._up: dict[int, ChildSa] = {}  # by inbound SPI, which our side chose: it is unique
        self._added: set[int] = set()  # by an event, since the last list
        self._removed: set[int] = set()  # by an event; a list under way may still contain them
        self._tun_routes: TunRoutes = ()
        self._yielded: dict[Hashable, list[Rule]] = {}

    def routed(self, tun_routes: TunRoutes) -> None:
        """Replace the routes into the TUN device."""
        self._tun_routes = tun_routes

    def ike_connected(self, established: Iterable[ChildSa]) -> bool:
        """Handle the daemon's list of CHILD_SAs; return whether anything changed."""
        before = self._up
        listed = {sa.spi_in: sa for sa in established}
        added = {spi: self._up[spi] for spi in self._added}
        self._up = added | {spi: sa for spi, sa in listed.items() if spi not in self._removed}
        self._added.clear()
        self._removed &= listed.keys()
        return self._up != before

    def child_up(self, sa: ChildSa) -> None:
        """Handle a new CHILD_SA."""
        self._up[sa.spi_in] = sa
        self._added.add(sa.spi_in)

    def child_down(self, sa: ChildSa) -> None:
        """Handle a CHILD_SA that was deleted or replaced."""
        self._up.pop(sa.spi_in, None)
        self._added.discard(sa.spi_in)
        self._removed.add(sa.spi_in)

    def ike_gone(self) -> None:
        """Forget every SA."""
        self._up.clear()
        self._added.clear()
        self._removed.clear()

    def established(self, name: ChildName) -> list[ChildSa]:
        """Return the established CHILD_SAs of a child."""
        return [sa for sa in self._up.values() if sa.name == name]

    def is_missing(self, sa: ChildSa) -> bool:
        """Return whether no route into the TUN device leads to what a CHILD_SA protects."""
        tunnels = PrefixSet(network for network, into in self._tun_routes if into)
        return not any(tunnels.overlaps(as_prefix(remote.network)) for remote in sa.remote)

    def peer_of(self, owner: Hashable) -> Hashable:
        """Return the peer of the CHILD_SA that rules belong to, None if they belong to a route."""
        sa = self._up.get(owner) if isinstance(owner, int) else None
        return sa.remote_host if sa is not None else None

    def name_of(self, owner: Hashable) -> str:
        """Return the name of the CHILD_SA that rules belong to, "" if they belong to a route."""
        sa = self._up.get(owner) if isinstance(owner, int) else None
        return f"{sa.name} (peer {sa.remote_host})" if sa is not None else ""

    def sas(self) -> list[ChildSa]:
        """Return every established CHILD_SA."""
        return list(self._up.values())

    pending = False  # one call of `changed_rules` yields everything

    def changed_rules(self, _limit: int) -> Iterator[tuple[Hashable, list[Rule]]]:
        """Yield the hooks' rules that changed: by inbound SPI of the SA, or by network of a route.

        The rank gives the order: the longest destination prefix first, as in routing; then regions
        without source ports; then wide before narrow. Source port 0 means that the kernel has yet
        to choose the port, so a selector with source ports does not match it.
        """
        rules = self._rules()
        for owner in self._yielded.keys() - rules.keys():
            yield owner, []
        for owner, its in rules.items():
            if self._yielded.get(owner) != its:
                yield owner, its
        self._yielded = rules

    def _rules(self) -> dict[Hashable, list[Rule]]:
        tunnels = PrefixSet(network for network, into in self._tun_routes if into)
        rules: dict[Hashable, list[Rule]] = {}
        for network, into in self._tun_routes:
            destination = ternary(network)
            if not into:
                if tunnels.contains(as_prefix(network)):  # an exception inside a tunnel's network
                    rules[network] = [Rule(destination, replace(DEAD, rank=_rank(network)))]
                continue
            for spi, sa in self._up.items():
                for negotiated in negotiated_regions(sa.local, sa.remote, exact=True):
                    region = destination.intersect(negotiated)
                    if region is not None:
                        rules.setdefault(spi, []).extend(_region_rules(network, negotiated, region))
        return rules


def _region_rules(route: Network, negotiated: Ternary, region: Ternary) -> Iterator[Rule]:
    rank = _rank(route, *_narrowness(negotiated))
    if region.mask.sport and not region.value.sport:
        unbound = region.mask.replaced(sport=PORT_MASK)
        yield Rule(Ternary(region.value, unbound), replace(DEAD, rank=rank))
    yield Rule(region, replace(LIVE, rank=rank + 1))


def _rank(route: Network, with_source_port: bool = False, bits: int = 0) -> int:
    host_bits = route.max_prefixlen - route.prefixlen
    return host_bits << 20 | with_source_port << 12 | bits << 1


def _narrowness(region: Ternary) -> tuple[bool, int]:
    mask = region.mask
    words = (mask.saddr, mask.daddr, mask.sport, mask.dport, mask.proto, mask.family)
    return mask.sport != 0, sum(word.bit_count() for word in words)
