"""Which flows are protected now: the SAs, the routes to them, and the SPD table made of both.

Where the IKE daemon does ESP itself, its SAs count, else the kernel's. Both are kept up to date,
because only the connected daemon shows which.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.routing import Routed, Routing
from ipsecgate.core.gate.services import Services
from ipsecgate.core.gate.spd_table import SpdTable
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import HOST, Flow, Network, TrafficSelector
from ipsecgate.core.model.ipsec import (
    Action,
    ChildConfig,
    ChildName,
    ChildSa,
    Direction,
    Sa,
    SpdEntry,
)
from ipsecgate.core.model.policy import SaSource
from ipsecgate.core.model.prefixes import PrefixSet, as_prefix
from ipsecgate.core.model.problem import Cause, Problem
from ipsecgate.core.state.kernel_state import KernelState
from ipsecgate.core.state.spd import sa_tag
from ipsecgate.core.state.userspace_esp import UserspaceEsp
from ipsecgate.core.tables.layout import Reason, flow_key
from ipsecgate.core.tables.verdict import verdict

LATEST = 32  # SAs among which a report looks for one; there may be thousands

StateEvent = on.XfrmEvent | on.ChildUp | on.ChildDown
"""Events that change what the kernel or IKE says is protected. One SA causes several of them."""


class Protection:
    """The kernel's and the daemon's SAs, the paths of flows, and the SPD table."""

    def __init__(self, configured: SaSource) -> None:
        self.kernel_state = KernelState()
        self.userspace_esp = UserspaceEsp()
        self.routing = Routing()
        self.spd_table = SpdTable()
        self.services = Services()
        self.sa_source = configured  # with AUTO, the daemon's as soon as it is connected
        self.drift = 0  # policies and SAs that dumps showed and notifications had not
        self._configured = configured
        self._tun = 0
        self._tunnels: frozenset[int] = frozenset()  # XFRM and VTI interfaces
        self._published: frozenset[int] | None = None  # a predecessor may have set others
        self._is_check = False
        self._heard: set[type[on.Event]] = set()
        self.is_between = False  # whether half of what the kernel reported is applied

    @property
    def source(self) -> KernelState | UserspaceEsp:
        """Return the one that knows the live SAs."""
        return self.userspace_esp if self.sa_source is SaSource.VICI else self.kernel_state

    @property
    def in_userspace(self) -> bool:
        """Tell whether the IKE daemon does ESP itself."""
        return self.source is self.userspace_esp

    @property
    def errors(self) -> list[Problem]:
        """Return the problems that the operator should fix."""
        return [*self.spd_table.errors, *self.routing.errors]

    # --- events in ------------------------------------------------------------------

    def notified(self, event: StateEvent) -> bool:
        """Apply one notification; return whether it may change what is protected."""
        match event:
            case on.ChildUp():
                self.kernel_state.child_up(event.sa)
                self.userspace_esp.child_up(event.sa)
            case on.ChildDown():
                self.userspace_esp.child_down(event.sa)
            case _:
                return self.kernel_state.apply(event)
        return True

    def snapshot(self, event: on.KernelSnapshot) -> None:
        """Begin to apply a dump; `adopt` applies it."""
        self._is_check = event.check
        self.kernel_state.begin(event)

    def adopt(self) -> int | None:
        """Apply a slice of the dump; after the last, return how many policies and SAs had drifted.

        0 for a dump that is not a check: it follows lost notifications, so differences are normal.
        """
        differences = self.kernel_state.adopt()
        if differences is None:
            return None
        self._heard.add(on.KernelSnapshot)
        drift = differences if self._is_check else 0
        self.drift += drift
        return drift

    def resolved(self, event: on.PathsResolved) -> list[do.Command]:
        """Apply the routes: paths for the hooks, and destinations behind the daemon's device."""
        if event.origin == HOST:
            self._heard.add(on.PathsResolved)
            self._tun, self._tunnels = event.tun, event.tunnels
            self.userspace_esp.routed(event.into_tun)
        return self.routing.resolved(event)

    def ike_connected(self, event: on.IkeConnected) -> bool:
        """Apply the daemon's list of established SAs; return whether anything is new."""
        self._heard.add(on.IkeConnected)
        before = self.sa_source
        if self._configured is SaSource.AUTO:
            self.sa_source = SaSource.VICI if event.userspace_esp else SaSource.XFRM
        kernel = self.kernel_state.ike_connected(event.established)
        daemon = self.userspace_esp.ike_connected(event.established)
        return kernel or daemon or before is not self.sa_source

    def ike_gone(self) -> None:
        """Stop trusting any SA: no daemon confirms it."""
        self._heard.add(on.IkeGone)
        self.kernel_state.ike_gone()
        self.userspace_esp.ike_gone()

    def may_be_unknown(self, entry: SpdEntry) -> bool:
        """Tell whether a kernel policy may belong to a connection that was loaded just now.

        A policy outside all known destinations may, and a trap, which names no SPI.
        """
        if entry.action is not Action.PROTECT or entry.key.direction is not Direction.OUT:
            return False
        is_trap = not all(template.spi for template in entry.templates)
        return is_trap or not self.routing.follows(entry.key.selector.dst)

    # --- the SPD table ----------------------------------------------------------------

    @property
    def is_known(self) -> bool:
        """Tell whether everything was heard that decides what is protected.

        With half of it, covered flows would be refused that a predecessor's table lets pass.
        """
        if not self._heard & {on.IkeConnected, on.IkeGone}:
            return False
        if self.sa_source is not SaSource.VICI and on.KernelSnapshot not in self._heard:
            return False
        return not self.routing.destinations or on.PathsResolved in self._heard

    def publish(self) -> list[do.Command]:
        """Bring the SPD table up to date, and the devices that the backstop lets packets into.

        Packets into the daemon's own TUN device are not in clear: the daemon encrypts them. XFRM
        and VTI interfaces do, or drop them.
        """
        tunnels = self._tunnels
        if self.in_userspace:
            tunnels = frozenset({self._tun} if self._tun else ())
        before, self._published = self._published, tunnels
        set_tunnels = [do.SetTunnels(tunnels)] if tunnels != before else []
        between = self.is_between or self.kernel_state.is_adopting
        services = self.services, self.routing
        return [*set_tunnels, *self.spd_table.update(self.source, services, between=between)]

    @property
    def pending(self) -> bool:
        """Tell whether `publish` has more to do than it did last time."""
        if not self.is_known:
            return False
        whole = not self.is_between and not self.kernel_state.is_adopting
        later = self.spd_table.is_partial or self.spd_table.has_more
        return self.source.pending or (whole and later)

    def is_live(self, flow: Flow) -> bool:
        """Tell whether a live SA protects a flow; never if its source is unknown."""
        return self.verdict(self.routing.route(flow)) is Reason.ALLOW_COVERED

    def verdict(self, routed: Routed, *, derived: bool = False) -> Reason:
        """Return the hooks' verdict on a flow that must be protected (`tables.verdict`)."""
        if routed.reason is not None:
            return routed.reason
        tunneled = routed.path is not None and routed.path.is_tunneled
        state_of = self.spd_table.state_of
        return verdict(routed.lookups, state_of, derived=derived, tunneled=tunneled)

    def sa_of(self, lookup: Flow) -> Sa | None:
        """Return the SA that protects a flow, if it is among those that came in last; else None."""
        content = self.spd_table.content
        entry = content.classify(flow_key(lookup)) if content is not None else None
        if self.in_userspace or entry is None or not entry.id:
            return None
        latest = islice(reversed(self.kernel_state.sas.values()), LATEST)
        return next((sa for sa in latest if sa_tag(sa.id) == entry.id), None)

    # --- CHILD_SAs that need attention ------------------------------------------------

    def is_up(self, name: ChildName) -> bool:
        """Tell whether the kernel has a CHILD_SA of this name that the daemon lists.

        Then another negotiation changes nothing.
        """
        return not self.in_userspace and any(
            (name.part is None or any(sel.network.overlaps(name.part) for sel in sa.remote))
            and not self.kernel_state.is_missing(sa)
            for sa in self.kernel_state.established(name.whole)
        )

    def has_sa(self, name: ChildName) -> bool:
        """Tell whether a CHILD_SA of this name is established and in use, whoever does ESP."""
        established = self.source.established(name.whole)
        return any(not self.source.is_missing(sa) for sa in established)

    def established(self) -> list[ChildSa]:
        """Return every CHILD_SA that the daemon lists."""
        return (
            self.userspace_esp.sas() if self.in_userspace else self.kernel_state.all_established()
        )

    def left_out(self, config: ChildConfig, routed: Flow) -> tuple[Network, Cause] | None:
        """Return which remote network of a child its peer did not accept for a flow, and why.

        None if the child is not up, or was not meant for the flow, or covers it.
        """
        up = [sa for sa in self.source.established(config.name) if not self.source.is_missing(sa)]
        if config.wildcard or not up or routed.saddr is None:
            return None
        remote = (routed.daddr, routed.proto, routed.dport)
        meant = [sel.network for sel in config.remote if sel.contains(*remote)]
        if not meant:
            return None
        network = max(meant, key=lambda one: one.prefixlen)
        there = [sa for sa in up if any(sel.contains(*remote) for sel in sa.remote)]
        if not there:
            accepted = _networks(sel for sa in up for sel in sa.remote)
            return network, Cause(
                f"the peer accepted {accepted} of {config.name}, not {network}",
                f"give {network} a child of its own, if the peer has one for it",
            )
        local = (routed.saddr, routed.proto, routed.sport)
        if not any(sel.contains(*local) for sel in config.local) or any(
            sel.contains(*local) for sa in there for sel in sa.local
        ):
            return None
        accepted = _networks(sel for sa in there for sel in sa.local)
        return network, Cause(
            f"the peer accepted {accepted} as our side of {config.name}, not {local[0]}",
            f"bind the socket to an address in {accepted}, or have the peer's remote_ts contain "
            f"{local[0]}",
        )

    def one_way(self, networks: Iterable[Network]) -> set[ChildSa]:
        """Return the CHILD_SAs towards these networks whose inbound half the kernel has lost."""
        found = set() if self.in_userspace else self.kernel_state.one_way_children()
        protected = PrefixSet(networks if found else ())
        return {
            sa
            for sa in found
            if any(protected.overlaps(as_prefix(remote.network)) for remote in sa.remote)
        }

    def stale(self, name: ChildName, flow: Flow) -> list[ChildSa]:
        """Return the CHILD_SAs that should protect a flow, if the kernel has none of them.

        If it has one, that may be the successor in a rekeying, so the result is empty. CHILD_SAs
        whose selectors do not contain the flow, such as those with other peers, are left out.
        """
        remote = flow.daddr, flow.proto, flow.dport
        covering = [
            sa
            for sa in self.source.established(name.whole)
            if any(selector.contains(*remote) for selector in sa.remote)
        ]
        return covering if all(self.source.is_missing(sa) for sa in covering) else []


def _networks(selectors: Iterable[TrafficSelector]) -> str:
    return " ".join(dict.fromkeys(str(selector.network) for selector in selectors))
