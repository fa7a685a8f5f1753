"""Where routing leads each flow, and which flows the kernel looks up in its SPD as a result."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from ipsecgate.core.gate import commands as do
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import HOST, Address, Flow, FlowPath, Network, Origin
from ipsecgate.core.model.prefixes import LongestPrefix, PrefixSet, as_prefix, limit_paths
from ipsecgate.core.model.problem import Problem
from ipsecgate.core.nat.local import SPARE
from ipsecgate.core.tables.layout import ROUTES, Reason

NAMED = 8  # destinations whose paths do not fit, and that are reported
ORIGINS = 1024  # followed at once


class Routed(NamedTuple):
    """A flow with the source that its socket gets, and as the kernel looks it up a second time.

    The source is None if it is unknown; then `reason` says why.
    """

    flow: Flow
    again: Flow | None = None
    path: FlowPath | None = None
    reason: Reason | None = None

    @property
    def last(self) -> Flow:
        """The flow whose SA counts."""
        return self.again or self.flow

    @property
    def lookups(self) -> tuple[Flow, ...]:
        """The flows that the SPD is asked about; none if the source is unknown."""
        if self.reason is not None:
            return ()
        return (self.flow,) if self.again is None else (self.flow, self.again)


class Routing:
    """The path of each flow, by its origin and destination.

    An unbound flow has no source at connect(), but the SPD lookup needs one. So the controller
    resolves it for every network that must be protected, and again whenever routes change. A flow
    is refused while its path is unknown.
    """

    def __init__(self) -> None:
        self.destinations: tuple[Network, ...] = ()
        self.paths: dict[Origin, tuple[tuple[Network, FlowPath], ...]] = {}
        self.addresses: frozenset[Address] = frozenset()  # the host's own among the destinations,
        # and those that it sends from
        self.bound_too = 0  # whether bound flows depend on their path, as the setting PATHS has it
        self._by_source = False
        self._marks = 0  # the bits of marks that routing rules ask for
        self._bent: set[Origin] = set()  # those here with flows that are looked up again, or never
        self._errors: dict[Origin, list[Problem]] = {}
        self._covered = PrefixSet(())  # the destinations
        self._longest: dict[Origin, LongestPrefix[FlowPath]] = {}

    @property
    def errors(self) -> list[Problem]:
        """Return the problems that the operator should fix."""
        return [one for errors in self._errors.values() for one in errors]

    def follow(self, destinations: tuple[Network, ...]) -> list[do.Command]:
        """Have the paths to these destinations resolved, unless they already are."""
        if destinations == self.destinations:
            return []
        self.destinations, self._covered = destinations, PrefixSet(destinations)
        return [do.ResolvePaths(destinations)]

    def want(self, flow: Flow, pid: int) -> list[do.Command]:
        """Have the origin of a flow followed, unless it is. `pid`: a process there, 0: unknown."""
        origin = self._origin(flow)
        if origin in self.paths or not self._covered.contains(_host(flow)):
            return []
        return [do.FollowOrigin(origin, pid)]

    def resolved(self, event: on.PathsResolved) -> list[do.Command]:
        """Apply the resolved paths, and pass them on to the hooks.

        If they are more than the hooks' table holds, those of some destinations stay unknown.
        """
        origin = event.origin
        if origin not in self.paths and len(self.paths) >= ORIGINS:
            text = f"more than {ORIGINS} origins of flows: others are refused"
            advice = "use fewer network namespaces, marks, and devices to which sockets are bound"
            self._errors[origin] = [Problem(text, advice)]
            return []
        taken = sum(len(paths) for other, paths in self.paths.items() if other != origin)
        space = ROUTES - taken
        paths, lost = limit_paths(event.paths, self.destinations, space)
        self.paths[origin] = paths
        self._longest[origin] = LongestPrefix(paths)
        if not origin.netns and any(path.is_bent for _, path in paths):
            self._bent.add(origin)
        else:
            self._bent.discard(origin)
        if origin == HOST:
            self._by_source, self._marks = event.by_source, event.marks
            # Routing chooses each of the host's own addresses as the source for itself.
            self.addresses = frozenset(path.source for _, path in paths if path.source)
        self._judge_bound()
        self._errors[origin] = [
            Problem(
                f"{network}: routing divides it into more parts than the hooks can hold ({space}): "
                "requests to it from sockets without a bound address are refused",
                "bind these sockets to an address, or use fewer routes to it",
            )
            for network in lost[:NAMED]
        ]
        return [self._set_paths(origin, paths)]

    def gone(self, origin: Origin) -> list[do.Command]:
        """Forget an origin."""
        self._errors.pop(origin, None)
        if self.paths.pop(origin, None) is None:
            return []
        del self._longest[origin]
        self._bent.discard(origin)
        self._judge_bound()
        return [self._set_paths(origin, ())]

    def _set_paths(
        self, origin: Origin, paths: tuple[tuple[Network, FlowPath], ...]
    ) -> do.SetPaths:
        return do.SetPaths(origin, paths, self.bound_too, self._marks)

    def _judge_bound(self) -> None:
        self.bound_too = 0 if not self._bent else 2 if self._by_source else 1

    def route(self, flow: Flow) -> Routed:
        """Return a flow as the kernel looks it up, as route() and follow() in decision.bpf.c do."""
        bound = flow.saddr is not None
        if bound and not self.bound_too and not flow.netns:
            return Routed(flow)
        path = self.path(flow)
        if path is None:
            unknown = Reason.REFUSE_NETNS if flow.netns else Reason.REFUSE_NO_SOURCE
            return Routed(flow, reason=unknown)
        if path.outside:
            return Routed(flow, path=path, reason=Reason.REFUSE_OUTSIDE)
        if flow.netns and path.source == flow.daddr:
            return Routed(replace(flow, saddr=flow.daddr), path=path)  # it never leaves the host
        fixed = flow.netns or self.bound_too > 1 or path.translated is not None
        if (bound and fixed and flow.saddr != path.source) or not (bound or path.source):
            return Routed(flow, path=path, reason=Reason.REFUSE_NO_SOURCE)
        first = flow if bound else replace(flow, saddr=path.source)
        return Routed(first, _again(first, path), path)

    def path(self, flow: Flow) -> FlowPath | None:
        """Return where routing leads a flow, None if that is unknown."""
        longest = self._longest.get(self._origin(flow))
        if longest is None:
            return None
        return next(longest.containing(flow.daddr), (None, None))[1]

    def _origin(self, flow: Flow) -> Origin:
        return Origin(flow.netns, flow.device, flow.mark & self._marks)

    def are_known(self, networks: Iterable[Network]) -> bool:
        """Tell whether something was resolved for each of these networks."""
        known = PrefixSet(network for network, _ in self.paths.get(HOST, ()))
        return all(known.overlaps(as_prefix(network)) for network in networks)

    def follows(self, network: Network) -> bool:
        """Tell whether a network lies within the destinations."""
        return self._covered.contains(as_prefix(network))


def translation(path: FlowPath | None) -> str:
    """Return how a rule of NAT changes the source of a path's flows, and what to do; "" if none."""
    if path is None or path.translated is None:
        return ""
    return (
        f"its source becomes {path.translated}, by the NAT rule {path.rule}; if no policy has that "
        f"address, {SPARE}"
    )


def _again(flow: Flow, path: FlowPath) -> Flow | None:
    """Return a flow as the kernel looks it up a second time, None if it does not."""
    if not path.is_tunneled and path.translated is None:
        return None
    if path.translated is not None:
        flow = replace(flow, saddr=path.translated, sport=0)
    return replace(flow, if_id=path.if_id, mark=flow.mark if path.mark is None else path.mark)


def _host(flow: Flow) -> tuple[int, int, int]:
    return flow.daddr.version, int(flow.daddr), flow.daddr.max_prefixlen
