"""How the chaos tests judge held calls: each rule with a passing neighbour."""

from __future__ import annotations

import math
from ipaddress import ip_address

import pytest

from ipsecgate.lab.xfrm_events import XfrmEvent
from tests.chaos.held_calls import LAG, LIMIT, Call, count, judge
from tests.chaos.tally import TOLERANCE, Span, Tally, kernel_gaps, widen

GAP = (100.0, 110.0)


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        ((104.0, 111.0, ""), False),  # held until the SA was installed
        ((104.0, 105.0, ""), True),
        ((100.0 + LAG / 2, 101.5, ""), False),  # the controller may not know yet
        ((104.0, 109.0, "ETIMEDOUT"), False),
        ((90.0, 101.0, "EPERM"), False),
        ((90.0, 91.0, "EPERM"), True),
        ((120.0, 121.0, "EHOSTUNREACH"), True),
        ((130.0, 131.0, "EHOSTUNREACH"), False),  # right after a fault
        ((90.0, 91.0, ""), False),
    ],
)
def test_a_call_is_judged_by_the_gaps_in_the_kernels_coverage(call: Call, wrong: bool) -> None:
    tally = Tally()
    judge(tally, "sendto x", [call], [GAP], [(128.0, 132.0)])
    assert bool(tally.wrong) is wrong


HERE, THERE = ip_address("192.0.2.1"), ip_address("192.0.2.2")


def test_the_kernel_covers_from_the_policy_that_names_an_sa_until_either_is_gone() -> None:
    events = [
        XfrmEvent(1, "NEWPOLICY", True, HERE, THERE),  # a trap
        XfrmEvent(2, "NEWSA", True, HERE, THERE, 7),
        XfrmEvent(3, "UPDPOLICY", True, HERE, THERE, 7),
        XfrmEvent(4, "NEWSA", True, HERE, THERE, 8),  # a rekey
        XfrmEvent(5, "UPDPOLICY", True, HERE, THERE, 8),
        XfrmEvent(6, "DELSA", True, None, THERE, 7),
        XfrmEvent(7, "UPDPOLICY", True, HERE, THERE),  # the end: the trap again
        XfrmEvent(8, "DELSA", True, None, THERE, 8),
    ]
    ours = {(HERE, THERE)}
    assert kernel_gaps(events, 4, ours) == [(-math.inf, 3), (7, math.inf)]
    assert kernel_gaps(events, 6, ours) == [(-math.inf, math.inf)]


@pytest.mark.parametrize(
    ("pauses", "around"),
    [
        ([], (GAP[0] - TOLERANCE, GAP[1] + TOLERANCE)),
        ([(110.0, 110.3)], (GAP[0] - TOLERANCE, 110.3 + TOLERANCE)),
        ([(110.0, 110.3), (110.3, 110.5)], (GAP[0] - TOLERANCE, 110.5 + TOLERANCE)),
        ([(98.0, 99.0), (99.0, 100.0)], (98.0 - TOLERANCE, GAP[1] + TOLERANCE)),
        ([(97.0, 98.0), (102.0, 108.0), (111.0, 112.0)], (GAP[0] - TOLERANCE, GAP[1] + TOLERANCE)),
    ],
)
def test_a_pause_at_the_edge_of_a_gap_widens_it(pauses: list[Span], around: Span) -> None:
    assert widen([GAP], pauses) == [around]


def test_late_calls_and_unexpected_errors_are_counted() -> None:
    tally = Tally()
    count(tally, "sendto x", [(1.0, 2.0, ""), (2.0, 2.0, "EPERM")], 0.0, 1000.0)
    assert (tally.calls, tally.held, tally.late, tally.unexpected) == (2, 1, [], [])
    count(tally, "sendto x", [(1.0, 2.0 + LIMIT, "ENOSYS")], 0.0, 1000.0)
    assert len(tally.late) == 1
    assert tally.unexpected == ["sendto x: ENOSYS"]
    count(tally, "sendto x", [], 999.0, 1000.0)
    assert len(tally.late) == 1, "it is not late yet"
    count(tally, "sendto x", [], 500.0, 1000.0)
    assert len(tally.late) == 2
    away = [(99.0, 101.0), (110.0, 112.0)]
    count(tally, "sendto x", [(100.0, 102.0 + LIMIT, "")], 0.0, 1000.0, away)
    assert len(tally.late) == 2, "for three seconds no controller could answer"
    count(tally, "sendto x", [(100.0, 104.0 + LIMIT, "")], 0.0, 1000.0, away)
    assert len(tally.late) == 3
