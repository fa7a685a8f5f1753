"""Negotiations of the IKE client with a fake charon: how each ends, and which requests it costs."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import ANY

import pytest

from ipsecgate.core.model.events import (
    ChildUp,
    IkeGone,
    NegotiationDone,
    NegotiationFailed,
)
from ipsecgate.core.model.ipsec import ChildName
from ipsecgate.core.model.problem import Cause
from ipsecgate.edges.strongswan import negotiation
from ipsecgate.edges.strongswan.client import IkeClient
from tests.unit.fake_charon import (
    YES,
    FakeCharon,
    Section,
    Session,
    answering,
    next_events,
    no,
    streaming,
)
from tests.unit.vici_messages import SA, UP, ike_sa
from tests.until import until


async def negotiate(charon: FakeCharon, client: IkeClient, limit: float = 5) -> list[Section]:
    """Initiate, wait until the client is idle, and return its initiate requests."""
    await client.initiate(ChildName("gw", "net"), limit)
    await until(lambda: len(client._tasks) <= 1)
    return [asked for name, asked in charon.requests if name == "initiate"]


def quiet(client: IkeClient) -> bool:
    return client._events.empty()


async def test_a_successful_negotiation_costs_one_silent_request(
    charon: FakeCharon, client: IkeClient
) -> None:
    async def initiate(session: Session, _asked: Section) -> Section:
        session.charon.raise_event("child-updown", UP)
        return YES

    charon.handlers["initiate"] = initiate
    asked = await negotiate(charon, client)
    assert asked == [{"ike": "gw", "child": "net", "timeout": ANY, "loglevel": "-1"}]
    assert 0 < int(asked[0]["timeout"]) <= 5000
    assert [name for name, _ in charon.requests] == ["initiate"]
    assert await next_events(client, 2) == [ChildUp(SA), NegotiationDone(ChildName("gw", "net"))]
    assert quiet(client)


async def test_a_failed_negotiation_is_repeated_once_to_log_its_cause(
    charon: FakeCharon, client: IkeClient
) -> None:
    async def initiate(session: Session, _asked: Section) -> Section:
        if "control-log" in session.events:
            session.event("control-log", {"msg": "received TS_UNACCEPTABLE notify, no CHILD_SA"})
        return no("establishing CHILD_SA 'net' failed")

    charon.handlers["initiate"] = initiate
    silent, logged = await negotiate(charon, client)
    assert "loglevel" in silent
    assert "loglevel" not in logged
    (failed,) = await next_events(client)
    assert isinstance(failed, NegotiationFailed)
    assert failed.name == ChildName("gw", "net")
    assert failed.cause.text == "the peer accepts none of our traffic selectors"
    assert failed.cause.advice.startswith("compare local_ts and remote_ts")


async def test_a_negotiation_refused_with_a_reason_is_not_repeated(
    charon: FakeCharon, client: IkeClient
) -> None:
    reason = "CHILD_SA config 'net' not found"
    charon.handlers["initiate"] = answering(no(reason))
    await negotiate(charon, client)
    (failed,) = await next_events(client)
    assert isinstance(failed, NegotiationFailed)
    assert failed.cause == Cause(reason, "load the connection: `swanctl --load-conns`")


async def test_a_failure_whose_child_is_already_up_counts_as_done(
    charon: FakeCharon, client: IkeClient
) -> None:
    charon.handlers["list-sas"] = streaming("list-sa", ike_sa())
    charon.handlers["initiate"] = answering(no("establishing CHILD_SA 'net' failed"))
    assert len(await negotiate(charon, client)) == 1
    assert await next_events(client) == [NegotiationDone(ChildName("gw", "net"))]
    assert quiet(client)


async def test_the_success_of_another_child_is_a_failure_of_this_one(
    charon: FakeCharon, client: IkeClient
) -> None:
    charon.handlers["list-sas"] = streaming("list-sa", ike_sa(name=b"other"))
    charon.handlers["initiate"] = answering(YES)
    await negotiate(charon, client, limit=0.05)
    (failed,) = await next_events(client)
    assert isinstance(failed, NegotiationFailed)
    assert "within 0.05 s" in failed.cause.text


async def test_an_unanswered_negotiation_ends_at_the_limit_and_its_half_open_ike_sa_is_dropped(
    charon: FakeCharon, client: IkeClient
) -> None:
    half_open: dict[str, Any] = {"uniqueid": "9", "state": "CONNECTING", "initiator": "yes"}
    others = {"uniqueid": "8", "state": "ESTABLISHED", "initiator": "yes"}
    theirs = {"uniqueid": "7", "state": "CONNECTING"}
    charon.handlers["list-sas"] = streaming(
        "list-sa", {"gw": half_open}, {"gw": others}, {"gw": theirs}
    )
    charon.handlers["initiate"] = answering(no("CHILD_SA 'net' not established after 50ms"))
    await negotiate(charon, client, limit=0.05)
    (failed,) = await next_events(client)
    assert isinstance(failed, NegotiationFailed)
    assert "slow or silent" in failed.cause.text
    dropped = [asked for name, asked in charon.requests if name == "terminate"]
    assert dropped == [{"ike-id": "9", "force": "yes", "timeout": "-1"}]


async def test_a_late_failure_is_not_repeated(
    charon: FakeCharon, client: IkeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(negotiation, "DIAGNOSE_WITHIN", 0.0)
    charon.handlers["initiate"] = answering(no("establishing CHILD_SA 'net' failed"))
    await negotiate(charon, client)
    (failed,) = await next_events(client)
    assert isinstance(failed, NegotiationFailed)
    assert "silent" in failed.cause.text


async def test_the_attempt_after_a_late_failure_logs_its_cause(
    charon: FakeCharon, client: IkeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name server that does not answer keeps charon waiting for longer than that."""
    monkeypatch.setattr(negotiation, "DIAGNOSE_WITHIN", 0.0)

    async def initiate(session: Session, _asked: Section) -> Section:
        if "control-log" in session.events:
            session.event("control-log", {"msg": "unable to resolve gw.example, initiate aborted"})
        return no("establishing CHILD_SA 'net' failed")

    charon.handlers["initiate"] = initiate
    await negotiate(charon, client)
    first, second = await negotiate(charon, client)
    assert ("loglevel" in first, "loglevel" in second) == (True, False)
    causes = [event.cause for event in await next_events(client, 2)]  # type: ignore[union-attr]
    assert causes[1].text == "the peer's address gw.example can't be resolved"
    assert causes[1].unresolved == "gw.example"


async def test_only_a_few_negotiations_wait_inside_the_daemon(
    charon: FakeCharon, client: IkeClient
) -> None:
    async def initiate(_session: Session, asked: Section) -> Section:
        if asked["timeout"] == "-1":
            return YES
        await asyncio.sleep(60)
        return YES

    charon.handlers["initiate"] = initiate
    for number in range(10):
        await client.initiate(ChildName("gw", f"net-{number}"), 2)
    (failed,) = await next_events(client)
    assert isinstance(failed, NegotiationFailed)  # one that did not wait inside charon
    waits = [asked["timeout"] for name, asked in charon.requests if name == "initiate"]
    assert waits[negotiation.MAX_WAITING :] == ["-1"] * 6
    assert all(0 < int(limit) <= 2000 for limit in waits[: negotiation.MAX_WAITING])


async def test_the_daemon_may_end_during_a_negotiation(
    charon: FakeCharon, client: IkeClient
) -> None:
    async def initiate(session: Session, _asked: Section) -> Section:
        session.charon.die()
        return YES

    charon.handlers["initiate"] = initiate
    await client.initiate(ChildName("gw", "net"), 5)
    (first,) = await next_events(client)
    assert isinstance(first, IkeGone | NegotiationFailed)
    if isinstance(first, NegotiationFailed):
        assert "closed the connection" in first.cause.text
        (last,) = await next_events(client)
        assert isinstance(last, IkeGone)
