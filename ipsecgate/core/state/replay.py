"""Fold the notifications that arrived during a dump into the dump.

A dump is not atomic: it may contain an object as it was before or after the change that a
notification reports. Setting and deleting by key are idempotent, so the last notification for a key
gives its state, and the dump gives that of every other key. They are folded into one snapshot
because an SA that was added and removed during the dump must not seem live in between.
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
    """Return the snapshot with the events applied; None if one is a flush, which invalidates it."""
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
