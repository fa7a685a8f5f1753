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

from collections.abc import Hashable, Iterable, Iterator, Mapping
from itertools import chain

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
from ipsecgate.core.state.adoption import Adoption
from ipsecgate.core.state.groups import Groups
from ipsecgate.core.state.listed import ListedSas
from ipsecgate.core.state.one_way import one_way_children
from ipsecgate.core.state.outbound import OutboundPolicies
from ipsecgate.core.state.spd import EVERYTHING, applies, negotiated_regions, region_of
from ipsecgate.core.tables.layout import Key
from ipsecgate.core.tables.table import Rule, Ternary

ADOPTED = 256  # objects of a dump that are adopted in one go


class KernelState:
    """SPD and SAD, and the CHILD_SAs that the IKE daemon lists."""

    def __init__(self) -> None:
        self._outbound = OutboundPolicies()
        self.policies: Mapping[SpdKey, SpdEntry] = self._outbound.by_key  # outbound
        self._spd = self._outbound.rules  # of those that decide, see `decisive_policies`
        self.inbound: dict[SpdKey, SpdEntry] = {}
        self.sas: dict[SaId, Sa] = {}
        self._by_reqid: Groups[int, SaId] = Groups()
        self._seen_installed: set[SaId] = set()
        self._listed = ListedSas()
        self._adoption: Adoption | None = None  # of a dump
        self._stale: Iterator[SpdKey | SaId] | None = None  # what may be left over from before it

    def apply(self, event: XfrmEvent) -> bool:
        """Apply one notification; return whether it may affect outbound traffic.

        After a flush the caller must resynchronise.
        """
        match event:
            case PolicySet(entry):
                self._is_newer(entry.key)
                self._put(entry)
                return entry.key.direction is Direction.OUT
            case PolicyGone(key):
                self._is_newer(key)
                self._drop(key)
                return key.direction is Direction.OUT
            case PoliciesFlushed():
                self._adoption = None
                for key in [*self.policies, *self.inbound]:
                    self._drop(key)
            case SaSet(sa) if not sa.larval:
                self._is_newer(sa.id)
                self._put_sa(sa)
                if self._listed.is_connected and sa.id not in self._seen_installed:
                    self._seen_installed.add(sa.id)
                    self._spd.sas_changed((sa.reqid,), closing=False)
            case SaGone(gone):
                self._is_newer(gone)
                self._drop_sa(gone)
            case SasFlushed():
                self._adoption = None
                for one in list(self.sas):
                    self._drop_sa(one)
        return True

    def replace(self, snapshot: KernelSnapshot) -> int:
        """Adopt a whole dump at once, as `begin` and `adopt` do in slices."""
        self.begin(snapshot)
        while (drift := self.adopt(ADOPTED)) is None:
            pass
        return drift

    def begin(self, snapshot: KernelSnapshot) -> None:
        """Begin to adopt a dump. Notifications that are applied meanwhile are newer than it."""
        self._adoption, self._stale = Adoption(snapshot), None

    @property
    def is_adopting(self) -> bool:
        """Tell whether a dump has been adopted in part. A flush makes it void."""
        return self._adoption is not None

    def adopt(self, limit: int = ADOPTED) -> int | None:
        """Adopt so many objects of the dump; at its end return how many differed, before and after.

        An SA that is still there stays confirmed.
        """
        adoption, left = self._adoption, limit
        if adoption is None:
            return 0
        while left and self._stale is None:
            left -= 1
            found = adoption.next()
            if found is None:
                self._stale = chain([*self.policies, *self.inbound], list(self.sas))
            elif isinstance(found, SpdEntry):
                adoption.differences += self._put(found)
            else:
                adoption.differences += self._put_sa(found)
        while left and self._stale is not None:
            left -= 1
            identity = next(self._stale, None)
            if identity is None:
                self._adoption = self._stale = None
                return adoption.differences
            if adoption.is_gone(identity):
                adoption.differences += 1
                if isinstance(identity, SaId):
                    self._drop_sa(identity)
                else:
                    self._drop(identity)
        return None

    def _is_newer(self, identity: SpdKey | SaId) -> None:
        if self._adoption is not None:
            self._adoption.newer.add(identity)

    def _put(self, entry: SpdEntry) -> int:
        """Take in a policy; return how many objects differ: none, the new one, and the old one."""
        if entry.key.direction is not Direction.OUT:
            old = self.inbound.get(entry.key)
            self.inbound[entry.key] = entry
            return 0 if old == entry else 1 + (old is not None)
        return self._outbound.put(entry)

    def _drop(self, key: SpdKey) -> None:
        """Forget a policy."""
        if key.direction is not Direction.OUT:
            self.inbound.pop(key, None)
            return
        self._outbound.drop(key)

    def _put_sa(self, sa: Sa) -> int:
        """Take in an SA; return as `_put` does."""
        old = self.sas.get(sa.id)
        if old == sa:
            return 0
        confirmed = sa.id in self._seen_installed
        self._drop_sa(sa.id)
        self.sas[sa.id] = sa
        self._by_reqid.add(sa.reqid, sa.id)
        if confirmed:
            self._seen_installed.add(sa.id)
        self._spd.sas_changed((sa.reqid,), closing=False)
        return 1 + (old is not None)

    def _drop_sa(self, gone: SaId) -> None:
        self._seen_installed.discard(gone)
        sa = self.sas.pop(gone, None)
        if sa is None:
            return
        self._by_reqid.discard(sa.reqid, gone)
        self._spd.sas_changed((sa.reqid,), closing=True)

    def ike_connected(self, established: Iterable[ChildSa]) -> bool:
        """Handle the daemon's list of CHILD_SAs; return whether anything changed.

        The list may be older than a `child_up` that we have already handled, so a CHILD_SA whose
        state the kernel still has is kept.
        """
        was_gone = not self._listed.is_connected
        changed = self._listed.replace(established, self.sas)
        if was_gone:
            self._spd.sas_changed(self._by_reqid.keys(), closing=False)
        for state in changed:
            self._listing_changed(state)
        return was_gone or bool(changed)

    def _listing_changed(self, sa_id: SaId) -> None:
        """Mark the policies of an SA that the daemon now lists differently."""
        if sa_id in self.sas:
            closing = sa_id not in self._listed.by_state
            self._spd.sas_changed((self.sas[sa_id].reqid,), closing=closing)

    def child_up(self, sa: ChildSa) -> None:
        """Handle a new CHILD_SA."""
        self._listed.add(sa)
        self._listing_changed(sa.outbound)

    def ike_gone(self) -> None:
        """Treat no SA as confirmed until the daemon is back."""
        self._seen_installed.clear()
        self._listed.clear()
        self._spd.sas_changed(self._by_reqid.keys(), closing=True)

    def winners(self, key: Key) -> list[SpdEntry]:
        """Return the policies that decide about a flow: of those that match, the first priority.

        Looks at every policy.
        """
        matching = [
            entry
            for entry in self.decisive_policies.values()
            if applies(entry) and region_of(entry.key).matches(key)
        ]
        first = min((entry.priority for entry in matching), default=0)
        return [entry for entry in matching if entry.priority == first]

    def trap_for(self, key: Key) -> Template | None:
        """Return the template of the first trap, which names no SPI, that a flow meets.

        Looks at every policy.
        """
        traps = [
            entry
            for entry in self.decisive_policies.values()
            if entry.templates
            and not entry.templates[0].spi
            and applies(entry)
            and region_of(entry.key).matches(key)
        ]
        first = min(traps, key=lambda entry: entry.priority, default=None)
        return first.templates[0] if first else None

    def confirmed_sas(self) -> list[Sa]:
        """Return the SAs that may cover a flow."""
        return [sa for sa in self.sas.values() if self.is_confirmed(sa)]

    def is_confirmed(self, sa: Sa) -> bool:
        """Tell whether an SA may cover a flow."""
        listed = self._listed
        return sa.id in self._seen_installed or (listed.is_connected and sa.id in listed.by_state)

    def established(self, name: ChildName) -> list[ChildSa]:
        """Return the CHILD_SAs of a child that the daemon lists as established."""
        return self._listed.of(name)

    def all_established(self) -> list[ChildSa]:
        """Return every CHILD_SA that the daemon lists as established."""
        return self._listed.all()

    def is_missing(self, child_sa: ChildSa) -> bool:
        """Return whether the kernel lacks a CHILD_SA's outbound state, or a policy that uses it.

        If two CHILD_SAs have the same selectors, the policy names only one of their SPIs, and the
        other protects nothing.
        """
        if child_sa.outbound not in self.sas:
            return True
        return not any(
            template.reqid == child_sa.reqid and template.accepts(child_sa.outbound)
            for entry in self._spd.of_reqid(child_sa.reqid)
            for template in entry.templates
        )

    def one_way_children(self) -> set[ChildSa]:
        """Return the CHILD_SAs that can send but not receive."""
        listed, sas = self._listed.all(), self.sas.values()
        return one_way_children(listed, sas, self.policies.values(), self.inbound.values())

    def outbound_sas(self) -> list[Sa]:
        """Return the confirmed SAs, without those that the daemon lists as inbound."""
        inbound = {sa.inbound for sa in self._listed.all()}
        return [sa for sa in self.confirmed_sas() if sa.id not in inbound]

    def child_of(self, sa: Sa) -> ChildName | None:
        """Return which child the daemon lists an SA under, None until it does."""
        listed = self._listed.by_state.get(sa.id)
        return listed.name if listed else None

    def peer_of(self, owner: Hashable) -> Hashable:
        """Return the peer of the policy that rules belong to, both peers if they belong to two."""
        if isinstance(owner, frozenset):
            peers = frozenset(map(self.peer_of, owner))
            return next(iter(peers)) if len(peers) == 1 else peers
        entry = self.policies.get(owner) if isinstance(owner, SpdKey) else None
        if entry is None:
            return None
        for template in entry.templates:
            if template.daddr is not None:
                return template.daddr
        return entry.key.selector.dst

    def name_of(self, owner: Hashable) -> str:
        """Return a name for messages of the policy that rules belong to: its child's, if listed.

        Rules that belong to two policies have both names.
        """
        if isinstance(owner, frozenset):
            return " with ".join(sorted(map(self.name_of, owner)))
        entry = self.policies.get(owner) if isinstance(owner, SpdKey) else None
        if entry is None:
            return ""
        selector = entry.key.selector
        flows = f"{selector.src} to {selector.dst}"
        for sa in self._listed.all():
            if any(t.reqid == sa.reqid and t.accepts(sa.outbound) for t in entry.templates):
                return f"{sa.name} ({flows}, peer {sa.remote_host})"
        return f"{flows} (peer {self.peer_of(owner)})"

    @property
    def decisive_policies(self) -> Mapping[SpdKey, SpdEntry]:
        """Return the outbound policies, without a floor that is the last of them."""
        return self._spd.policies

    @property
    def pending(self) -> bool:
        """Tell whether there are rules that `changed_rules` has yet to yield."""
        return self._spd.pending

    def changed_rules(self, limit: int) -> Iterator[tuple[Hashable, list[Rule]]]:
        """Yield owners whose rules may have changed, and their rules, of at most `limit` policies.

        The rules are the kernel's, within the negotiated selectors.
        """
        return self._spd.take(self._confirmed_of, self.negotiated, limit)

    def _confirmed_of(self, reqid: int) -> list[Sa]:
        """Return the SAs of a reqid that may cover a flow."""
        sas = (self.sas[sa_id] for sa_id in self._by_reqid.of(reqid))
        return [sa for sa in sas if self.is_confirmed(sa)]

    def negotiated(self, sa: Sa, template: Template) -> Iterable[Ternary]:
        """Return for which flows an SA was negotiated, as far as is known."""
        if (listed := self._listed.by_state.get(sa.id)) is not None:
            return negotiated_regions(listed.local, listed.remote)
        if template.spi == sa.id.spi:
            return (EVERYTHING,)
        return (
            region_of(entry.key)
            for entry in self._spd.of_reqid(sa.reqid)
            for other in entry.templates
            if (other.spi, other.reqid) == (sa.id.spi, sa.reqid) and other.accepts(sa.id)
        )
