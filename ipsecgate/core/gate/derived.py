"""Policies derived from all connections that the IKE daemon ever had loaded.

They are in force while none is configured. They only grow, so a daemon that has lost its
connections opens nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ipsecgate.core.gate import commands as do
from ipsecgate.core.model.flow import ANY_V4, ANY_V6, Network, TrafficSelector
from ipsecgate.core.model.ipsec import ChildConfig, ChildName
from ipsecgate.core.model.policy import Policy, derived_policies
from ipsecgate.core.model.problem import Problem


def _joined(
    one: tuple[TrafficSelector, ...], other: tuple[TrafficSelector, ...]
) -> tuple[TrafficSelector, ...]:
    """Return both children's local protocols and ports, without addresses; none: any."""
    if not one or not other:
        return ()
    wide: dict[int, Network] = {4: ANY_V4, 6: ANY_V6}
    both = (replace(sel, network=wide[sel.network.version]) for sel in (*one, *other))
    return tuple(dict.fromkeys(both))


class DerivedPolicies:
    """One policy for each remote traffic selector. `remembered`: children from earlier runs."""

    def __init__(self, remembered: Iterable[ChildConfig]) -> None:
        self._known = {c.name: c for c in remembered}
        self.policies: tuple[Policy, ...] = derived_policies(self._known.values())
        self.errors: list[Problem] = []
        self._last: tuple[ChildConfig, ...] | None = None  # what was learnt last

    def with_children(self, children: Iterable[ChildConfig]) -> tuple[Policy, ...]:
        """Return what the policies would be once these children were learnt; change nothing."""
        return derived_policies(self._with(children).values())

    def _with(self, children: Iterable[ChildConfig]) -> dict[ChildName, ChildConfig]:
        all_known = dict(self._known)
        for child in children:
            known = all_known.get(child.name, child)
            remote = tuple(dict.fromkeys((*known.remote, *child.remote)))
            local = _joined(known.local, child.local)
            all_known[child.name] = replace(child, local=local, remote=remote)
        return all_known

    def learn(self, children: Iterable[ChildConfig]) -> list[do.Command]:
        """Add the children that the daemon has loaded now."""
        children = tuple(children)
        if children == self._last:
            return []
        self._last = children
        before, self._known = self._known, self._with(children)
        self.errors = [
            Problem(
                f"child {c.name}: its remote selector is unknown until it is up, so its "
                "networks are not protected",
                "set its remote_ts; or write a [[policy]] for these networks and for all others "
                "that must be protected: with one [[policy]], none is derived from connections",
            )
            for c in children
            if not c.remote
        ]
        if self._known == before:
            return []
        self.policies = derived_policies(self._known.values())
        return [do.Remember(tuple(self._known.values()))]
