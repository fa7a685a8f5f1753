"""Judge the calls of a process whose calls are held (`held_sender`). For each call:

    it ends         within --hold, a handshake, and the time to restart a controller; the time
                    while the controller starts or is suspended does not count
    it succeeds     unless it lies within a gap in the kernel's coverage. The time while the
                    controller is suspended does not count, nor do the LAG seconds after that, or
                    after the gap has begun: it notices that late, and the backstop blocks what
                    it lets through
    it fails        only if it overlaps a gap, or a fault that does not keep coverage; with an error
                    from docs/holding.md, or one from the network

It never fails with ENOSYS: the listener is kept while controllers come and go.
"""

from __future__ import annotations

from collections.abc import Sequence

from tests.chaos.tally import Span, Tally, widen

KINDS = ("sendto", "associate", "connect")
HOLD = 8.0
LIMIT = HOLD + 2.0 + 15.0  # seconds
LAG = 2.0
ERRORS = {"EPERM", "EHOSTUNREACH", "ETIMEDOUT"}
NETWORK_ERRORS = {"ENETUNREACH"}
LONG = 0.1  # seconds: a call that took longer was held

Call = tuple[float, float, str]


def judge(
    tally: Tally,
    name: str,
    calls: Sequence[Call],
    gaps: Sequence[Span],
    disturbed: Sequence[Span],
    pauses: Sequence[Span] = (),
    suspended: Sequence[Span] = (),
) -> None:
    """Judge calls to a target that is covered except in `gaps`. `disturbed` excuses refusals.

    `suspended`: when the controller was.
    """
    near = widen([*gaps, *disturbed], pauses)
    inside = []
    for begin, end in gaps:
        late = [e for b, e in suspended if b <= end and begin <= e]
        inside.append((max(begin, *late, 0.0) + LAG, end))
    for began, ended, error in calls:
        if error and not any(begin <= ended and began <= end for begin, end in near):
            tally.wrong.append((f"held {name} {error}", began))
        if not error and any(begin <= began and ended <= end for begin, end in inside):
            tally.wrong.append((f"held {name} allowed in a gap", began))


def count(
    tally: Tally,
    name: str,
    calls: Sequence[Call],
    began: float,
    now: float,
    absent: Sequence[Span] = (),
) -> None:
    """Count the calls to any target. `began`: start of a call that is still under way, or 0.

    `absent`: when no controller could answer.
    """
    if began:
        calls = [*calls, (began, now, "")]
    longest = max((ended - began for began, ended, _ in calls), default=0.0)
    tally.longest = max(tally.longest, longest)
    served = max((_served(*call, absent) for call in calls), default=0.0)
    if served > LIMIT:
        tally.late.append(f"{name}: {longest:.1f} s, {served:.1f} s of them served")
    tally.calls += len(calls)
    tally.held += sum(ended - began > LONG for began, ended, _ in calls)
    errors = [error for _, _, error in calls if error]
    unexpected = set(errors) - ERRORS - NETWORK_ERRORS
    tally.unexpected += [f"{name}: {error}" for error in unexpected]
    tally.errors.update(f"held {name.split(maxsplit=1)[0]} {error}" for error in errors)


def _served(began: float, ended: float, _error: str, absent: Sequence[Span]) -> float:
    away = sum(max(0.0, min(ended, end) - max(began, begin)) for begin, end in absent)
    return ended - began - away
