"""What must be protected where no policy is configured: what the IKE daemon ever had loaded.

Rules of this module: it only grows, so a daemon that lost its connections opens nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ipsecgate.core.gate import commands as do
from ipsecgate.core.model.ipsec import ChildConfig
from ipsecgate.core.model.policy import Policy, derived


class DerivedPolicies:
    """The connections that were ever seen, as policies; `remembered` are a predecessor's."""

    def __init__(self, remembered: Iterable[ChildConfig]) -> None:
        self._known = {c.name: c for c in remembered}
        self.policies: tuple[Policy, ...] = derived(self._known.values())
        self.errors: list[str] = []

    def learn(self, children: Iterable[ChildConfig]) -> list[do.Command]:
        """Add what the daemon has loaded now."""
        before = dict(self._known)
        children = tuple(children)
        for child in children:
            known = self._known.get(child.name, child)
            remote = tuple(dict.fromkeys((*known.remote, *child.remote)))
            self._known[child.name] = replace(child, remote=remote)
        self.errors = [
            f"connection {c.name}: its remote selector is unknown until it is up: "
            "add a [[policy]] for its networks, or they are not protected"
            for c in children
            if not c.remote
        ]
        if self._known == before:
            return []
        self.policies = derived(self._known.values())
        return [do.Remember(tuple(self._known.values()))]
