"""The IKE daemon as it last reported itself: connected or not, and what it has loaded."""

from __future__ import annotations

from collections.abc import Iterable

from ipsecgate.core.gate import commands as do
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import Address, Flow, Network, TrafficSelector
from ipsecgate.core.model.ipsec import ChildConfig, ChildName
from ipsecgate.core.model.policy import Policy, SaSource
from ipsecgate.core.model.prefixes import LongestPrefix
from ipsecgate.core.model.problem import Problem

UNREAD = 64  # reasons that are remembered, to log each once

_Narrowness = tuple[int, bool, int]
_ANY: _Narrowness = (0, False, 0)


class Ike:
    """The daemon's state; `problem` is None while it is connected."""

    def __init__(self) -> None:
        self.problem: Problem | None = Problem(
            "not connected to strongSwan yet", "try again in a moment"
        )
        self.loaded = LoadedChildren(())
        self.unread: tuple[str, ...] = ()  # why items of its last list were not understood
        self._logged: tuple[str, ...] = ()

    def connected(self, event: on.IkeConnected) -> bool:
        """Apply a list of the loaded children; return whether they or the connection are new."""
        changed = self.problem is not None or event.children != self.loaded.children
        if event.children != self.loaded.children:
            self.loaded = LoadedChildren(event.children)
        self.problem = None
        self.unread = event.unread
        return changed

    def gone(self, event: on.IkeGone) -> bool:
        """Note that the daemon does not answer; return whether that is news."""
        changed = event.problem != self.problem
        self.problem = event.problem
        return changed

    def log_connected(self, event: on.IkeConnected, configured: SaSource) -> list[do.Command]:
        """Exempt and log a daemon that was gone, and warn if it contradicts `sa_source`."""
        exempt = do.ExemptIke(event.pid)
        text = f"connected to the IKE daemon, pid {event.pid}"
        log = do.Log("info", text, fields=(("event", "ike-connected"),))
        if configured is SaSource.AUTO or event.userspace_esp == (configured is SaSource.VICI):
            return [exempt, log]
        other = "strongSwan" if event.userspace_esp else "the kernel"
        text = f"gate.sa_source is {configured.value!r}, but {other} does ESP"
        return [exempt, log, do.Log("warning", text)]

    def log_unread(self, reasons: Iterable[str]) -> list[do.Command]:
        """Log each reason why something was not understood, once."""
        new = [reason for reason in reasons if reason not in self._logged]
        self._logged = (*self._logged, *new)[-UNREAD:]
        return [
            do.Log("error", f"ignored part of what strongSwan reports: {reason}") for reason in new
        ]


class LoadedChildren:
    """The child configurations that the daemon has loaded, by name and by remote network."""

    def __init__(self, children: tuple[ChildConfig, ...]) -> None:
        self.children = children
        self._order = {config: at for at, config in enumerate(children)}
        self._by_name: dict[str, list[ChildConfig]] = {}
        by_network: dict[Network, list[ChildConfig]] = {}
        for config in self._order:
            for name in dict.fromkeys((config.name.child, str(config.name))):
                self._by_name.setdefault(name, []).append(config)
            for network in dict.fromkeys(remote.network for remote in config.remote):
                by_network.setdefault(network, []).append(config)
        self._by_network = LongestPrefix(by_network.items())

    def children_for(self, flow: Flow, source: Address | None, policy: Policy) -> list[ChildConfig]:
        """Return the children of which any would protect a flow of a policy, in order.

        Those are the children which the policy names, else those with the narrowest remote selector
        around the flow, because the kernel's policies for them win. Several are several gateways
        for one network. `source`: the flow's, or routing's choice, None if unknown. An unbound
        flow's source may change when the SA brings a route of its own, so a child whose local
        selector misses it is second best, not excluded. A wildcard's local selector is unknown
        before it is up.
        """
        ranks = self._around(flow) if policy.child is None else self._named(policy.child)
        candidates = [*ranks]
        local = [
            config
            for config in candidates
            if (config.wildcard and not config.local)
            or (
                source is not None
                and any(near.contains(source, flow.proto, flow.sport) for near in config.local)
            )
        ]
        if local or flow.saddr is not None:
            candidates = local
        return [config for config in candidates if ranks[config] == ranks[candidates[0]]]

    def named(self, name: ChildName) -> ChildConfig | None:
        """Return the configuration of this name."""
        return next(iter(self._named(str(name.whole))), None)

    def named_as(self, written: str) -> list[ChildConfig]:
        """Return the configurations that the operator's "ike/child" or "child" means."""
        return [*self._named(written)]

    def towards(self, flow: Flow, policy: Policy) -> list[ChildConfig]:
        """Return the children that a policy names, or whose remote selectors contain a flow."""
        return [*(self._around(flow) if policy.child is None else self._named(policy.child))]

    def _named(self, name: str) -> dict[ChildConfig, _Narrowness]:
        return dict.fromkeys(self._by_name.get(name, []), _ANY)

    def _around(self, flow: Flow) -> dict[ChildConfig, _Narrowness]:
        """Return the children whose remote selectors contain a flow, narrowest first."""
        remote = flow.daddr, flow.proto, flow.dport
        near = {config for _, found in self._by_network.containing(flow.daddr) for config in found}
        fits: dict[ChildConfig, _Narrowness] = {}
        for config in sorted(near, key=self._order.__getitem__):
            around = [_narrowness(sel) for sel in config.remote if sel.contains(*remote)]
            if around:
                fits[config] = max(around)
        return dict(sorted(fits.items(), key=lambda item: item[1], reverse=True))


def _narrowness(selector: TrafficSelector) -> _Narrowness:
    low, high = selector.ports
    return selector.network.prefixlen, selector.proto != 0, low - high
