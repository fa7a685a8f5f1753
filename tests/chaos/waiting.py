"""What is held against a process whose calls are held (`waiter`): by each call, from its begin.

    it ends         within --hold, a handshake, and the time that it takes to have a controller
    it succeeds     not in a gap of the kernel's, unless it began with it: a controller that was
                    stopped needs a moment to hear, and the backstop has what slips through
    it fails        only if a gap, or a fault that does not keep, touches it; with an error that
                    docs/holding.md has, or the network's own

Never with ENOSYS: its listener is kept, whatever becomes of the controllers.
"""

from __future__ import annotations

from collections.abc import Sequence

from tests.chaos.tally import Span, Tally, spread

KINDS = ("sendto", "associate", "connect")
HOLD = 8.0
LIMIT = HOLD + 2.0 + 15.0  # seconds
LAG = 2.0
ERRORS = {"EPERM", "EHOSTUNREACH", "ETIMEDOUT"}
ERRORS_OF_THE_NETWORK = {"ENETUNREACH"}
LONG = 0.1  # seconds: what took so long was held

Call = tuple[float, float, str]


def judge(
    tally: Tally,
    name: str,
    calls: Sequence[Call],
    gaps: Sequence[Span],
    troubles: Sequence[Span],
    pauses: Sequence[Span] = (),
) -> None:
    """Judge the calls to what is covered but in the kernel's gaps."""
    near = spread([*gaps, *troubles], pauses)
    inside = [(begin + LAG, end) for begin, end in gaps]
    for began, ended, error in calls:
        if error and not any(begin <= ended and began <= end for begin, end in near):
            tally.wrong.append((f"held {name} {error}", began))
        if not error and any(begin <= began and ended <= end for begin, end in inside):
            tally.wrong.append((f"held {name} let go in a gap", began))


def take(tally: Tally, name: str, calls: Sequence[Call], began: float, now: float) -> None:
    """Take in any target's calls, and since when one is under way (0: none is)."""
    if began:
        calls = [*calls, (began, now, "")]
    longest = max((ended - began for began, ended, _ in calls), default=0.0)
    tally.longest = max(tally.longest, longest)
    if longest > LIMIT:
        tally.late.append(f"{name}: {longest:.1f} s")
    tally.calls += len(calls)
    tally.held += sum(ended - began > LONG for began, ended, _ in calls)
    errors = [error for _, _, error in calls if error]
    tally.strange += [f"{name}: {error}" for error in set(errors) - ERRORS - ERRORS_OF_THE_NETWORK]
    tally.errors.update(f"held {name.split(maxsplit=1)[0]} {error}" for error in errors)
