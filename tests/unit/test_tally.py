"""The counts of what was refused, by policy and by cgroup."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

from ipsecgate.controller.tally import CGROUPS, Tally
from ipsecgate.core.model.events import FlowRefused
from ipsecgate.core.model.flow import TCP, Flow
from ipsecgate.core.model.policy import Policy
from ipsecgate.core.tables.layout import Reason

FLOW = Flow(IPv4Address("10.2.0.5"), TCP, 5432)
POLICIES = tuple(Policy(name, (IPv4Network("10.2.0.0/16"),)) for name in ("db", "web"))


def event(policy: int | None, cgroup: int, reason: Reason, untold: int = 0) -> FlowRefused:
    packet = reason.name.startswith("BLOCK")
    comm = "" if packet else "curl"
    return FlowRefused(FLOW, reason, policy, 0 if packet else 7, comm, cgroup, untold=untold)


def test_refusals_count_for_their_policy_and_their_cgroup() -> None:
    tally = Tally()
    for policy, cgroup, reason, untold in (
        (0, 1, Reason.REFUSE_UNCOVERED, 0),
        (0, 2, Reason.REFUSE_UNCOVERED, 9),  # nine more that were not reported
        (1, 2, Reason.BLOCK_CLEAR, 2),
        (None, 1, Reason.REFUSE_DEFAULT, 0),
        (5, 1, Reason.REFUSE_DEFAULT, 0),  # a place of an older table
    ):
        tally.refusal(event(policy, cgroup, reason, untold), POLICIES)
    by_policy = {one["policy"]: one for one in tally.by_policy({"db", "web"})}
    assert {n: (o["refused"], o["blocked"]) for n, o in by_policy.items()} == {
        "db": (11, 0),
        "web": (0, 3),
        None: (2, 0),
    }
    by_cgroup = tally.by_cgroup()
    assert [(o["cgroup_id"], o["refused"], o["blocked"]) for o in by_cgroup] == [
        (1, 3, 0),
        (2, 10, 3),
    ], "the last refused comes first"
    assert by_cgroup[1]["comm"] == "curl", "a packet has no process, so the last one is kept"
    assert by_cgroup[1]["policy"] == "web"


def test_what_is_gone_is_forgotten() -> None:
    tally = Tally()
    tally.refusal(event(0, 1, Reason.REFUSE_UNCOVERED), POLICIES)
    tally.refusal(event(None, 1, Reason.REFUSE_DEFAULT), POLICIES)
    assert [one["policy"] for one in tally.by_policy({"web"})] == [None]
    assert [one["policy"] for one in tally.by_policy({"db", "web"})] == [None]


def test_a_thousand_cgroups_take_no_more_space_than_some() -> None:
    tally = Tally()
    for cgroup in range(2 * CGROUPS):
        tally.refusal(event(0, cgroup, Reason.REFUSE_UNCOVERED), POLICIES)
        tally.refusal(event(0, 0, Reason.REFUSE_UNCOVERED), POLICIES)
    left = [one["cgroup_id"] for one in tally.by_cgroup()]
    assert len(left) == CGROUPS
    assert left[:2] == [0, 2 * CGROUPS - 1]
    assert next(iter(tally.by_policy({"db"})))["refused"] == 4 * CGROUPS
