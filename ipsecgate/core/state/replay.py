"""Fold notifications that arrived while a dump was taken into the dump.

A dump is not atomic: it may show an object before or after the change that a notification
reports. Setting and deleting by key are idempotent, so the last notification about a key is the
truth about it, and the dump is the truth about every other key. Folding instead of replaying
one by one matters: an SA that came and went during the dump must not look alive in between.
"""

from __future__ import annotations

from collections.abc import Iterable

from ipsecgate.core.model.events import (
    KernelSnapshot,
    PolicyGone,
    PolicySet,
    SaGone,
    SaSet,
    XfrmEvent,
)


def replay(snapshot: KernelSnapshot, events: Iterable[XfrmEvent]) -> KernelSnapshot | None:
    """Return the snapshot with the events applied; None if a flush among them voids it."""
    policies = {entry.key: entry for entry in snapshot.policies}
    sas = {sa.id: sa for sa in snapshot.sas}
    for event in events:
        match event:
            case PolicySet(entry):
                policies[entry.key] = entry
            case PolicyGone(key):
                policies.pop(key, None)
            case SaSet(sa):
                sas[sa.id] = sa
            case SaGone(sa_id):
                sas.pop(sa_id, None)
            case _:
                return None
    return KernelSnapshot(tuple(policies.values()), tuple(sas.values()))
