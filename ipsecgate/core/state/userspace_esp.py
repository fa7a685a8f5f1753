"""What the gate knows of IPsec outside the kernel: the CHILD_SAs that the IKE daemon reports.

With strongSwan's plugin kernel-libipsec the daemon does ESP itself, behind a TUN device. SPD
and SAD are empty then, nothing is ever told about them, and VICI is the only witness.

Rules of this module:
- A flow is protected when the traffic selectors of an established CHILD_SA have it, exactly as
  negotiated, *and* routing sends it into the daemon's TUN device. Each alone is not enough:
  without the route the flow leaves in clear, without the SA the daemon drops it. So a daemon
  that has the kernel do ESP, taken for one that does not, opens nothing.
- What happened and what is listed come on two connections, so a list may be older than an event
  that was heard before it. It revives no child that was told down, and what was told up since
  the list before need not be in it. Any other child that is not listed is gone.
- Where the daemon is gone, everything is.

It does not look at the kernel's databases, nor at ICMP's types.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import replace

from ipsecgate.core.model.flow import PORT_MASK, Network
from ipsecgate.core.model.ipsec import ChildName, ChildSa
from ipsecgate.core.model.prefixes import PrefixSet, as_prefix
from ipsecgate.core.state.spd import DEAD, LIVE, negotiated_regions
from ipsecgate.core.tables.table import Rule, Ternary, ternary

RoutedIn = tuple[tuple[Network, bool], ...]


class UserspaceEsp:
    """CHILD_SAs as the daemon told, and where routing leads; beside `Mirror`."""

    def __init__(self) -> None:
        self._up: dict[int, ChildSa] = {}  # by inbound SPI: we chose it, so it is the only one
        self._new: set[int] = set()  # told up since the last list
        self._down: set[int] = set()  # told down, and perhaps in a list that is on its way
        self._into_tun: RoutedIn = ()

    def routed(self, into_tun: RoutedIn) -> None:
        """Take in which destinations lead into the TUN device; the longest prefix counts."""
        self._into_tun = into_tun

    def ike_connected(self, established: Iterable[ChildSa]) -> bool:
        """The daemon is connected and lists these CHILD_SAs; return whether that is news."""
        before = self._up
        listed = {sa.spi_in: sa for sa in established}
        new = {spi: self._up[spi] for spi in self._new}
        self._up = new | {spi: sa for spi, sa in listed.items() if spi not in self._down}
        self._new.clear()
        self._down &= listed.keys()
        return self._up != before

    def child_up(self, sa: ChildSa) -> None:
        """The daemon told of one more CHILD_SA."""
        self._up[sa.spi_in] = sa
        self._new.add(sa.spi_in)

    def child_down(self, sa: ChildSa) -> None:
        """The daemon told that a CHILD_SA is gone, or has been replaced."""
        self._up.pop(sa.spi_in, None)
        self._new.discard(sa.spi_in)
        self._down.add(sa.spi_in)

    def ike_gone(self) -> None:
        """Its SAs went with it."""
        self._up.clear()
        self._new.clear()
        self._down.clear()

    def established(self, name: ChildName) -> list[ChildSa]:
        """Return what the daemon says is established of a child."""
        return [sa for sa in self._up.values() if sa.name == name]

    def is_missing(self, sa: ChildSa) -> bool:
        """Tell whether no route leads to what the daemon says that it protects."""
        tunnels = PrefixSet(network for network, into in self._into_tun if into)
        return not any(tunnels.overlaps(as_prefix(there.network)) for there in sa.remote)

    def peer_of(self, sa: ChildSa) -> Hashable:
        """Return who answers for a CHILD_SA."""
        return sa.remote_host

    def name_of(self, sa: ChildSa) -> str:
        """Return a CHILD_SA's name."""
        return f"{sa.name} (peer {sa.remote_host})"

    def sas(self) -> list[ChildSa]:
        """Return every CHILD_SA that is up."""
        return list(self._up.values())

    def hook_rules(self) -> list[Rule]:
        """Return the hook's SPD table as rules.

        The longest prefixes come first, as in routing; inside, wide regions before narrow
        ones, which they make superfluous. A source port that is still to be chosen, 0, is in
        a range of them only by chance.
        """
        agreed = sorted(
            (
                Rule(part, LIVE, owner=sa)
                for sa in self._up.values()
                for part in negotiated_regions(sa.local, sa.remote, exact=True)
            ),
            key=lambda rule: _width(rule.match),
        )
        tunnels = PrefixSet(network for network, into in self._into_tun if into)
        rules: list[Rule] = []
        for network, into in sorted(self._into_tun, key=lambda item: -item[0].prefixlen):
            destination = ternary(network)
            if into:
                for rule in agreed:
                    part = destination.intersect(rule.match)
                    if part is None:
                        continue
                    if part.mask.sport and not part.value.sport:
                        unbound = replace(part.mask, sport=PORT_MASK)
                        rules.append(Rule(Ternary(part.value, unbound), DEAD))
                    rules.append(replace(rule, match=part))
            elif tunnels.contains(as_prefix(network)):
                rules.append(Rule(destination, DEAD))  # an exception inside a tunnel's network
        return rules


def _width(region: Ternary) -> tuple[bool, int]:
    mask = region.mask
    words = (mask.saddr, mask.daddr, mask.sport, mask.dport, mask.proto, mask.family)
    return mask.sport != 0, sum(word.bit_count() for word in words)
