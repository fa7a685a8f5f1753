"""A dump on its way into the state, a slice at a time: notifications need not wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from ipsecgate.core.model.events import KernelSnapshot
from ipsecgate.core.model.ipsec import Sa, SaId, SpdEntry, SpdKey


class Adoption:
    """A dump; `newer` are the objects that notifications have reported since.

    `differences` counts the policies and SAs that differed from the dump, before and after.
    """

    def __init__(self, snapshot: KernelSnapshot) -> None:
        self.differences = 0
        self.newer: set[SpdKey | SaId] = set()
        self.there: set[SpdKey | SaId] = set()  # what of the dump has been seen
        live = (sa for sa in snapshot.sas if not sa.larval)
        self._left: Iterator[SpdEntry | Sa] = chain(snapshot.policies, live)

    def next(self) -> SpdEntry | Sa | None:
        """Return the next object of the dump, None at its end."""
        for found in self._left:
            identity = found.key if isinstance(found, SpdEntry) else found.id
            self.there.add(identity)
            if identity not in self.newer:
                return found
        return None

    def is_gone(self, identity: SpdKey | SaId) -> bool:
        """Tell whether the kernel did not have an object when the dump was made, nor since."""
        return identity not in self.there and identity not in self.newer
