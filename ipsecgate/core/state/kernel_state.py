"""The kernel's SPD and SAD as its notifications report them, and which SAs are confirmed.

Rules of this module:
- Only a confirmed SA protects: one that was installed while the IKE daemon was connected, or that
  the daemon lists. The SAs of a killed daemon stay in the kernel while reqids start again at 1, so
  a stale SA would match a new policy.
- The daemon's list and the kernel's states are matched by destination, SPI and protocol. An SPI
  alone identifies nothing: its receiver chooses it, and two peers may choose the same one.
- An SA protects only the negotiated traffic selectors, which may be less than its reqid covers: a
  trap policy and an SA whose selectors the peer narrowed share one reqid, and the peer drops
  everything else. The daemon reports the selectors after the SA is installed. Until then we take
  them from the policy that names the SA's SPI, because strongSwan derives it from them. It is
  installed together with the SA, so waiting for it costs no time. A policy without an SPI says
  nothing about the SA's selectors, so it opens nothing by itself.
- Larval states are ignored. The kernel creates one when a packet needs an SA that is missing, with
  the SPI that the policy names, and sends no notification. Only a dump shows them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from functools import cache

from ipsecgate.core.model.events import (
    KernelSnapshot,
    PoliciesFlushed,
    PolicyGone,
    PolicySet,
    SaGone,
    SaSet,
    SasFlushed,
    XfrmEvent,
)
from ipsecgate.core.model.flow import Selector
from ipsecgate.core.model.ipsec import (
    ChildName,
    ChildSa,
    Direction,
    Sa,
    SaId,
    SpdEntry,
    SpdKey,
    Template,
)
from ipsecgate.core.state.floor import PRIORITY, is_floor
from ipsecgate.core.state.spd import (
    EVERYTHING,
    Negotiated,
    negotiated_regions,
    region_of,
    spd_rules,
)
from ipsecgate.core.tables.table import Rule, Ternary


class KernelState:
    """SPD and SAD, and the CHILD_SAs that the IKE daemon lists."""

    def __init__(self) -> None:
        self.policies: dict[SpdKey, SpdEntry] = {}  # outbound
        self.inbound: dict[SpdKey, SpdEntry] = {}
        self.sas: dict[SaId, Sa] = {}
        self._seen_installed: set[SaId] = set()  # while the daemon was connected
        self._listed: dict[SaId, ChildSa] = {}  # by the outbound state
        self._ike_connected = False
        # Indexes of `_listed` and of the outbound templates, built on demand.
        self._by_name: dict[ChildName, list[ChildSa]] | None = None
        self._templates: dict[int, list[Template]] | None = None  # by reqid

    def apply(self, event: XfrmEvent) -> bool:
        """Apply one notification; return whether it may affect outbound traffic.

        After a flush the caller must resynchronise.
        """
        match event:
            case PolicySet(entry):
                self._policies(entry.key)[entry.key] = entry
                self._templates = None
                return entry.key.direction is Direction.OUT
            case PolicyGone(key):
                self._policies(key).pop(key, None)
                self._templates = None
                return key.direction is Direction.OUT
            case PoliciesFlushed():
                self.policies.clear()
                self.inbound.clear()
                self._templates = None
            case SaSet(sa) if not sa.larval:
                self.sas[sa.id] = sa
                if self._ike_connected:
                    self._seen_installed.add(sa.id)
            case SaGone(gone):
                self.sas.pop(gone, None)
                self._seen_installed.discard(gone)
            case SasFlushed():
                self.sas.clear()
                self._seen_installed.clear()
        return True

    def replace(self, snapshot: KernelSnapshot) -> int:
        """Adopt a whole dump; return the number of policies and SAs that differed from it.

        An SA that is still there stays confirmed.
        """
        before = self._objects()
        self.policies, self.inbound = {}, {}
        self._templates = None
        for entry in snapshot.policies:
            self._policies(entry.key)[entry.key] = entry
        self.sas = {sa.id: sa for sa in snapshot.sas if not sa.larval}
        self._seen_installed &= self.sas.keys()
        return len(before ^ self._objects())

    def _policies(self, key: SpdKey) -> dict[SpdKey, SpdEntry]:
        return self.policies if key.direction is Direction.OUT else self.inbound

    def _objects(self) -> set[SpdEntry | Sa]:
        return {*self.policies.values(), *self.inbound.values(), *self.sas.values()}

    def ike_connected(self, established: Iterable[ChildSa]) -> bool:
        """Handle the daemon's list of CHILD_SAs; return whether anything changed.

        The list may be older than a `child_up` that we have already handled, so a CHILD_SA whose
        state the kernel still has is kept.
        """
        before = self._ike_connected, self._listed
        self._ike_connected = True
        kept = {sa_id: sa for sa_id, sa in self._listed.items() if sa_id in self.sas}
        self._listed = kept | {sa.outbound: sa for sa in established}
        self._by_name = None
        return before != (self._ike_connected, self._listed)

    def child_up(self, sa: ChildSa) -> None:
        """Handle a new CHILD_SA."""
        self._listed[sa.outbound] = sa
        self._by_name = None

    def ike_gone(self) -> None:
        """Treat no SA as confirmed until the daemon is back."""
        self._ike_connected = False
        self._seen_installed.clear()
        self._listed = {}
        self._by_name = None

    def confirmed_sas(self) -> list[Sa]:
        """Return the SAs that may protect a flow."""
        return [
            sa
            for sa in self.sas.values()
            if sa.id in self._seen_installed or (self._ike_connected and sa.id in self._listed)
        ]

    def established(self, name: ChildName) -> list[ChildSa]:
        """Return the CHILD_SAs of a child that the daemon lists as established."""
        if self._by_name is None:
            self._by_name = {}
            for sa in self._listed.values():
                self._by_name.setdefault(sa.name, []).append(sa)
        return self._by_name.get(name, [])

    def is_missing(self, child_sa: ChildSa) -> bool:
        """Return whether the kernel lacks a CHILD_SA's outbound state, or a policy that uses it.

        If two CHILD_SAs have the same selectors, the policy names only one of their SPIs, and the
        other protects nothing.
        """
        if child_sa.outbound not in self.sas:
            return True
        if self._templates is None:
            self._templates = {}
            for entry in self.policies.values():
                for template in entry.templates:
                    self._templates.setdefault(template.reqid, []).append(template)
        templates = self._templates.get(child_sa.reqid, ())
        return not any(template.accepts(child_sa.outbound) for template in templates)

    def one_way_children(self) -> set[ChildSa]:
        """Return the CHILD_SAs that can send but not receive.

        They lack the inbound state, or an inbound policy for the replies to an outbound policy that
        names the SA. A lost IPComp state is not detected.
        """
        states = {(sa.id, sa.reqid) for sa in self.sas.values()}
        by_spi: dict[tuple[int, int], list[tuple[Template, Selector]]] = {}
        for entry in self.policies.values():
            for template in entry.templates:
                uses = by_spi.setdefault((template.spi, template.reqid), [])
                uses.append((template, entry.key.selector))
        receiving = {
            (entry.key.selector, template.reqid)
            for entry in self.inbound.values()
            for template in entry.templates
        }
        return {
            child_sa
            for child_sa in self._listed.values()
            if child_sa.inbound is not None
            and (child_sa.outbound, child_sa.reqid) in states
            and not (
                (child_sa.inbound, child_sa.reqid) in states
                and all(
                    (selector.reply, child_sa.reqid) in receiving
                    for template, selector in by_spi.get((child_sa.spi_out, child_sa.reqid), ())
                    if template.accepts(child_sa.outbound)
                )
            )
        }

    def outbound_sas(self) -> list[Sa]:
        """Return the confirmed SAs, without those that the daemon lists as inbound."""
        inbound = {sa.inbound for sa in self._listed.values()}
        return [sa for sa in self.confirmed_sas() if sa.id not in inbound]

    def child_of(self, sa: Sa) -> ChildName | None:
        """Return which child the daemon lists an SA under, None until it does."""
        listed = self._listed.get(sa.id)
        return listed.name if listed else None

    def peer_of(self, entry: SpdEntry) -> Hashable:
        """Return the peer of a policy; the policy's destination if its templates name none."""
        peers = (template.daddr for template in entry.templates if template.daddr is not None)
        return next(peers, entry.key.selector.dst)

    def name_of(self, entry: SpdEntry) -> str:
        """Return a policy's name for messages: its child's, if the daemon lists it."""
        selector = entry.key.selector
        flows = f"{selector.src} to {selector.dst}"
        for sa in self._listed.values():
            if any(t.reqid == sa.reqid and t.accepts(sa.outbound) for t in entry.templates):
                return f"{sa.name} ({flows}, peer {sa.remote_host})"
        return f"{flows} (peer {self.peer_of(entry)})"

    def kernel_rules(self) -> list[Rule]:
        """Return what the kernel would do with each flow, using only confirmed SAs."""
        return spd_rules(self.policies.values(), self.confirmed_sas())

    def hook_rules(self) -> list[Rule]:
        """Return the hooks' SPD table as rules: `kernel_rules`, within the negotiated selectors."""
        return spd_rules(
            self._policies_before_the_floor(), self.confirmed_sas(), self._negotiated()
        )

    def _policies_before_the_floor(self) -> list[SpdEntry]:
        """Return the outbound policies, without a floor that is behind all of them.

        A flow that only the floor matches is not protected whether or not the floor is there.
        """
        others = [entry for entry in self.policies.values() if not is_floor(entry)]
        if any(entry.priority >= PRIORITY for entry in others):
            return list(self.policies.values())
        return others

    def _negotiated(self) -> Negotiated:
        policies_by_spi = cache(self._policies_by_spi)

        def negotiated(sa: Sa, template: Template) -> Iterable[Ternary]:
            if sa.id in self._listed:
                return negotiated_regions(self._listed[sa.id].local, self._listed[sa.id].remote)
            if template.spi == sa.id.spi:
                return (EVERYTHING,)  # this policy is the one derived from the SA's selectors
            found = policies_by_spi().get((sa.id.spi, sa.reqid), ())
            return (region for other, region in found if other.accepts(sa.id))

        return negotiated

    def _policies_by_spi(self) -> dict[tuple[int, int], list[tuple[Template, Ternary]]]:
        """Return the templates that name an SPI and their policies' flows, by (SPI, reqid)."""
        found: dict[tuple[int, int], list[tuple[Template, Ternary]]] = {}
        for entry in self.policies.values():
            for template in entry.templates:
                if template.spi:
                    uses = found.setdefault((template.spi, template.reqid), [])
                    uses.append((template, region_of(entry)))
        return found
