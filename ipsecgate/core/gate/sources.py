"""The source address of unbound flows, as routing chooses it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ipsecgate.core.gate import commands as do
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import Address, Flow, Network
from ipsecgate.core.model.prefixes import LongestPrefix, PrefixSet, as_prefix, limit_sources
from ipsecgate.core.tables.layout import SOURCES

NAMED = 8  # destinations whose sources do not fit, and that are reported


class Sources:
    """The source address of an unbound socket, by destination.

    An unbound flow has no source at connect(), but the SPD lookup needs one. So the controller
    resolves it for every network that must be protected, and again whenever routes change. A flow
    is refused while its source is unknown.
    """

    def __init__(self) -> None:
        self.destinations: tuple[Network, ...] = ()
        self.by_network: dict[Network, Address | None] = {}
        self.errors: list[str] = []
        self._covered = PrefixSet(())  # the destinations
        self._longest: LongestPrefix[Address | None] = LongestPrefix(())

    def follow(self, destinations: tuple[Network, ...]) -> list[do.Command]:
        """Have the sources for these destinations resolved, unless they already are."""
        if destinations == self.destinations:
            return []
        self.destinations, self._covered = destinations, PrefixSet(destinations)
        return [do.ResolveSources(destinations)]

    def resolved(self, event: on.SourcesResolved) -> list[do.Command]:
        """Apply the resolved sources, and pass them on to the hooks.

        If they are more than the hooks' table holds, those of some destinations stay unknown.
        """
        sources, lost = limit_sources(event.sources, self.destinations, SOURCES)
        self.by_network = dict(sources)
        self._longest = LongestPrefix(sources)
        self.errors = [
            f"{network}: routing divides it into more parts than the hooks can hold ({SOURCES}): "
            "requests to it from sockets without a bound address are refused"
            for network in lost[:NAMED]
        ]
        return [do.SetSources(tuple(self.by_network.items()))]

    def route(self, flow: Flow) -> Flow:
        """Return a bound flow as it is, an unbound one with the source that routing would choose.

        The source is None if it is unknown.
        """
        if flow.saddr is not None:
            return flow
        return replace(flow, saddr=next(self._longest.containing(flow.daddr), (None, None))[1])

    def are_known(self, networks: Iterable[Network]) -> bool:
        """Tell whether something was resolved for each of these networks."""
        known = PrefixSet(self.by_network)
        return all(known.overlaps(as_prefix(network)) for network in networks)

    def follows(self, network: Network) -> bool:
        """Tell whether a network lies within the destinations."""
        return self._covered.contains(as_prefix(network))
