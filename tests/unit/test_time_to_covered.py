"""How long refused flows wait for an SA: which flows are reported as covered, and when."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest

from ipsecgate.controller.time_to_covered import BOUNDS, TimesToCovered
from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.refused_flows import FLOWS, PER_POLICY, RefusedFlows
from ipsecgate.core.model import events as on
from ipsecgate.core.model.policy import Settings
from ipsecgate.core.tables.flow_index import FlowIndex
from tests.unit.transcript import (
    FLOW,
    LISTED,
    NAME,
    REFUSED,
    SA,
    SOURCES,
    TRAP,
    UP,
    Transcript,
    connected,
)


def covered(commands: list[do.Command]) -> list[do.Covered]:
    return [command for command in commands if isinstance(command, do.Covered)]


def test_a_flow_is_reported_once_with_its_first_refusal_after_the_hooks_have_its_sa(
    trapped: Transcript,
) -> None:
    first, again = replace(REFUSED, at=100.0), replace(REFUSED, at=101.0)
    other_port = replace(REFUSED, flow=replace(FLOW, sport=40000), at=102.0)
    assert covered(trapped.after(first, again, other_port)) == []
    commands = trapped.after_together(*UP)
    assert covered(commands) == [do.Covered(FLOW, "peer/net", 100.0, NAME, SA)]
    written = next(n for n, one in enumerate(commands) if isinstance(one, do.Change))
    assert written < commands.index(covered(commands)[0])
    assert covered(trapped.after(*UP)) == []


def test_a_flow_that_loses_its_sa_is_reported_again(trapped: Transcript) -> None:
    trapped.after(replace(REFUSED, at=1.0), *UP, on.SaGone(SA.id))
    assert len(trapped.gate.refused) == 0
    assert covered(trapped.after(replace(REFUSED, at=9.0))) == []
    assert [one.at for one in covered(trapped.after(*UP))] == [9.0]


def test_a_refusal_that_is_read_after_its_sa_came_is_reported_at_once(trapped: Transcript) -> None:
    trapped.after(*UP)
    assert [one.flow for one in covered(trapped.after(REFUSED))] == [FLOW]


def test_an_sa_that_the_daemon_confirms_later_counts_then() -> None:
    transcript = Transcript()
    transcript.after(on.KernelSnapshot((TRAP,), (SA,)), connected(), SOURCES)
    assert covered(transcript.after(replace(REFUSED, at=1.0))) == []
    assert [one.at for one in covered(transcript.after(connected(LISTED)))] == [1.0]


def test_flows_that_no_policy_protects_wait_for_nothing() -> None:
    transcript = Transcript(Settings(deny=True))
    transcript.after(connected())
    elsewhere = replace(FLOW, daddr=ip_address("198.51.100.1"))
    transcript.after(replace(REFUSED, flow=elsewhere, policy=None))
    assert len(transcript.gate.refused) == 0


def test_many_flows_wait_within_limits() -> None:
    flows = RefusedFlows(FlowIndex())
    for policy in range(2 * FLOWS // PER_POLICY):
        for number in range(2 * PER_POLICY):
            flow = replace(FLOW, dport=1 + number, mark=policy)
            if flows.takes(flow, str(policy)):
                flows.add(replace(REFUSED, flow=flow), str(policy), (flow,))
    assert len(flows) == FLOWS
    seen = set()
    while flows.has_due:
        for refusal in flows.take_due():
            seen.add(refusal.flow.mark)
            flows.discard(refusal.flow)
    assert len(flows) == 0
    assert seen == set(range(FLOWS // PER_POLICY, 2 * FLOWS // PER_POLICY)), "the latest"


def test_each_time_is_in_its_bucket_and_all_above() -> None:
    times = TimesToCovered()
    for port, seconds in enumerate((0.0, BOUNDS[0], BOUNDS[0] + 1e-6, 1000.0), 1):
        assert times.add(do.Covered(replace(FLOW, dport=port), "db", 0.0), seconds)
    assert times.add(do.Covered(replace(FLOW, dport=9), "gone", 0.0), 1.0)
    (histogram,) = times.document({"db", "web"})
    assert histogram["policy"] == "db"
    assert histogram["buckets"][0] == [BOUNDS[0], 2]
    assert histogram["buckets"][1] == [BOUNDS[1], 3]
    assert histogram["buckets"][-1] == [BOUNDS[-1], 3]
    assert histogram["count"] == 4
    assert histogram["sum"] == pytest.approx(1000.02, abs=1e-5)
    assert [one["policy"] for one in times.document({"db", "gone"})] == ["db"], "forgotten"


def test_a_refusal_that_is_read_after_its_flow_was_covered_counts_no_second_time() -> None:
    times = TimesToCovered()
    assert times.add(do.Covered(FLOW, "db", 1.0), 2.0)
    assert not times.add(do.Covered(replace(FLOW, sport=40000), "db", 1.9), 2.1)
    assert times.add(do.Covered(FLOW, "db", 5.0), 6.0), "its SA went, and another came"
    (histogram,) = times.document({"db"})
    assert (histogram["count"], histogram["sum"]) == (2, 2.0)
    for port in range(1000, 1000 + FLOWS):
        times.add(do.Covered(replace(FLOW, dport=port), "db", 7.0), 8.0)
    assert times.add(do.Covered(FLOW, "db", 5.5), 9.0), "forgotten"
