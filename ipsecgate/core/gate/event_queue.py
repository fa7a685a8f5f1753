"""Events that wait to be handled, and their order.

    kernel        a batch of them before anything else: they may close a flow (`kernel_events`)
    IKE           \
    all others     } a slice of each in turn; others: routes, timers, the operator
    applications  /

Rules of this module: what is urgent in the kernel's notifications goes before everything else, and
a flood of others delays applications by one batch at a time. At most `EVENTS_PER_STEP` requests of
applications are handled before the kernel is read again. An application may ask as often as it
likes: at most one refusal waits for each flow and policy. Beyond `REFUSALS` of them further ones
are dropped, and the hooks report them again.
"""

from __future__ import annotations

from collections import deque

from ipsecgate.core.gate.kernel_events import KernelEvents
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import Flow

EVENTS_PER_STEP = 16  # events handled between two reads of the kernel's notifications
REFUSALS = 256

_KERNEL = on.XfrmEvent | on.KernelSnapshot
_APPLICATIONS = on.FlowRefused | on.CallEvent | on.Wanted
_IKE = on.IkeEvent | on.IkeConnected


class EventQueue:
    """Events by source, each source's in order."""

    def __init__(self) -> None:
        self._kernel = KernelEvents()
        self._others_next = False  # after a batch the others get a turn
        self._turns = tuple(deque[on.Event]() for _ in range(3))  # IKE, the rest, applications
        self._next = 0
        self._refused: set[tuple[Flow, int | None]] = set()

    def __len__(self) -> int:
        return len(self._kernel) + sum(map(len, self._turns))

    def put(self, event: on.Event) -> None:
        """Add an event; drop a refusal that already waits, or that is one too many."""
        if isinstance(event, _KERNEL):
            self._kernel.put(event)
            return
        if isinstance(event, on.FlowRefused):
            identity = _identity(event)
            if identity in self._refused or len(self._refused) >= REFUSALS:
                return
            self._refused.add(identity)
        turn = 0 if isinstance(event, _IKE) else 2 if isinstance(event, _APPLICATIONS) else 1
        self._turns[turn].append(event)

    @property
    def is_between(self) -> bool:
        """Tell whether half of a batch of the kernel's notifications has been taken."""
        return self._kernel.is_between

    def take(self, *, busy: bool = False) -> list[on.Event]:
        """Return the events to handle next, all from one source; none if none wait.

        `busy`: the kernel's notifications that were taken last have yet to take full effect.
        """
        wait = self._others_next and not self._kernel.is_pressing
        if not wait and (taken := self._kernel.take(busy=busy)):
            self._others_next = not self._kernel.is_between
            return taken
        self._others_next = False
        return self._take_turn() or self._kernel.take(busy=busy)

    def take_urgent(self) -> list[on.Event]:
        """Return only what closes flows and must not wait for a large change to be written."""
        return self._kernel.take(busy=True)

    def _take_turn(self) -> list[on.Event]:
        for _ in self._turns:
            turn, self._next = self._turns[self._next], (self._next + 1) % len(self._turns)
            if turn:
                taken = [turn.popleft() for _ in range(min(EVENTS_PER_STEP, len(turn)))]
                self._refused -= {
                    _identity(event) for event in taken if isinstance(event, on.FlowRefused)
                }
                return taken
        return []


def _identity(event: on.FlowRefused) -> tuple[Flow, int | None]:
    """Return what repeated refusals share; each attempt of a client has another source port."""
    flow = event.flow
    return Flow(flow.daddr, flow.proto, flow.dport, flow.saddr, mark=flow.mark), event.policy
