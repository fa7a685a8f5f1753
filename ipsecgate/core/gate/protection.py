"""What is protected now: whoever knows the SAs, and where routing sends a flow.

Both witnesses are kept up to date, the kernel's databases and the IKE daemon's own ESP; one
of them is asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ipsecgate.core.gate.hook_tables import HookTables
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import Address, Flow, Network
from ipsecgate.core.model.ipsec import ChildConfig, ChildName, ChildSa
from ipsecgate.core.model.policy import SaSource
from ipsecgate.core.model.prefixes import LongestPrefix, limit_sources
from ipsecgate.core.state.kernel_state import KernelState
from ipsecgate.core.state.userspace_esp import UserspaceEsp
from ipsecgate.core.tables.layout import SOURCES, Key, flow_key

LOST = 8  # destinations whose sources do not fit, and that are named


class Protection:
    """The mirror, the IKE daemon's own ESP, and the sources of unbound flows."""

    def __init__(self, source: SaSource, hook_tables: HookTables) -> None:
        self.kernel_state = KernelState()
        self.userspace_esp = UserspaceEsp()
        self.sa_source = source  # AUTO until the IKE daemon told
        self.sources: dict[Network, Address | None] = {}
        self.errors: list[str] = []  # of the sources
        self._by_prefix: LongestPrefix[Address | None] = LongestPrefix(())
        self.drift = 0  # policies and SAs that the kernel's events had not told as they are
        self._tun = 0
        self._hook_tables = hook_tables
        self._heard: set[type[on.Event]] = set()

    @property
    def source(self) -> KernelState | UserspaceEsp:
        """Who says which SAs are live."""
        return self.userspace_esp if self.sa_source is SaSource.VICI else self.kernel_state

    @property
    def in_userspace(self) -> bool:
        """Tell whether the IKE daemon does ESP itself."""
        return self.source is self.userspace_esp

    @property
    def tun(self) -> int:
        """Return behind which interface the daemon does ESP, by index; 0: none."""
        return self._tun if self.in_userspace else 0

    def hears(self, event: on.Event) -> None:
        """Note that a witness was heard at least once."""
        self._heard.add(type(event))

    def is_known(self, routed: bool) -> bool:
        """Tell whether every witness that is needed was heard; half the truth is none.

        `routed`: there are destinations whose routes matter.
        """
        ike = bool(self._heard & {on.IkeConnected, on.IkeGone})
        if self.sa_source is not SaSource.VICI:
            return ike and on.KernelSnapshot in self._heard
        return ike and (not routed or on.SourcesResolved in self._heard)

    def snapshot(self, event: on.KernelSnapshot) -> int:
        """Take in a dump; return how much of it should have been known, and was not."""
        self.hears(event)
        news = self.kernel_state.replace(event)
        drift = news if event.check else 0
        self.drift += drift
        return drift

    def resolved(self, event: on.SourcesResolved, destinations: Iterable[Network]) -> None:
        """Take in where routing sends what; of what is too much, some are not known then."""
        self.hears(event)
        sources, lost = limit_sources(event.sources, destinations, SOURCES)
        self.sources = dict(sources)
        self._by_prefix = LongestPrefix(sources)
        self.errors = [
            f"{one}: routing divides it into more parts than the hooks can hold ({SOURCES}): "
            "requests to it from sockets without a bound address are refused"
            for one in lost[:LOST]
        ]
        self.userspace_esp.routed(event.into_tun)
        self._tun = event.tun

    def ike_connected(self, event: on.IkeConnected) -> bool:
        """Take in what the daemon has established; return whether that is news."""
        self.hears(event)
        news = self.kernel_state.ike_connected(event.established)
        return self.userspace_esp.ike_connected(event.established) or news

    def ike_gone(self) -> None:
        """Nobody vouches for any SA."""
        self.kernel_state.ike_gone()
        self.userspace_esp.ike_gone()

    def child_up(self, sa: ChildSa) -> None:
        """The daemon told of one more."""
        self.kernel_state.child_up(sa)
        self.userspace_esp.child_up(sa)

    def source_of(self, flow: Flow) -> Address | None:
        """Return the flow's source: its own, else the one routing would choose."""
        if flow.saddr is not None:
            return flow.saddr
        return next(self._by_prefix.containing(flow.daddr), (None, None))[1]

    def key_of(self, flow: Flow) -> Key | None:
        """Return a flow as the hooks look it up in the SPD table; None: its source is unknown."""
        saddr = self.source_of(flow)
        return None if saddr is None else flow_key(replace(flow, saddr=saddr))

    def is_live(self, flow: Flow) -> bool:
        """Tell whether the hooks would let a protected flow go now."""
        saddr = self.source_of(flow)
        return saddr is not None and self._hook_tables.is_live(replace(flow, saddr=saddr))

    def is_up(self, config: ChildConfig) -> bool:
        """Tell whether the kernel has all that IKE says of a child: asking changes nothing."""
        established = self.kernel_state.established(config.name)
        return not self.in_userspace and any(
            not self.kernel_state.is_missing(sa) for sa in established
        )

    def one_way_children(self) -> set[ChildSa]:
        """Return the CHILD_SAs of which the kernel has lost what it needs to receive."""
        return set() if self.in_userspace else self.kernel_state.one_way_children()

    def stale(self, name: ChildName, flow: Flow) -> list[ChildSa]:
        """Return what IKE believes to protect this flow, and of which the kernel has nothing.

        A flow outside what was negotiated is no reason, nor is a child's predecessor, nor are
        the other peers of its configuration.
        """
        there = flow.daddr, flow.proto, flow.dport
        covering = [
            sa
            for sa in self.source.established(name)
            if any(selector.contains(*there) for selector in sa.remote)
        ]
        return covering if all(self.source.is_missing(sa) for sa in covering) else []
