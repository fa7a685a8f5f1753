"""The work done for one event, counted: it must not grow with unrelated policies and calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address, ip_network
from random import Random
from typing import Any, cast

import pytest

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.coverage import Coverage
from ipsecgate.core.gate.holds import CALLS_PER_STEP, FLOWS_PER_STEP
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import FlowPath, Selector, TrafficSelector
from ipsecgate.core.model.ipsec import ESP, ChildConfig, ChildName, ChildSa, SaId, SpdKey
from ipsecgate.core.model.policy import Policy, Settings
from ipsecgate.core.model.problem import Cause, Problem
from tests.unit.transcript import FLOW, HERE, NET, REFUSED, SA, TRAP, Transcript, initiated

MANY = 200
PEERS = [ip_network((int(ip_address("10.2.0.0")) + (n << 8), 24)) for n in range(MANY)]


def flow(number: int, host: int = 9) -> Any:
    return replace(FLOW, daddr=PEERS[number][host])


def child(number: int) -> ChildConfig:
    return replace(
        NET, name=ChildName("peer", f"net-{number}"), remote=(TrafficSelector(PEERS[number]),)
    )


def trap(number: int, spi: int = 0) -> Any:
    template = replace(TRAP.templates[0], reqid=number + 1, spi=spi)
    return replace(TRAP, key=SpdKey(Selector(HERE, PEERS[number])), templates=(template,))


def up(number: int) -> tuple[on.XfrmEvent, on.XfrmEvent]:
    spi = 0x1000 + number
    sa = replace(SA, id=SaId(SA.id.daddr, spi, ESP), reqid=number + 1)
    return on.SaSet(sa), on.PolicySet(trap(number, spi))


class Spied(Transcript):
    """A gate with many policies that counts its calls of expensive functions."""

    def __init__(self) -> None:
        policies = tuple(Policy(f"p{n}", (network,)) for n, network in enumerate(PEERS))
        super().__init__(Settings(policies=policies))
        source = ip_address("10.1.0.1")
        self.after(
            on.KernelSnapshot(tuple(map(trap, range(MANY))), ()),
            on.IkeConnected(tuple(map(child, range(MANY))), (), 42),
            on.PathsResolved(tuple((network, FlowPath(source)) for network in PEERS)),
        )
        self.done: Counter[str] = Counter()

    def spy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for owner, name in (
            (self.gate.demand, "evaluate"),
            (self.gate.protection, "is_live"),
            (self.gate.policy_table, "publish"),
            (self.gate.policy_table, "publish_errnos"),
            (self.gate.negotiations, "coverages"),
        ):
            monkeypatch.setattr(owner, name, self.counting(name, getattr(owner, name)))
        monkeypatch.setattr(
            TrafficSelector, "contains", self.counting("contains", TrafficSelector.contains)
        )

    def counting(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            self.done[name] += 1
            return real(*args, **options)

        return counted


@pytest.fixture
def busy() -> Spied:
    """A negotiation with each of the peers, and one held call for each."""
    transcript = Spied()
    for number in range(MANY):
        call = on.CallMade(on.Call(1, number), flow(number), pid=number + 1, limit=30.0)
        assert len(initiated(transcript.after(call))) == 1
    return transcript


def test_a_kernel_event_reevaluates_only_the_calls_and_children_of_its_peer(
    busy: Spied, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy.spy(monkeypatch)
    commands = busy.after_together(*up(7))
    assert [c.call.id for c in commands if isinstance(c, do.Answer)] == [7]
    assert busy.done["evaluate"] == 1
    assert 1 <= busy.done["is_live"] <= 4
    assert busy.done["coverages"] == 1
    assert not busy.done["publish"]
    assert not busy.done["publish_errnos"]
    busy.done.clear()
    (closing, *_) = busy.after_together(on.SaGone(up(7)[0].sa.id))  # type: ignore[union-attr]
    assert isinstance(closing, do.Change)
    assert busy.done["evaluate"] == 0
    assert 1 <= busy.done["is_live"] <= 4


def test_a_failure_reevaluates_only_the_calls_of_its_child(
    busy: Spied, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy.spy(monkeypatch)
    commands = busy.after(on.NegotiationFailed(ChildName("peer", "net-9"), Cause("no")))
    assert [c.call.id for c in commands if isinstance(c, do.Answer)] == [9]
    assert busy.done["evaluate"] == 1
    assert busy.done["coverages"] == 1


def test_a_refusal_costs_the_same_with_any_number_of_policies(
    busy: Spied, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy.spy(monkeypatch)
    for host in range(1, 101):
        busy.after(replace(REFUSED, flow=flow(5, host)))
    assert not busy.done["publish"]
    assert not busy.done["publish_errnos"]
    assert busy.done["coverages"] <= 100
    assert 100 <= busy.done["contains"] <= 100 * 4
    assert busy.done["evaluate"] == 0


def test_many_calls_for_one_flow_are_evaluated_once_in_a_step(
    busy: Spied, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy.spy(monkeypatch)
    for number in range(500):
        call = on.CallMade(on.Call(2, number), flow(3), pid=number + 1, limit=30.0)
        assert busy.after(call) == [do.Hold(call)]
    assert busy.done["evaluate"] <= 1
    busy.done.clear()
    steps = [busy.after_together(*up(3))]
    while busy.gate.holds.has_due:
        steps.append(busy.after_together())
    answers = [sum(isinstance(c, do.Answer) for c in commands) for commands in steps]
    assert answers == [CALLS_PER_STEP, 501 - CALLS_PER_STEP]
    assert busy.done["evaluate"] == len(steps)


def test_a_change_that_affects_every_call_is_worked_off_in_slices(
    busy: Spied, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy.spy(monkeypatch)
    busy.after(
        on.PathsResolved(tuple((network, FlowPath(ip_address("10.1.0.2"))) for network in PEERS))
    )
    assert busy.done["evaluate"] == FLOWS_PER_STEP
    evaluated = FLOWS_PER_STEP
    while busy.gate.holds.has_due:
        busy.done.clear()
        busy.after_together()
        evaluated += busy.done["evaluate"]
        assert busy.done["evaluate"] <= FLOWS_PER_STEP
    assert evaluated == MANY


def test_many_children_in_one_batch_update_the_table_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a peer that rekeys without a pause has the table updated for each SA."""
    transcript = Spied()
    listed = ChildSa(ChildName("peer", "net-1"), 2, 1, 2, SA.id.daddr)
    table = transcript.gate.protection.spd_table
    monkeypatch.setattr(table, "update", transcript.counting("spd", table.update))
    transcript.after_together(*(on.ChildUp(replace(listed, spi_out=n)) for n in range(1, 50)))
    assert transcript.done["spd"] == 1


def test_a_list_of_sas_without_changes_updates_no_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A refused flow that no child protects makes the gate ask the daemon twenty times a second."""
    transcript = Spied()
    table = transcript.gate.protection.spd_table
    monkeypatch.setattr(table, "update", transcript.counting("spd", table.update))
    loaded = on.IkeConnected(tuple(map(child, range(MANY))), (), 42)
    listed = ChildSa(ChildName("peer", "net-1"), 2, 1, 2, SA.id.daddr)
    for seen, established in ((0, ()), (1, (listed,)), (1, (listed,)), (2, ())):
        transcript.after(replace(loaded, established=established))
        assert transcript.done["spd"] == seen
    transcript.after(on.IkeGone(Problem("restarted")), loaded)
    assert transcript.done["spd"] == 4


def test_skipping_unaffected_calls_and_children_never_leaves_a_stale_state() -> None:
    """Random events in random order: everything that was not re-evaluated had not changed."""
    covered = negotiated = held = 0
    for seed in range(30):
        random = Random(seed)
        transcript = Spied()
        for number in range(150):
            transcript.after(*random_events(random, number))
            while transcript.gate.holds.has_due:
                transcript.after_together()
            gate = transcript.gate
            for item in gate.negotiations.by_child.values():
                live = gate.protection.is_live(item.flow)
                assert live == (item.coverage is Coverage.COVERED), (seed, number)
                covered += live
                negotiated += 1
            for made in gate.holds.calls.values():
                found = gate.policy_table.policy_for(made.flow)
                assert found is not None
                assert not gate.protection.is_live(made.flow), (seed, number)
                source = gate.protection.routing.route(made.flow).last.saddr
                configs = gate.ike.loaded.children_for(made.flow, source, found[1])
                item_ = gate.negotiations.by_child.get(configs[0].name) if configs else None
                assert item_ is None or item_.coverage is not Coverage.BACK_OFF, (seed, number)
                held += item_ is not None
    assert min(covered, negotiated - covered, held) > 500, "each case occurred often"


def random_events(random: Random, number: int) -> list[on.Event]:
    """Return random events about the first few peers."""
    peer = random.randrange(6)
    name = child(peer).name
    loaded = tuple(child(n) for n in range(6) if n != random.randrange(12))
    sources = ("10.1.0.1", "10.1.0.2", "10.9.9.9")
    call = on.CallMade(on.Call(1, number), flow(peer, random.randrange(1, 5)), 1, 30.0)
    narrow = replace(trap(peer, 0x2000 + peer), priority=1)
    narrow = replace(narrow, key=SpdKey(Selector(HERE, ip_network((PEERS[peer][0], 30)))))
    return random.choice(
        cast(Any, (
            [call], [call], [call],
            [replace(REFUSED, flow=flow(peer, random.randrange(1, 5)), policy=peer)],
            list(up(peer)), list(up(peer)),
            [on.SaGone(up(peer)[0].sa.id)],  # type: ignore[union-attr]
            [on.PolicySet(trap(peer))], [on.PolicyGone(trap(peer).key)],
            [on.PolicySet(narrow)], [on.PolicyGone(narrow.key)],
            [on.NegotiationFailed(name, Cause("no"))],
            [on.TimerFired(on.Timer(random.choice(("retry", "limit")), name))],
            [on.NegotiationDone(name)],
            [on.IkeConnected(loaded, (), 42)],
            [on.IkeGone(Problem("restarted")), on.IkeConnected(loaded, (), 42)],
            [on.PathsResolved(
                tuple((one, FlowPath(ip_address(random.choice(sources)))) for one in PEERS[:6])
            )],
            [on.CallExpired(on.Call(1, random.randrange(number + 1)))],
            [on.KernelSnapshot(tuple(map(trap, range(6))), ())],
        ))
    )  # fmt: skip
