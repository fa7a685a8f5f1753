"""What the gate knows of the kernel: SPD, SAD, and which SAs it trusts.

An SA is trusted when it was seen coming in while the IKE daemon was connected,
or when the daemon lists its SPI. After a daemon was killed its SAs stay in the
kernel, reqids start at 1 again, and a stale SA would match a new policy.
"""

from __future__ import annotations

from collections.abc import Iterable

from ipsecgate.core.events import (
    ChildSa,
    KernelSnapshot,
    PoliciesFlushed,
    PolicyGone,
    PolicySet,
    SaGone,
    SaSet,
    SasFlushed,
    XfrmEvent,
)
from ipsecgate.core.ipsec import Sa, SaId, SpdEntry, SpdKey
from ipsecgate.core.spd import spd_rules
from ipsecgate.core.table import Rule


class Mirror:
    """SPD and SAD as the events told, plus trust."""

    def __init__(self) -> None:
        self.policies: dict[SpdKey, SpdEntry] = {}
        self.sas: dict[SaId, Sa] = {}
        self._trusted: set[SaId] = set()
        self._known: dict[int, ChildSa] = {}  # by outbound SPI
        self._ike = False

    def apply(self, event: XfrmEvent) -> None:
        """Take in one notification. After a flush the caller must resynchronise."""
        match event:
            case PolicySet(entry):
                self.policies[entry.key] = entry
            case PolicyGone(key):
                self.policies.pop(key, None)
            case PoliciesFlushed():
                self.policies.clear()
            case SaSet(sa):
                self.sas[sa.id] = sa
                if self._ike:
                    self._trusted.add(sa.id)
            case SaGone(gone):
                self.sas.pop(gone, None)
                self._trusted.discard(gone)
            case SasFlushed():
                self.sas.clear()
                self._trusted.clear()

    def replace(self, snapshot: KernelSnapshot) -> None:
        """Take in a whole dump; trust survives for what is still there."""
        self.policies = {entry.key: entry for entry in snapshot.policies}
        self.sas = {sa.id: sa for sa in snapshot.sas}
        self._trusted &= self.sas.keys()

    def ike_knows(self, established: Iterable[ChildSa]) -> None:
        """The daemon is connected and lists these CHILD_SAs."""
        self._ike = True
        self._known = {sa.spi_out: sa for sa in established}

    def ike_adds(self, sa: ChildSa) -> None:
        """The daemon told of one more CHILD_SA."""
        self._known[sa.spi_out] = sa

    def ike_gone(self) -> None:
        """Nobody vouches for any SA until the daemon is back."""
        self._ike = False
        self._trusted.clear()
        self._known = {}

    def trusted_sas(self) -> list[Sa]:
        """Return the SAs that may cover a flow."""
        return [
            sa
            for sa in self.sas.values()
            if sa.id in self._trusted or (self._ike and sa.id.spi in self._known)
        ]

    def established(self, ike: str, child: str) -> list[ChildSa]:
        """Return what the daemon says is established of a child."""
        return [sa for sa in self._known.values() if (sa.ike, sa.child) == (ike, child)]

    def outbound_sas(self) -> list[Sa]:
        """Return the trusted SAs without those the daemon calls inbound."""
        inbound = {sa.spi_in for sa in self._known.values()}
        return [sa for sa in self.trusted_sas() if sa.id.spi not in inbound]

    def child_of(self, sa: Sa) -> str | None:
        """Return "ike/child" as the daemon calls an SA, None before it told."""
        known = self._known.get(sa.id.spi)
        return f"{known.ike}/{known.child}" if known else None

    def rules(self) -> list[Rule]:
        """Return the hook's SPD table as rules."""
        return spd_rules(self.policies.values(), self.trusted_sas())
