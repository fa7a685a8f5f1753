"""What happened and was not decided yet, in the order in which it is to be.

    kernel        all of it, before anything else: it closes
    IKE           \
    all the rest   } a slice of each in turn: routes, timers, the operator
    applications  /

Rules of this module: what an application asks for never stands before what the kernel told, and
at most `SLICE` of it is taken before the kernel is looked at again. An application may ask as
often as it likes: what is refused is told once for each flow and policy as long as it waits, and
of more than `REFUSALS` the hooks tell again.
"""

from __future__ import annotations

from collections import deque

from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import Flow

SLICE = 16  # events, but for the kernel's, between two looks at the kernel
REFUSALS = 256

_KERNEL = on.XfrmEvent | on.KernelSnapshot
_APPLICATIONS = on.FlowRefused | on.CallEvent
_IKE = on.IkeEvent | on.IkeConnected


class EventQueue:
    """Events by where they come from, each source's in order."""

    def __init__(self) -> None:
        self._kernel: deque[on.Event] = deque()
        self._turns = tuple(deque[on.Event]() for _ in range(3))  # IKE, the rest, applications
        self._next = 0
        self._refused: set[tuple[Flow, int | None]] = set()

    def __len__(self) -> int:
        return len(self._kernel) + sum(map(len, self._turns))

    def put(self, event: on.Event) -> None:
        """Take an event in; a refusal that waits already, or one too many, is left out."""
        if isinstance(event, _KERNEL):
            self._kernel.append(event)
            return
        if isinstance(event, on.FlowRefused):
            topic = _topic(event)
            if topic in self._refused or len(self._refused) >= REFUSALS:
                return
            self._refused.add(topic)
        turn = 0 if isinstance(event, _IKE) else 2 if isinstance(event, _APPLICATIONS) else 1
        self._turns[turn].append(event)

    def take(self) -> list[on.Event]:
        """Return what is to be decided now, of one kind; nothing if nothing waits."""
        if self._kernel:
            taken = list(self._kernel)
            self._kernel.clear()
            return taken
        for _ in self._turns:
            turn, self._next = self._turns[self._next], (self._next + 1) % len(self._turns)
            if turn:
                taken = [turn.popleft() for _ in range(min(SLICE, len(turn)))]
                self._refused -= {_topic(one) for one in taken if isinstance(one, on.FlowRefused)}
                return taken
        return []


def _topic(event: on.FlowRefused) -> tuple[Flow, int | None]:
    """Return what a refusal is about: a client that tries again has another port each time."""
    flow = event.flow
    return Flow(flow.daddr, flow.proto, flow.dport, flow.saddr, mark=flow.mark), event.policy
