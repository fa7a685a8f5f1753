"""The strongSwan edge against two real daemons: events, and how a negotiation fails."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from ipsecgate.core.model.events import (
    ChildDown,
    ChildUp,
    IkeDown,
    IkeEvent,
    IkeGone,
    IkeUp,
    NegotiationDone,
    NegotiationFailed,
)
from ipsecgate.core.model.flow import TrafficSelector
from ipsecgate.core.model.ipsec import ChildName, Mode
from ipsecgate.edges.kernel.probe import has_esp
from ipsecgate.edges.strongswan import negotiation
from ipsecgate.edges.strongswan.client import IkeClient
from ipsecgate.lab.connections import connection
from ipsecgate.lab.hosts import ConnSpec, Lab

pytestmark = [
    pytest.mark.second_guest,
    pytest.mark.skipif(os.geteuid() != 0, reason="missing: root"),
    pytest.mark.skipif(not has_esp(), reason="missing: ESP in the kernel"),
]

HOST = ConnSpec("host", "transport")
NAME = ChildName("host", "host")


@pytest.fixture(scope="module")
def warm_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-ike") as lab:
        lab.warm_up(("transport",), (4,))
        yield lab


@pytest.fixture
def lab(warm_lab: Lab) -> Iterator[Lab]:
    yield warm_lab
    warm_lab.reset()


@pytest.fixture
async def client(lab: Lab) -> AsyncIterator[IkeClient]:
    async with await IkeClient.connect(lab.a.charon.vici_socket) as ike:
        yield ike


def load(lab: Lab, ours: ConnSpec, theirs: ConnSpec | None) -> None:
    """Load a connection on a, and another on b that may disagree."""
    for host, spec in ((lab.a, ours), (lab.b, theirs)):
        if spec is not None:
            away = spec.remote_ts if host is lab.a else spec.local_ts
            here = spec.local_ts if host is lab.a else spec.remote_ts
            local, remote = host.end(spec, here), lab.peer(host).end(spec, away)
            host.charon.load(connection(spec, local, remote, "none"))


async def until(
    client: IkeClient, wanted: type[IkeEvent] | tuple[type[IkeEvent], ...], limit: float = 60
) -> list[IkeEvent]:
    """Return the events up to the first one of a kind."""
    found = []
    async with asyncio.timeout(limit):
        async for event in client.events():
            found.append(event)
            if isinstance(event, wanted):
                break
    return found


async def test_a_child_is_reported_up_and_down(lab: Lab, client: IkeClient) -> None:
    load(lab, HOST, HOST)
    ours, theirs = ip_network("192.0.2.1"), ip_network("192.0.2.2")
    (config,) = await client.children()
    assert (config.name, config.mode) == (NAME, Mode.TRANSPORT)
    assert config.local == (TrafficSelector(ours),)
    assert config.remote == (TrafficSelector(theirs),)
    assert client.daemon_pid == lab.a.charon.pid
    assert await client.established() == ()

    await client.initiate(NAME, 10)
    ike, up = await until(client, ChildUp)
    assert isinstance(ike, IkeUp)
    assert isinstance(up, ChildUp)
    assert (up.sa.name, up.sa.remote_host) == (NAME, ip_address("192.0.2.2"))
    assert up.sa.local == config.local
    assert await client.established() == (up.sa,)
    await until(client, NegotiationDone)

    await client.initiate(NAME, 10)  # already up: done, not a failure
    await until(client, NegotiationDone)
    await client.terminate("host")
    kinds = {type(event) for event in await until(client, ChildDown)}
    assert kinds - {NegotiationDone} == {IkeDown, ChildDown}


async def test_services_and_address_ranges_are_read_back(lab: Lab, client: IkeClient) -> None:
    remote = ("192.0.2.2[tcp/https]", "192.0.2.2[udp/5300-5307]", "192.0.2.3-192.0.2.5[17]")
    spec = replace(HOST, local_ts=("dynamic",), remote_ts=remote)
    load(lab, spec, None)
    (config,) = await client.children()
    assert [str(ts.network) for ts in config.local] == ["192.0.2.1/32"]
    assert [(str(ts.network), ts.proto, ts.ports) for ts in config.remote] == [
        ("192.0.2.2/32", 6, (443, 443)),
        ("192.0.2.2/32", 17, (5300, 5307)),
        ("192.0.2.3/32", 17, (0, 65535)),
        ("192.0.2.4/31", 17, (0, 65535)),
    ]


def wrong_key(lab: Lab) -> None:
    load(lab, HOST, HOST)
    lab.break_psk()


FAILURES: dict[str, tuple[Callable[[Lab], None], str]] = {
    "wrong key": (wrong_key, "refused our authentication"),
    "no IKE proposal": (
        lambda lab: load(lab, replace(HOST, ike_proposals=("aes256-sha512-modp2048",)), HOST),
        "no IKE proposal in common",
    ),
    "no ESP proposal": (
        lambda lab: load(lab, replace(HOST, esp_proposals=("aes256-sha512",)), HOST),
        "no ESP proposal in common",
    ),
    "traffic selectors": (
        lambda lab: load(lab, replace(HOST, remote_ts=("10.99.0.0/16",)), HOST),
        "none of our traffic selectors",
    ),
    "unknown there": (lambda lab: load(lab, HOST, None), "no connection for us"),
    "unknown here": (lambda lab: load(lab, replace(HOST, name="other"), None), "not found"),
}


@pytest.mark.parametrize("name", FAILURES)
async def test_a_failure_has_a_cause(
    lab: Lab, client: IkeClient, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(negotiation, "DIAGNOSE_WITHIN", 60.0)  # however busy the machine is
    break_it, cause = FAILURES[name]
    break_it(lab)
    await client.initiate(NAME, 60)
    failed = (await until(client, NegotiationFailed))[-1]
    assert isinstance(failed, NegotiationFailed)
    assert cause in failed.cause.text, "the cause, not the time limit"
    assert await client.established() == ()


async def test_an_unanswered_negotiation_ends_at_its_limit_and_the_next_one_succeeds(
    lab: Lab, client: IkeClient
) -> None:
    load(lab, HOST, HOST)
    lab.a.charon.configure("retransmit_timeout = 60")  # it does not give up before our limit
    lab.drop_ike()
    began = time.monotonic()
    await client.initiate(NAME, 1)
    failed = (await until(client, NegotiationFailed))[-1]
    assert isinstance(failed, NegotiationFailed)
    assert "slow or silent" in failed.cause.text
    assert time.monotonic() - began >= 1
    async with asyncio.timeout(30):
        while not lab.a.charon.idle():
            await asyncio.sleep(0.01)
    lab.a.charon.configure("")
    lab.drop_ike(False)
    await client.initiate(NAME, 30)
    await until(client, ChildUp)


async def test_a_killed_daemon_is_reported(lab: Lab, client: IkeClient) -> None:
    load(lab, HOST, HOST)
    await client.initiate(NAME, 10)
    await until(client, ChildUp)
    lab.a.charon.kill()
    assert isinstance((await until(client, IkeGone))[-1], IkeGone)
