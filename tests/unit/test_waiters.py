"""Clients that wait: they hear of the end, of progress, and disturb nobody."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from ipsecgate.admin.wait import Down, Waited, Wish
from ipsecgate.controller import waiters as module
from ipsecgate.controller.waiters import Waiters
from ipsecgate.core.gate import commands as do
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import TCP, Flow
from ipsecgate.core.model.problem import Cause, Problem
from ipsecgate.core.tables.layout import TableId
from ipsecgate.edges.host.control_server import Request
from ipsecgate.errors import GateError, UsageError
from tests.typed_document import mismatches
from tests.unit.transcript import FLOW, LISTED, NAME, SA, UP, Transcript, connected, initiated
from tests.until import until

LIMIT = 20.0
FAR = Wish({"10.2.0.9:80": [FLOW]})


class World:
    """A gate, and the part of the controller that passes its waiters' events on."""

    def __init__(self, transcript: Transcript) -> None:
        self.transcript = transcript
        self.waiters = Waiters(transcript.gate, self.put, self.execute)
        self.put_events: list[on.Event] = []
        self.executed: list[do.IkeCommand] = []

    def put(self, event: on.Event) -> None:
        self.put_events.append(event)

    async def execute(self, command: do.IkeCommand) -> None:
        self.executed.append(command)

    def after(self, *events: on.Event) -> list[do.Command]:
        commands = self.transcript.after(*events)
        self.waiters.stir()
        return commands

    async def wait(self, wish: Wish, limit: float = LIMIT, seen: str | None = None) -> Any:
        words = {"verb": "wait", **wish.words(), "limit": limit, "seen": seen}
        return await self.waiters.wait(Request(words, 1))


@asynccontextmanager
async def running(transcript: Transcript) -> AsyncIterator[World]:
    world = World(transcript)
    task = asyncio.create_task(world.waiters.run())
    try:
        yield world
    finally:
        task.cancel()


async def test_a_waiter_asks_for_the_sa_once_and_hears_of_it(trapped: Transcript) -> None:
    async with running(trapped) as world:
        task = asyncio.create_task(world.wait(FAR))
        await until(lambda: world.put_events)
        assert world.put_events == [on.Wanted(FLOW)]
        assert initiated(world.after(*world.put_events)) == [NAME]
        for _ in range(3):
            world.after(on.NegotiationDone(NAME))
            await asyncio.sleep(module.PAUSE * 1.5)
        assert len(world.put_events) == 1
        assert not task.done()
        world.after(*UP)
        answer = await task
        assert answer["covered"]
        assert [target["state"] for target in answer["targets"]] == ["covered"]
        assert len(world.waiters) == 0


async def test_the_document_has_its_declared_type(trapped: Transcript) -> None:
    async with running(trapped) as world:
        answer = await world.wait(Wish(FAR.flows, (str(NAME),), ("net",), every=True), limit=0)
        answer.pop("seen")
        assert len(answer["targets"]) == 4
        assert mismatches({**answer, "timed_out": True, "seconds": 0.0}, Waited) == []


async def test_the_time_is_over(trapped: Transcript) -> None:
    async with running(trapped) as world:
        trapped.after(on.Wanted(FLOW), on.NegotiationFailed(NAME, Cause("no proposal chosen")))
        answer = await world.wait(FAR, limit=0.2)
        (target,) = answer["targets"]
        assert (answer["covered"], target["state"]) == (False, "waiting")
        assert (target["negotiation"], target["attempts"]) == ("back-off", 1)
        assert "no proposal chosen" in target["cause"]
        assert not world.put_events, "it is in back-off"


async def test_progress_is_told_only_to_those_who_want_it(trapped: Transcript) -> None:
    async with running(trapped) as world:
        quiet = asyncio.create_task(world.wait(FAR))
        first = await world.wait(FAR, seen="")
        curious = asyncio.create_task(world.wait(FAR, seen=first["seen"]))
        await asyncio.sleep(module.PAUSE * 3)
        assert not curious.done(), "nothing has changed"
        world.after(on.Wanted(FLOW))
        second = await curious
        assert second["targets"][0]["negotiation"] == "negotiating"
        assert second["seen"] != first["seen"]
        assert not quiet.done()
        world.after(*UP)
        assert (await quiet)["covered"]


async def test_without_negotiation_nothing_is_asked_for(trapped: Transcript) -> None:
    async with running(trapped) as world:
        answer = await world.wait(Wish(FAR.flows, negotiate=False), limit=0.2)
        assert not answer["covered"]
        assert not world.put_events


async def test_what_can_never_be_covered_is_told_at_once(trapped: Transcript) -> None:
    async with running(trapped) as world:
        answer = await world.wait(Wish(names=("typo",)))
        assert [target["state"] for target in answer["targets"]] == ["never"]


async def test_nothing_counts_as_covered_before_the_hooks_know(trapped: Transcript) -> None:
    async with running(trapped) as world:
        task = asyncio.create_task(world.wait(FAR))
        await until(lambda: world.put_events)
        world.waiters.writing()
        trapped.after(*UP)
        await asyncio.sleep(module.PAUSE * 3)
        assert trapped.gate.protection.is_live(FLOW)
        assert not task.done()
        world.waiters.stir()
        assert (await task)["covered"]


async def test_no_policy_is_known_yet() -> None:
    transcript = Transcript()
    async with running(transcript) as world:
        answer = await world.wait(Wish(every=True), limit=0.1)
        assert not answer["covered"]
        assert "no policy is known yet" in answer["targets"][0]["cause"]
        task = asyncio.create_task(world.wait(Wish(every=True)))
        await asyncio.sleep(0)
        world.after(on.KernelSnapshot((), ()), connected())
        assert TableId.POLICY in transcript.gate.tables
        await asyncio.sleep(module.PAUSE * 2)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(world.waiters) == 0, "a client that is gone is forgotten"


async def test_a_thousand_waiters_take_a_tenth_of_the_time_at_most(
    trapped: Transcript, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits for a flow of its own, while the gate has something to do all the time."""
    rounds: list[tuple[float, float]] = []
    look = Waiters._round

    async def timed(waiters: Waiters) -> None:
        began = time.monotonic()
        await look(waiters)
        rounds.append((began, time.monotonic()))

    monkeypatch.setattr(Waiters, "_round", timed)
    async with running(trapped) as world:
        flows = [Flow(FLOW.daddr + at, TCP, 80) for at in range(1000)]
        wishes = [Wish({str(flow.daddr): [flow]}) for flow in flows]
        waits = [asyncio.create_task(world.wait(wish, module.LONGEST)) for wish in wishes]
        await asyncio.sleep(0)
        assert len(world.waiters) == 1000
        while len(rounds) < 2:
            world.waiters.stir()
            await asyncio.sleep(0.001)
        (began, ended), (again, _) = rounds
        assert again - ended >= 9 * (ended - began)
        assert set(world.put_events) == {on.Wanted(flow) for flow in flows}
        assert len(world.put_events) == 1000, "each is asked for once"
        world.after(*UP)
        assert all(answer["covered"] for answer in await asyncio.gather(*waits))


@pytest.mark.parametrize(
    "flow",
    [
        ["x", "nonsense", TCP, 80],
        ["x", "10.2.0.9", 999, 80],
        ["x", "10.2.0.9", TCP, 65536],
        ["x", "10.2.0.9", TCP, "80"],
        ["x", "10.2.0.9", TCP, [80]],
        ["x", 1, TCP],
        [],
        7,
    ],
)
async def test_a_nonsensical_request_ends_only_itself(trapped: Transcript, flow: object) -> None:
    async with running(trapped) as world:
        words = {**FAR.words(), "verb": "wait", "limit": float("nan"), "seen": None}
        with pytest.raises(UsageError, match="cannot read the request 'wait'"):
            await world.waiters.wait(Request({**words, "flows": [flow]}, 1))
        assert len(world.waiters) == 0
        assert not (await world.waiters.wait(Request(words, 1)))["covered"], "at once"


# --- down ---------------------------------------------------------------------------------------


async def down(world: World, name: str, limit: float = LIMIT) -> Down:
    return await world.waiters.down(Request({"verb": "down", "name": name, "limit": limit}, 1))


@pytest.mark.parametrize("name", ["net", "peer/net"])
async def test_down_ends_the_sas_and_waits_until_they_are_gone(
    trapped: Transcript, name: str
) -> None:
    trapped.after(*UP, on.ChildUp(LISTED))
    async with running(trapped) as world:
        task = asyncio.create_task(down(world, name))
        await until(lambda: world.executed)
        assert world.executed == [do.Terminate(NAME, LISTED.unique)]
        await asyncio.sleep(0.1)
        assert not task.done()
        world.after(on.SaGone(SA.id))
        found = await task
        assert mismatches(found, Down) == []
        assert [(sa["child"], sa["ended"]) for sa in found["sas"]] == [(str(NAME), True)]
        assert found["policies"] == [str(NAME)]


async def test_down_of_a_silent_peer_and_of_nothing(trapped: Transcript) -> None:
    async with running(trapped) as world:
        assert (await down(world, "net"))["sas"] == []
        trapped.after(*UP, on.ChildUp(LISTED))
        found = await down(world, "net", limit=0.1)
        assert [sa["ended"] for sa in found["sas"]] == [False]
        with pytest.raises(UsageError, match="is named typo"):
            await down(world, "typo")
        trapped.after(on.IkeGone(Problem("Connection refused")))
        with pytest.raises(GateError, match="Connection refused"):
            await down(world, "net")
