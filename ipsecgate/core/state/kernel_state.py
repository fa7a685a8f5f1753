"""What the gate knows of the kernel: SPD, SAD, and which SAs it trusts.

An SA is trusted when it was seen coming in while the IKE daemon was connected,
or when the daemon lists it. After a daemon was killed its SAs stay in the
kernel, reqids start at 1 again, and a stale SA would match a new policy.

What the daemon lists and what the kernel has are matched by destination, SPI and
protocol. An SPI alone is the choice of the peer that receives, and any other peer
may choose the same.

An SA counts only for what its peers agreed on, which may be less than its reqid
covers: a trap and the SA that the peer narrowed share one, and the peer drops
the rest. Until the daemon tells the traffic selectors (after the SA is in) the
policy that names the SA's SPI tells them, because strongSwan makes it from them.
It comes in the same breath as the SA, so waiting for it costs no time; a policy
that names no SPI says nothing about the SA, so it never opens by itself.

Larval states are left out. The kernel makes them when a packet asks for an SA that is not there,
with the very SPI that the policy names, and tells nobody; only a dump shows them.
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
    """SPD and SAD as the events told, plus trust."""

    def __init__(self) -> None:
        self.policies: dict[SpdKey, SpdEntry] = {}  # outbound
        self.inbound: dict[SpdKey, SpdEntry] = {}
        self.sas: dict[SaId, Sa] = {}
        self._trusted: set[SaId] = set()
        self._known: dict[SaId, ChildSa] = {}  # by the outbound state
        self._ike = False
        self._by_name: dict[ChildName, list[ChildSa]] | None = None  # of those, when asked
        self._asking: dict[int, list[Template]] | None = None  # outbound templates by reqid, too

    def apply(self, event: XfrmEvent) -> bool:
        """Take in one notification; return whether it may matter to what leaves.

        After a flush the caller must resynchronise.
        """
        match event:
            case PolicySet(entry):
                self._policies(entry.key)[entry.key] = entry
                self._asking = None
                return entry.key.direction is Direction.OUT
            case PolicyGone(key):
                self._policies(key).pop(key, None)
                self._asking = None
                return key.direction is Direction.OUT
            case PoliciesFlushed():
                self.policies.clear()
                self.inbound.clear()
                self._asking = None
            case SaSet(sa) if not sa.larval:
                self.sas[sa.id] = sa
                if self._ike:
                    self._trusted.add(sa.id)
            case SaGone(gone):
                self.sas.pop(gone, None)
                self._trusted.discard(gone)
            case SasFlushed():
                self.sas.clear()
                self._trusted.clear()
        return True

    def replace(self, snapshot: KernelSnapshot) -> int:
        """Take in a whole dump; return how many policies and SAs were not known like that.

        Trust survives for what is still there.
        """
        before = self._things()
        self.policies, self.inbound = {}, {}
        self._asking = None
        for entry in snapshot.policies:
            self._policies(entry.key)[entry.key] = entry
        self.sas = {sa.id: sa for sa in snapshot.sas if not sa.larval}
        self._trusted &= self.sas.keys()
        return len(before ^ self._things())

    def _policies(self, key: SpdKey) -> dict[SpdKey, SpdEntry]:
        return self.policies if key.direction is Direction.OUT else self.inbound

    def _things(self) -> set[SpdEntry | Sa]:
        return {*self.policies.values(), *self.inbound.values(), *self.sas.values()}

    def ike_connected(self, established: Iterable[ChildSa]) -> bool:
        """The daemon is connected and lists these CHILD_SAs; return whether that is news.

        The list may be older than what `child_up` was told: of SAs that the kernel
        has nothing is forgotten.
        """
        before = self._ike, self._known
        self._ike = True
        kept = {one: sa for one, sa in self._known.items() if one in self.sas}
        self._known = kept | {sa.outbound: sa for sa in established}
        self._by_name = None
        return before != (self._ike, self._known)

    def child_up(self, sa: ChildSa) -> None:
        """The daemon told of one more CHILD_SA."""
        self._known[sa.outbound] = sa
        self._by_name = None

    def ike_gone(self) -> None:
        """Nobody vouches for any SA until the daemon is back."""
        self._ike = False
        self._trusted.clear()
        self._known = {}
        self._by_name = None

    def confirmed_sas(self) -> list[Sa]:
        """Return the SAs that may cover a flow."""
        return [
            sa
            for sa in self.sas.values()
            if sa.id in self._trusted or (self._ike and sa.id in self._known)
        ]

    def established(self, name: ChildName) -> list[ChildSa]:
        """Return what the daemon says is established of a child."""
        if self._by_name is None:
            self._by_name = {}
            for sa in self._known.values():
                self._by_name.setdefault(sa.name, []).append(sa)
        return self._by_name.get(name, [])

    def is_missing(self, told: ChildSa) -> bool:
        """Tell whether the kernel has not what the daemon says is established.

        Of two children for the same flows the policy names one, and the other protects nothing.
        """
        if told.outbound not in self.sas:
            return True
        if self._asking is None:
            self._asking = {}
            for entry in self.policies.values():
                for template in entry.templates:
                    self._asking.setdefault(template.reqid, []).append(template)
        asking = self._asking.get(told.reqid, ())
        return not any(template.accepts(told.outbound) for template in asking)

    def one_way_children(self) -> set[ChildSa]:
        """Return the CHILD_SAs that can send, and of which something is missing to receive.

        That is the inbound state; and for each outbound policy that names the SA, as those of the
        daemon do, a policy for what answers. A lost IPComp state is not noticed.
        """
        states = {(sa.id, sa.reqid) for sa in self.sas.values()}
        sending: dict[tuple[int, int], list[tuple[Template, Selector]]] = {}
        for entry in self.policies.values():
            for template in entry.templates:
                named = template.spi, template.reqid
                sending.setdefault(named, []).append((template, entry.key.selector))
        receiving = {
            (entry.key.selector, template.reqid)
            for entry in self.inbound.values()
            for template in entry.templates
        }
        return {
            told
            for told in self._known.values()
            if told.inbound is not None
            and (told.outbound, told.reqid) in states
            and not (
                (told.inbound, told.reqid) in states
                and all(
                    (selector.reply, told.reqid) in receiving
                    for template, selector in sending.get((told.spi_out, told.reqid), ())
                    if template.accepts(told.outbound)
                )
            )
        }

    def outbound_sas(self) -> list[Sa]:
        """Return the trusted SAs without those the daemon calls inbound."""
        inbound = {sa.inbound for sa in self._known.values()}
        return [sa for sa in self.confirmed_sas() if sa.id not in inbound]

    def child_of(self, sa: Sa) -> ChildName | None:
        """Return which child the daemon lists an SA under, None until it does."""
        known = self._known.get(sa.id)
        return known.name if known else None

    def peer_of(self, entry: SpdEntry) -> Hashable:
        """Return who answers for a policy: its peer, else where it leads."""
        ends = (template.daddr for template in entry.templates if template.daddr is not None)
        return next(ends, entry.key.selector.dst)

    def name_of(self, entry: SpdEntry) -> str:
        """Return a policy's name: of the child that it belongs to, if the daemon told."""
        selector = entry.key.selector
        flows = f"{selector.src} to {selector.dst}"
        for sa in self._known.values():
            if any(t.reqid == sa.reqid and t.accepts(sa.outbound) for t in entry.templates):
                return f"{sa.name} ({flows}, peer {sa.remote_host})"
        return f"{flows} (peer {self.peer_of(entry)})"

    def kernel_rules(self) -> list[Rule]:
        """Return the kernel's own answers, as far as its SAs are trusted."""
        return spd_rules(self.policies.values(), self.confirmed_sas())

    def hook_rules(self) -> list[Rule]:
        """Return the hook's SPD table as rules: the kernel's answers within what was agreed."""
        return spd_rules(self._before_the_floor(), self.confirmed_sas(), self._agreed())

    def _before_the_floor(self) -> list[SpdEntry]:
        """Return the policies without a floor that is the last of them.

        What only it matches is not protected, with or without it.
        """
        others = [entry for entry in self.policies.values() if not is_floor(entry)]
        if any(entry.priority >= PRIORITY for entry in others):
            return list(self.policies.values())
        return others

    def _agreed(self) -> Negotiated:
        naming = cache(self._naming)

        def agreed(sa: Sa, template: Template) -> Iterable[Ternary]:
            if sa.id in self._known:
                return negotiated_regions(self._known[sa.id].local, self._known[sa.id].remote)
            if template.spi == sa.id.spi:
                return (EVERYTHING,)
            named = naming().get((sa.id.spi, sa.reqid), ())
            return (region for other, region in named if other.accepts(sa.id))

        return agreed

    def _naming(self) -> dict[tuple[int, int], list[tuple[Template, Ternary]]]:
        """Return what policies name SPIs, by SPI and reqid: which template, for what flows."""
        found: dict[tuple[int, int], list[tuple[Template, Ternary]]] = {}
        for entry in self.policies.values():
            for template in entry.templates:
                if template.spi:
                    named = found.setdefault((template.spi, template.reqid), [])
                    named.append((template, region_of(entry)))
        return found
