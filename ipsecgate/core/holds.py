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
from ipsecgate.core.events import Call, CallExpired, CallGone, CallInterrupted, CallMade
from ipsecgate.core.flow import Flow
from ipsecgate.core.policy import Errnos
from ipsecgate.core.seccomp import ERESTARTNOINTR

HOLD = 30.0  # seconds that a call is held where nobody says otherwise
# Where the caller is not prepared to wait: a non-blocking socket's thread has other things
# to do, and getaddrinfo() tries each address by a UDP connect().
HOLD_IMPATIENT = 5.0


class Outlook(Enum):
    """What a flow can expect."""

    FREE = "no SA is needed, or it is there"
    PENDING = "an SA may come"
    FAILED = "IKE failed"


@dataclass
class Holds:
    """The calls that are held now, oldest first; `total` counts those that ever were."""

    errnos: Errnos
    of: dict[Call, CallMade] = field(default_factory=dict)
    total: int = 0

    def take(self, made: CallMade, outlook: Outlook) -> list[do.Command]:
        """Answer a call, or hold it."""
        if outlook is not Outlook.PENDING:
            return [self._answer(made.call, outlook)]
        self.of[made.call] = made
        self.total += 1
        return [do.Hold(made)]

    def settle(self, outlook: Callable[[Flow], Outlook]) -> list[do.Command]:
        """Answer the held calls that need not wait any more."""
        known = {flow: outlook(flow) for flow in {made.flow for made in self.of.values()}}
        done = [c for c, made in self.of.items() if known[made.flow] is not Outlook.PENDING]
        return [self._answer(call, known[self.of.pop(call).flow]) for call in done]

    def ended(self, event: CallExpired | CallInterrupted | CallGone) -> list[do.Command]:
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
