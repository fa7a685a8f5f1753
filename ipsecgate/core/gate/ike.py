"""The IKE daemon as the gate knows it, and which child it is asked for.

Source: US 7,028,332 claim 1: the policy that covers a refused flow says with which parameters the
negotiation component is to negotiate.
"""

from __future__ import annotations

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.negotiations import Loaded, Negotiations, child_for
from ipsecgate.core.gate.policy_table import PolicyTable
from ipsecgate.core.gate.protection import Protection
from ipsecgate.core.model.flow import Flow
from ipsecgate.core.model.ipsec import Action, ChildConfig
from ipsecgate.core.model.policy import Policy

ORPHANS = 64  # flows that wait for a connection to be loaded
WARNINGS = 256  # that are told once each
UNREAD = 64  # the same, of what the daemon says


class Ike:
    """What the daemon has loaded, and what it was asked for."""

    def __init__(
        self, policy_table: PolicyTable, protection: Protection, negotiations: Negotiations
    ) -> None:
        self.loaded = Loaded(())
        self.error = "not connected yet"
        self.unread: tuple[str, ...] = ()  # of what it lists: what was not understood
        self._policy_table = policy_table
        self._protection = protection
        self._negotiations = negotiations
        self._orphans: set[Flow] = set()  # refused, and no child known
        self._warned: set[tuple[str, Flow]] = set()
        self._unread: tuple[str, ...] = ()  # that was told

    @property
    def children(self) -> tuple[ChildConfig, ...]:
        """What the daemon has loaded."""
        return self.loaded.children

    def has_loaded(self, children: tuple[ChildConfig, ...]) -> bool:
        """Take in what the daemon has loaded; return whether that is news."""
        news = children != self.loaded.children
        if news:
            self.loaded = Loaded(children)
        return news

    def ask(self, flow: Flow, place: int | None) -> list[do.Command]:
        """Have the child negotiated that would protect a refused flow."""
        if place is None or place >= len(self._policy_table.policies):
            return []
        policy = self._policy_table.policies[place]
        if policy.action is not Action.PROTECT or self.error or self._protection.is_live(flow):
            return []
        config = self.child(flow, policy)
        if config is not None:
            if self._negotiations.is_settled(config.name):
                return []
            if self._protection.is_up(config):
                return self._warn(f"{config.name} is up but does not protect", flow)
            return self._negotiations.ask(config.name, flow, place, policy.name)
        if len(self._orphans) < ORPHANS:
            self._orphans.add(flow)
        return [do.AskIke()]  # the connection may have been loaded a moment ago

    def ask_again(self) -> list[do.Command]:
        """Ask for what is to be initiated at once, and for the flows that had no child.

        The daemon was looked at just now, so it is not again.
        """
        policies = enumerate(self._policy_table.policies)
        wanted = [(policy.sample_flow(), place) for place, policy in policies if policy.start]
        started = [command for flow, place in wanted for command in self.ask(flow, place)]
        orphans, self._orphans = self._orphans, set()
        asked = [c for flow in orphans for c in self.ask(flow, self._policy_table.place_of(flow))]
        alone, self._orphans = self._orphans, set()
        text = "no loaded connection would protect"
        told = [command for flow in alone for command in self._warn(text, flow)]
        return [c for c in (*started, *asked) if not isinstance(c, do.AskIke)] + told

    def child(self, flow: Flow, policy: Policy) -> ChildConfig | None:
        """Return the child that would protect a flow of a policy, None if none is loaded."""
        source = self._protection.source_of(flow)
        return child_for(flow, source, policy, self.loaded.candidates(flow, policy))

    def has_unread(self, reasons: tuple[str, ...]) -> list[do.Command]:
        """Tell once what the daemon said and was not understood: it concerns nothing else."""
        new = [reason for reason in reasons if reason not in self._unread]
        self._unread = (*self._unread, *new)[-UNREAD:]
        return [
            do.Log("error", f"ignored part of what strongSwan reports: {reason}") for reason in new
        ]

    def warn_anew(self) -> None:
        """Forget what was told: the policies are others."""
        self._warned.clear()

    def _warn(self, text: str, flow: Flow) -> list[do.Command]:
        """Tell something of a flow once."""
        if (text, flow) in self._warned or len(self._warned) >= WARNINGS:
            return []
        self._warned.add((text, flow))
        return [do.Log("warning", f"{text} {flow}")]
