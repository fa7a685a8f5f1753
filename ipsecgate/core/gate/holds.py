"""Held system calls: which wait for which flow, and for which child.

The gate evaluates a flow (`Demand.evaluate`) and passes its state in:

    CallMade -> FREE: answered at once      no SA is needed, or it is live
                FAILED: an errno at once
                else held (`Hold`)

    something it waits for changes -> the flow is due, and evaluated again, a slice in each step

Rules of this module:
- All calls for one flow are evaluated once. A change costs nothing for the flows it can't affect.
- An answer opens nothing, because the hooks check the flow again. So the table is written before
  the `Answer` that depends on it.
- No errno that a client takes for success or for "wait": EAGAIN, EINTR, EINPROGRESS.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from itertools import islice

from ipsecgate.core.codec.seccomp import ERESTARTNOINTR
from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.routing import Routed
from ipsecgate.core.model.events import (
    Call,
    CallExpired,
    CallGone,
    CallInterrupted,
    CallMade,
)
from ipsecgate.core.model.flow import Flow
from ipsecgate.core.model.ipsec import ChildName
from ipsecgate.core.model.policy import Errnos
from ipsecgate.core.model.value import value
from ipsecgate.core.tables.flow_index import FlowIndex

FLOWS_PER_STEP = 16  # flows evaluated again in one step
CALLS_PER_STEP = 256  # of one flow, or of those flows but the last: answered in one step


class FlowState(Enum):
    """What a call for a flow has to wait for."""

    FREE = "no SA is needed, or it is live"
    PENDING = "an SA is being negotiated"
    IDLE = "no SA, and no negotiation"
    FAILED = "the negotiation failed"


WAITING = (FlowState.PENDING, FlowState.IDLE)


@value
class Evaluation:
    """A flow's state, the child that it waits for, and the flow as routed."""

    state: FlowState
    child: ChildName | None
    routed: Routed


class Holds:
    """The calls that are held now, oldest first; `total` counts all that ever were."""

    def __init__(self, errnos: Errnos, flow_index: FlowIndex) -> None:
        self.errnos = errnos
        self.calls: dict[Call, CallMade] = {}
        self.total = 0
        self._flow_index = flow_index
        # Dicts to None are ordered sets.
        self._by_flow: dict[Flow, dict[Call, None]] = {}
        self._child_of: dict[Flow, ChildName | None] = {}  # that each flow waits for
        self._by_child: dict[ChildName | None, dict[Flow, None]] = {}
        self._idle: dict[Flow, None] = {}  # flows without a negotiation
        self._due: dict[Flow, None] = {}  # flows to evaluate again

    # --- calls ------------------------------------------------------------------------

    def is_waiting(self, flow: Flow) -> bool:
        """Tell whether calls for a flow are held, and one more waits for the same negotiation."""
        return flow in self._by_flow and flow not in self._due and flow not in self._idle

    def join(self, made: CallMade) -> do.Command:
        """Hold a call for a flow that others are held for."""
        self.calls[made.call] = made
        self._by_flow[made.flow][made.call] = None
        self.total += 1
        return do.Hold(made)

    def take(self, made: CallMade, now: Evaluation) -> do.Command:
        """Answer or hold a call whose flow was just evaluated."""
        if now.state not in WAITING:
            return self._answer(made.call, now.state)
        self._wait(made.flow, now)
        return self.join(made)

    def ended(self, event: CallExpired | CallInterrupted | CallGone) -> list[do.Command]:
        """Release one call that cannot wait any longer."""
        made = self.calls.pop(event.call, None)
        if made is None:
            return []  # answered a moment ago
        del self._by_flow[made.flow][event.call]
        if not self._by_flow[made.flow]:
            self._remove(made.flow)
        match event:
            case CallExpired():
                held = f"{made.flow} was held for {made.limit:.1f} s, and failed"
                log = do.Log("warning", f"thread {made.pid}: {held}", about=held)
                return [do.Answer(event.call, self.errnos.hold_timeout), log]
            case CallInterrupted():
                # The kernel runs the signal handler and makes the same call again.
                return [do.Answer(event.call, ERESTARTNOINTR)]
            case CallGone():
                return []

    def child_of(self, flow: Flow) -> ChildName | None:
        """Return the child that a held flow waits for, None if none is chosen."""
        return self._child_of.get(flow)

    # --- flows to evaluate again ----------------------------------------------------------

    def recheck_all(self) -> None:
        """Mark every flow due."""
        self._due.update(dict.fromkeys(self._by_flow))

    def recheck_flows(self, flows: Iterable[Flow]) -> None:
        """Mark those of these flows due that calls are held for."""
        self._due.update((flow, None) for flow in flows if flow in self._by_flow)

    def recheck_children(self, names: Iterable[ChildName]) -> None:
        """Mark the flows due that wait for one of these children."""
        for name in names:
            self._due.update(self._by_child.get(name, {}))

    def recheck_idle(self) -> None:
        """Mark the flows due that have no negotiation."""
        self._due.update(self._idle)

    @property
    def has_due(self) -> bool:
        """Tell whether flows are still to be evaluated again."""
        return bool(self._due)

    def take_due(self) -> list[Flow]:
        """Return the next slice of due flows; evaluate each and call `update`."""
        flows, calls = list[Flow](), 0
        for flow in islice(self._due, FLOWS_PER_STEP):
            flows.append(flow)
            calls += len(self._by_flow[flow])
            if calls >= CALLS_PER_STEP:
                break
        for flow in flows:
            del self._due[flow]
        return flows

    def update(self, flow: Flow, now: Evaluation) -> list[do.Command]:
        """Apply a due flow's evaluation: answer a slice of its calls, or let them wait on."""
        if now.state in WAITING:
            self._wait(flow, now)
            return []
        calls = list(islice(self._by_flow[flow], CALLS_PER_STEP))
        for call in calls:
            del self.calls[call], self._by_flow[flow][call]
        if self._by_flow[flow]:
            self._due[flow] = None  # for the rest of them, if it is still so
        else:
            self._remove(flow)
        return [self._answer(call, now.state) for call in calls]

    # --- indexes --------------------------------------------------------------------------

    def _wait(self, flow: Flow, now: Evaluation) -> None:
        if flow not in self._by_flow:
            self._by_flow[flow] = {}
            self._flow_index.add(flow, now.routed.lookups)
        elif now.child != self._child_of[flow]:
            self._leave_child(flow)
        self._due.pop(flow, None)
        self._child_of[flow] = now.child
        self._by_child.setdefault(now.child, {})[flow] = None
        if now.state is FlowState.IDLE:
            self._idle[flow] = None
        else:
            self._idle.pop(flow, None)

    def _leave_child(self, flow: Flow) -> None:
        child = self._child_of.pop(flow)
        del self._by_child[child][flow]
        if not self._by_child[child]:
            del self._by_child[child]

    def _remove(self, flow: Flow) -> None:
        self._leave_child(flow)
        del self._by_flow[flow]
        self._due.pop(flow, None)
        self._idle.pop(flow, None)
        self._flow_index.discard(flow)

    def _answer(self, call: Call, state: FlowState) -> do.Command:
        return do.Answer(call, self.errnos.failed if state is FlowState.FAILED else None)
