"""The kernel's notifications and dumps that wait, folded: the last one for an object counts.

    batch     the last notification for each object, of those that came while the batch before it
              was applied
    dump      is applied with the batch behind it, which came with it
    urgent    SAs that are gone, and flushes: they only close flows

Rules of this module: a batch is applied a slice at a time. After a whole one the state is a state
that the kernel had; after half of one (`is_between`) it may open a flow that the kernel opens
neither before nor after, so until then only what closes is published. What is urgent goes before
everything else, and again in its turn; nothing that is older comes after it.
"""

from __future__ import annotations

from collections import deque

from ipsecgate.core.model import events as on

SLICE = 128  # notifications handed out at a time

KernelEvent = on.XfrmEvent | on.KernelSnapshot
Batch = dict[object, on.XfrmEvent]
_FLUSHED = {
    on.PoliciesFlushed: (on.PolicySet, on.PolicyGone),
    on.SasFlushed: (on.SaSet, on.SaGone),
}


class KernelEvents:
    """Batches and dumps, in order."""

    def __init__(self) -> None:
        self._waiting: deque[Batch | on.KernelSnapshot] = deque()
        self._current: deque[on.XfrmEvent] = deque()  # the rest of the batch that is being applied
        self._void: set[object] = set()  # identities and types of which it must set nothing more
        self._urgent: Batch = {}

    def __len__(self) -> int:
        waiting = (len(one) if isinstance(one, dict) else 1 for one in self._waiting)
        return sum(waiting) + len(self._current)

    @property
    def is_between(self) -> bool:
        """Tell whether part of a batch, or a dump without its batch, has been handed out."""
        return bool(self._current)

    @property
    def is_pressing(self) -> bool:
        """Tell whether something must go on before others get a turn."""
        return bool(self._urgent or self._current)

    def put(self, event: KernelEvent) -> None:
        """Add a notification or a dump."""
        if isinstance(event, on.KernelSnapshot):
            self._waiting.append(event)
            return
        if isinstance(event, on.PoliciesFlushed | on.SasFlushed):
            self._flushed(event)
        elif isinstance(event, on.SaGone):
            self._gone(event)
        last = self._waiting[-1] if self._waiting else None
        if not isinstance(last, dict):
            last = {}
            self._waiting.append(last)
        last[_identity(event)] = event

    def _gone(self, event: on.SaGone) -> None:
        self._urgent[event.id] = event
        self._void.add(event.id)
        for batch in self._waiting:
            if isinstance(batch, dict):
                batch.pop(event.id, None)

    def _flushed(self, event: on.PoliciesFlushed | on.SasFlushed) -> None:
        """Leave out what a flush makes void; a dump follows that shows what it left."""
        self._urgent[type(event)] = event
        self._void.update(_FLUSHED[type(event)])
        left = [batch for batch in self._waiting if isinstance(batch, dict)]
        for batch in left:
            for key in [k for k, one in batch.items() if isinstance(one, _FLUSHED[type(event)])]:
                del batch[key]
            batch.pop(type(event), None)
        self._waiting = deque(left)

    def take(self, *, busy: bool) -> list[on.Event]:
        """Return what to apply next.

        `busy`: what was taken last has yet to take full effect, so only what is urgent.
        """
        alone = not busy and not self._current and len(self._waiting) == 1
        found: list[on.Event] = []
        if not alone or len(self) > SLICE:  # otherwise all of it is handed out, in order
            found += self._urgent.values()
        self._urgent = {}
        if busy:
            return found
        if not self._current:
            self._void = set()
            found += self._begin()
        for _ in range(min(SLICE, len(self._current))):
            event = self._current.popleft()
            if not self._void or not self._is_void(event):
                found.append(event)
        return found

    def _begin(self) -> list[on.Event]:
        """Begin the next batch; return the dump before it, and what must not return with that."""
        found: list[on.Event] = []
        while self._waiting and not self._current:
            first = self._waiting.popleft()
            if isinstance(first, dict):
                self._current.extend(first.values())
                break
            batches = [one for one in self._waiting if isinstance(one, dict)]
            gone = [e for one in batches for e in one.values() if isinstance(e, on.SaGone)]
            found += [first, *gone]
        return found

    def _is_void(self, event: on.XfrmEvent) -> bool:
        return type(event) in self._void or (
            isinstance(event, on.SaSet) and event.sa.id in self._void
        )


def _identity(event: on.XfrmEvent) -> object:
    match event:
        case on.PolicySet(entry):
            return entry.key
        case on.PolicyGone(key):
            return key
        case on.SaSet(sa):
            return sa.id
        case on.SaGone(sa_id):
            return sa_id
    return type(event)
