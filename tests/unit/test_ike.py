"""The IKE client against a fake charon with real VICI packets: events, commands, negotiations."""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from ipsecgate.core.codec.vici import ViciError
from ipsecgate.core.model.events import (
    ChildUp,
    IkeEvent,
    IkeGone,
    IkeUnread,
    IkeUp,
    NegotiationDone,
    NegotiationFailed,
)
from ipsecgate.core.model.ipsec import ChildName
from ipsecgate.edges.strongswan import negotiation, vici
from ipsecgate.edges.strongswan.client import IkeClient
from ipsecgate.edges.strongswan.vici import IkeRefusedError, IkeUnreachableError
from tests.unit.fake_charon import YES, FakeCharon, Handler, Section, Session, no
from tests.unit.vici_messages import CHILD, SA, conn, ike_sa
from tests.until import until

UP: Section = {"up": "yes", **ike_sa()}


def streaming(event: str, *messages: Section) -> Handler:
    async def handler(session: Session, _asked: Section) -> Section:
        for message in messages:
            session.event(event, message)
        return {}

    return handler


def answering(*answers: Section) -> Handler:
    left = list(answers)

    async def handler(_session: Session, _asked: Section) -> Section:
        return left.pop(0)

    return handler


@pytest.fixture
async def charon(tmp_path: Path) -> AsyncIterator[FakeCharon]:
    path = tmp_path / "vici"
    async with FakeCharon(path, list_sas=streaming("list-sa"), terminate=answering(YES)) as fake:
        yield fake


@pytest.fixture
async def client(charon: FakeCharon) -> AsyncIterator[IkeClient]:
    async with await IkeClient.connect(charon.path) as ike:
        yield ike


async def take(client: IkeClient, count: int = 1) -> list[IkeEvent]:
    found = []
    async with asyncio.timeout(30):
        async for event in client.events():
            found.append(event)
            if len(found) == count:
                break
    return found


async def test_configurations_and_sas_are_listed(charon: FakeCharon, client: IkeClient) -> None:
    charon.handlers["list-conns"] = streaming("list-conn", conn(), conn())
    charon.handlers["list-sas"] = streaming("list-sa", ike_sa())
    assert [config.name.child for config in await client.children()] == ["net", "net"]
    assert await client.established() == (SA,)
    assert client.daemon_pid == os.getpid()


async def test_the_first_kernel_plugin_shows_whether_esp_is_in_userspace(
    charon: FakeCharon, client: IkeClient
) -> None:
    with pytest.raises(IkeRefusedError):
        await client.userland()
    for first in (True, False):
        plugins = ["kernel-libipsec", "kernel-netlink"][:: 1 if first else -1]
        charon.handlers["stats"] = answering({"plugins": plugins})
        assert await client.userland() is first


async def test_events_arrive_in_order_and_then_the_end_of_the_connection(
    charon: FakeCharon, client: IkeClient
) -> None:
    charon.raise_event("ike-updown", UP)
    charon.raise_event("child-updown", UP)
    assert await take(client, 2) == [IkeUp("gw", 7), ChildUp(SA)]
    charon.die()
    (gone,) = await take(client)
    assert isinstance(gone, IkeGone)
    assert "closed the connection" in gone.reason
    with pytest.raises(IkeUnreachableError):
        await client.established()


async def test_a_child_that_cannot_be_parsed_does_not_affect_the_others(
    charon: FakeCharon, client: IkeClient
) -> None:
    odd = {"local-ts": ["10.0.0.0/8[nosuch/protocol]"]}
    charon.raise_event("child-updown", ike_sa(**odd))
    charon.raise_event("child-updown", UP)
    unread, up = await take(client, 2)
    assert isinstance(unread, IkeUnread)
    assert "nosuch" in unread.reason
    assert up == ChildUp(SA)

    both = ike_sa()
    both["gw"]["child-sas"]["odd-4"] = {**CHILD, **odd}
    charon.handlers["list-sas"] = streaming("list-sa", ike_sa(reqid=b"x"), both)
    assert await client.established() == (SA,)
    assert [reason.partition(":")[0] for reason in client.unread] == ["gw/net-3", "gw/odd-4"]
    charon.handlers["list-sas"] = streaming("list-sa", ike_sa())
    assert await client.established() == (SA,)
    assert client.unread == ()


@pytest.mark.parametrize(
    "packet", [b"", b"\x07", b"\x07\x05abc", b"\x07\x01a\x03\x01k\x00\x02v", b"\x07\x01a\x02"]
)
async def test_a_malformed_packet_ends_the_session(
    charon: FakeCharon, client: IkeClient, packet: bytes
) -> None:
    for session in charon.sessions:
        if session.events:
            session.send(packet)
    (gone,) = await take(client)
    assert isinstance(gone, IkeGone)


async def test_an_oversized_packet_ends_the_session(charon: FakeCharon, client: IkeClient) -> None:
    for session in charon.sessions:
        session.writer.write(struct.pack("!I", vici.MAX_PACKET + 1))
    (gone,) = await take(client)
    assert isinstance(gone, IkeGone)


async def test_without_a_daemon_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(IkeUnreachableError, match="No such file") as caught:
        await IkeClient.connect(tmp_path / "vici")
    assert "start strongSwan" in caught.value.hint


async def test_a_daemon_without_a_required_event_is_refused(charon: FakeCharon) -> None:
    charon.known.remove("child-rekey")
    with pytest.raises(IkeRefusedError, match="child-rekey"):
        await IkeClient.connect(charon.path)


async def test_a_refused_command_reports_the_reason(charon: FakeCharon, client: IkeClient) -> None:
    charon.handlers["terminate"] = answering(no("no matching SAs to terminate found"), YES, YES)
    with pytest.raises(IkeRefusedError, match="no matching SAs"):
        await client.terminate("gw")
    await client.terminate("gw", "net")  # the connection is still good
    assert charon.requests[-1] == ("terminate", {"ike": "gw", "child": "net", "timeout": "-1"})
    await client.terminate("gw", "net", 3)
    only = {"ike": "gw", "child": "net", "child-id": "3", "timeout": "-1"}
    assert charon.requests[-1] == ("terminate", only)
    with pytest.raises(IkeRefusedError, match="list-conns"):
        await client.children()


async def test_a_selector_with_unknown_ports_protects_the_whole_network(
    charon: FakeCharon, client: IkeClient
) -> None:
    child = {**CHILD, "remote-ts": ["10.2.0.0/16[tcp/nosuch-service]"]}
    message = conn(children={"net": child, "other": CHILD})
    charon.handlers["list-conns"] = streaming("list-conn", message)
    net, other = await client.children()
    assert [str(there.network) for there in net.remote] == ["10.2.0.0/16"]
    assert net.remote[0].ports == (0, 65535), "every port, as the service is unknown"
    assert other.remote[0].ports == (443, 443)
    assert ["nosuch-service" in reason for reason in client.unread] == [True]
    child["remote-ts"] = ["10.2.0.0/99[tcp/nosuch-service]"]
    charon.handlers["list-conns"] = streaming("list-conn", message)
    with pytest.raises(ViciError):
        await client.children()


# --- negotiations -------------------------------------------------------------------


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
    assert await take(client, 2) == [ChildUp(SA), NegotiationDone(ChildName("gw", "net"))]
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
    cause = "the peer accepts none of our traffic selectors"
    assert await take(client) == [NegotiationFailed(ChildName("gw", "net"), cause)]


async def test_a_negotiation_refused_with_a_reason_is_not_repeated(
    charon: FakeCharon, client: IkeClient
) -> None:
    reason = "CHILD_SA config 'net' not found"
    charon.handlers["initiate"] = answering(no(reason))
    await negotiate(charon, client)
    assert await take(client) == [NegotiationFailed(ChildName("gw", "net"), reason)]


async def test_a_failure_whose_child_is_already_up_counts_as_done(
    charon: FakeCharon, client: IkeClient
) -> None:
    charon.handlers["list-sas"] = streaming("list-sa", ike_sa())
    charon.handlers["initiate"] = answering(no("establishing CHILD_SA 'net' failed"))
    assert len(await negotiate(charon, client)) == 1
    assert await take(client) == [NegotiationDone(ChildName("gw", "net"))]
    assert quiet(client)


async def test_the_success_of_another_child_is_a_failure_of_this_one(
    charon: FakeCharon, client: IkeClient
) -> None:
    charon.handlers["list-sas"] = streaming("list-sa", ike_sa(name=b"other"))
    charon.handlers["initiate"] = answering(YES)
    await negotiate(charon, client, limit=0.05)
    (failed,) = await take(client)
    assert isinstance(failed, NegotiationFailed)
    assert "within 0.05 s" in failed.cause


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
    (failed,) = await take(client)
    assert isinstance(failed, NegotiationFailed)
    assert "slow or silent" in failed.cause
    dropped = [asked for name, asked in charon.requests if name == "terminate"]
    assert dropped == [{"ike-id": "9", "force": "yes", "timeout": "-1"}]


async def test_a_late_failure_is_not_repeated(
    charon: FakeCharon, client: IkeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(negotiation, "DIAGNOSE_WITHIN", 0.0)
    charon.handlers["initiate"] = answering(no("establishing CHILD_SA 'net' failed"))
    await negotiate(charon, client)
    (failed,) = await take(client)
    assert isinstance(failed, NegotiationFailed)
    assert "silent" in failed.cause


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
    (failed,) = await take(client)
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
    (first,) = await take(client)
    assert isinstance(first, IkeGone | NegotiationFailed)
    if isinstance(first, NegotiationFailed):
        assert "closed the connection" in first.cause
        (last,) = await take(client)
        assert isinstance(last, IkeGone)
