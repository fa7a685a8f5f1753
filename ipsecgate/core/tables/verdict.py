"""Whether the kernel would send a flow protected, by the SPD table: follow() of decision.bpf.c."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ipsecgate.core.model.flow import Flow
from ipsecgate.core.tables.layout import Reason, State

StateOf = Callable[[Flow], State | None]
"""Returns what the SPD table says of a flow; None: no entry."""


def verdict(lookups: Sequence[Flow], state_of: StateOf, *, derived: bool, tunneled: bool) -> Reason:
    """Return the verdict on a flow that must be protected, from the flows that the kernel looks up.

    There are one or two. A policy that matches the first decides, unless the source is translated
    before the second. `derived`: the flow's policy was derived from a connection, so a kernel
    policy without templates exempts it. `tunneled`: the second is that of a tunnel device, which
    drops such flows.
    """
    *first, last = lookups
    for flow in first:
        state, translated = state_of(flow), flow.saddr != last.saddr
        if state is State.LIVE and not translated:
            return Reason.ALLOW_COVERED
        if state is State.DEAD:
            return Reason.REFUSE_UNCOVERED
    state = state_of(last)
    if state is State.LIVE:
        return Reason.ALLOW_COVERED
    if state is State.PASS and derived and not tunneled:
        return Reason.ALLOW_PASSED
    return Reason.REFUSE_UNCOVERED
