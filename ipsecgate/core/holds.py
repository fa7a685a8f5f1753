"""Who waits for what: system calls held until the flow they ask for is covered.

    CallMade -> free? answered at once         not ours, exempt, or covered
                IKE failed? an errno, at once
                else held                      Hold: until its limit

    anything that happens -> every held call is looked at again, in the same way

Rules of this module: an answer opens nothing, the hooks look again; a call is only
told to go on after the tables were written, so `Answer` follows them; no call is
answered with what a client takes for success or for "wait" (EAGAIN, EINTR,
EINPROGRESS).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from ipsecgate.core import commands as do
from ipsecgate.core.events import Call, CallEvent, CallExpired, CallGone, CallInterrupted, CallMade
from ipsecgate.core.flow import Flow
from ipsecgate.core.policy import Errnos
from ipsecgate.core.seccomp import ERESTARTNOINTR

HOLD = 30.0  # seconds that a call is held where nobody says otherwise
# Where the caller is not prepared to wait: a non-blocking socket's thread has other things
# to do, and getaddrinfo() tries each address by a UDP connect().
HOLD_IMPATIENT = 5.0
HOLD_LONGEST = 1e8  # three years: what is more, or not a number at all, no timer can have
FREE_FLOWS = 4096  # that are remembered


class Outlook(Enum):
    """What a flow can expect."""

    FREE = "no SA is needed, or it is there"
    PENDING = "an SA may come"
    FAILED = "IKE failed"


Look = Callable[[Flow], tuple[list[do.Command], Outlook]]
"""Tell what a flow can expect, and what to do about it."""


@dataclass
class Holds:
    """The calls that are held now, oldest first; `total` counts those that ever were."""

    errnos: Errnos
    look: Look
    of: dict[Call, CallMade] = field(default_factory=dict)
    total: int = 0
    _free: set[Flow] = field(default_factory=set)  # that were seen to be, until anything happens

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
        asked, outlook = self.look(event.flow)
        if outlook is Outlook.FREE and len(self._free) < FREE_FLOWS:
            self._free.add(event.flow)
        if outlook is not Outlook.PENDING:
            return [*asked, self._answer(event.call, outlook)]
        self.of[event.call] = event
        self.total += 1
        return [*asked, do.Hold(event)]

    def settle(self) -> list[do.Command]:
        """Look at every held call again, and answer those that need not wait any more."""
        asked: list[do.Command] = []
        known: dict[Flow, Outlook] = {}
        for flow in dict.fromkeys(made.flow for made in self.of.values()):
            commands, known[flow] = self.look(flow)
            # The daemon is looked at every so often: what it has loaded now, it told.
            asked.extend(c for c in commands if not isinstance(c, do.AskIke))
        done = [c for c, made in self.of.items() if known[made.flow] is not Outlook.PENDING]
        return [*asked, *(self._answer(call, known[self.of.pop(call).flow]) for call in done)]

    def _ended(self, event: CallExpired | CallInterrupted | CallGone) -> list[do.Command]:
        """A held call's time is over, for one reason or another."""
        made = self.of.pop(event.call, None)
        if made is None:
            return []  # answered in the same moment
        match event:
            case CallExpired():
                late = f"{made.flow} of {made.pid} was held for {made.limit:.1f} s"
                return [do.Answer(event.call, self.errnos.hold_timeout), do.Log("warning", late)]
            case CallInterrupted():
                return [do.Answer(event.call, ERESTARTNOINTR)]  # it calls again
            case CallGone():
                return []

    def _answer(self, call: Call, outlook: Outlook) -> do.Command:
        return do.Answer(call, self.errnos.failed if outlook is Outlook.FAILED else None)
