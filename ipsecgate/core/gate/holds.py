"""Who waits for what: system calls held until the flow they ask for is covered.

    CallMade -> free? answered at once         not ours, exempt, or covered
                IKE failed? an errno, at once
                else held                      Hold: until its limit

    what it waits for changes -> it is looked at again, in the same way, a slice at a time

Rules of this module: what happens costs nothing for calls that it does not concern, and all
calls for one flow are one; an answer opens nothing, the hooks look again; a call is only
told to go on after the tables were written, so `Answer` follows them; no call is
answered with what a client takes for success or for "wait" (EAGAIN, EINTR,
EINPROGRESS).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice

from ipsecgate.core.codec.seccomp import ERESTARTNOINTR
from ipsecgate.core.gate import commands as do
from ipsecgate.core.model.events import (
    Call,
    CallEvent,
    CallExpired,
    CallGone,
    CallInterrupted,
    CallMade,
)
from ipsecgate.core.model.flow import Flow
from ipsecgate.core.model.ipsec import ChildName
from ipsecgate.core.model.policy import Errnos
from ipsecgate.core.tables.flow_index import FlowIndex

FREE_FLOWS = 4096  # that are remembered


class FlowState(Enum):
    """What a flow can expect."""

    FREE = "no SA is needed, or it is there"
    PENDING = "an SA may come: it is being negotiated"
    IDLE = "an SA may come, but nothing is under way"
    FAILED = "IKE failed"


SLICE = 16  # flows that are looked at in one step

Look = Callable[[Flow], tuple[list[do.Command], FlowState, ChildName | None]]
"""Tell what a flow can expect, what to do about it, and which child it waits for, if any."""

WAITING = (FlowState.PENDING, FlowState.IDLE)


@dataclass
class Holds:
    """The calls that are held now, oldest first; `total` counts those that ever were."""

    errnos: Errnos
    look: Look
    flow_index: FlowIndex
    of: dict[Call, CallMade] = field(default_factory=dict)
    total: int = 0
    _free: set[Flow] = field(default_factory=set)  # that were seen to be, until anything happens
    _calls: dict[Flow, dict[Call, None]] = field(default_factory=dict)  # that are held
    _waits: dict[Flow, ChildName | None] = field(
        default_factory=dict
    )  # for which child each is held
    _for: dict[ChildName | None, dict[Flow, None]] = field(
        default_factory=dict
    )  # the same, by child
    _idle: dict[Flow, None] = field(default_factory=dict)  # for which nothing is under way
    _due: dict[Flow, None] = field(default_factory=dict)  # to be looked at again

    def is_free(self, flow: Flow) -> bool:
        """Tell whether `step` would let a call for this flow go on, where that is known already.

        True only if the commands of every step were carried out.
        """
        return flow in self._free

    def forget(self) -> None:
        """Something happened: what was free may be so no more."""
        self._free.clear()

    def step(self, event: CallEvent) -> list[do.Command]:
        """Answer a call, or hold it; or take note that its time is over."""
        if not isinstance(event, CallMade):
            return self._ended(event)
        flow = event.flow
        asked: list[do.Command] = []
        if flow not in self._calls or flow in self._due or flow in self._idle:
            asked, state, name = self.look(flow)
            if state is FlowState.FREE and len(self._free) < FREE_FLOWS:
                self._free.add(flow)
            if state not in WAITING:
                return [*asked, self._answer(event.call, state)]
            self._wait(flow, state, name)
        self.of[event.call] = event
        self._calls[flow][event.call] = None
        self.total += 1
        return [*asked, do.Hold(event)]

    # --- what concerns which ----------------------------------------------------------

    def all_may(self) -> None:
        """Look at every flow again, by and by."""
        self._due.update(dict.fromkeys(self._calls))

    def these_may(self, flows: Iterable[Flow]) -> None:
        """Look at these again, as far as a call for them is held."""
        self._due.update((flow, None) for flow in flows if flow in self._calls)

    def negotiations_moved(self, names: Iterable[ChildName]) -> None:
        """Look at the flows again that wait for these children."""
        for name in names:
            self._due.update(self._for.get(name, {}))

    def idle_may(self) -> None:
        """Look at the flows again for which nothing is under way."""
        self._due.update(self._idle)

    @property
    def unsettled(self) -> bool:
        """Tell whether a flow is to be looked at again."""
        return bool(self._due)

    def settle(self) -> list[do.Command]:
        """Look at a slice of those, and answer the calls that need not wait any more."""
        told: list[do.Command] = []
        for flow in list(islice(self._due, SLICE)):
            del self._due[flow]
            commands, state, name = self.look(flow)
            # The daemon is looked at every so often: what it has loaded now, it told.
            told.extend(c for c in commands if not isinstance(c, do.AskIke))
            if state in WAITING:
                self._wait(flow, state, name)
                continue
            for call in self._calls[flow]:
                del self.of[call]
                told.append(self._answer(call, state))
            self._forget(flow)
        return told

    def _wait(self, flow: Flow, state: FlowState, name: ChildName | None) -> None:
        if flow not in self._calls:
            self._calls[flow] = {}
            self.flow_index.add(flow)
        elif name != self._waits[flow]:
            self._leave(flow)
        self._waits[flow] = name
        self._for.setdefault(name, {})[flow] = None
        if state is FlowState.IDLE:
            self._idle[flow] = None
        else:
            self._idle.pop(flow, None)

    def _leave(self, flow: Flow) -> None:
        name = self._waits.pop(flow)
        del self._for[name][flow]
        if not self._for[name]:
            del self._for[name]

    def _forget(self, flow: Flow) -> None:
        self._leave(flow)
        del self._calls[flow]
        self._due.pop(flow, None)
        self._idle.pop(flow, None)
        self.flow_index.discard(flow)

    def _ended(self, event: CallExpired | CallInterrupted | CallGone) -> list[do.Command]:
        """A held call's time is over, for one reason or another."""
        made = self.of.pop(event.call, None)
        if made is None:
            return []  # answered in the same moment
        del self._calls[made.flow][event.call]
        if not self._calls[made.flow]:
            self._forget(made.flow)
        match event:
            case CallExpired():
                late = f"thread {made.pid}: {made.flow} was held for {made.limit:.1f} s, and failed"
                return [do.Answer(event.call, self.errnos.hold_timeout), do.Log("warning", late)]
            case CallInterrupted():
                return [do.Answer(event.call, ERESTARTNOINTR)]  # it calls again
            case CallGone():
                return []

    def _answer(self, call: Call, state: FlowState) -> do.Command:
        return do.Answer(call, self.errnos.failed if state is FlowState.FAILED else None)
