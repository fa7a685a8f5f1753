"""Negotiations with peers that only the kernel's ACQUIRE names: the request, and how each ends."""

from __future__ import annotations

import asyncio
import errno
import struct
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from ipsecgate.core.codec.xfrm_acquire import ACQUIRE, encode_acquire
from ipsecgate.core.model.events import IkeDown, NegotiationDone, NegotiationFailed
from ipsecgate.core.model.flow import TCP, Flow
from ipsecgate.core.model.ipsec import ESP, Acquire, ChildName, Mode, Template
from ipsecgate.core.model.problem import Cause
from ipsecgate.edges.strongswan import acquisition
from ipsecgate.edges.strongswan.client import IkeClient
from tests.unit.fake_charon import FakeCharon, Section, Session, next_events
from tests.unit.vici_messages import SA, UP, ike_sa
from tests.until import until

PEER = ip_address("192.0.2.2")
NAME = ChildName("gw", "net", ip_network(PEER))
FLOW = Flow(ip_address("10.2.0.9"), TCP, 80, ip_address("10.1.0.1"))
TEMPLATE = Template(ESP, Mode.TRANSPORT, reqid=7)

# --- the request --------------------------------------------------------------------------


@pytest.mark.parametrize("family", [4, 6])
def test_an_acquire_has_the_flow_and_the_reqid_where_the_kernel_reads_them(family: int) -> None:
    flow = FLOW
    if family == 6:
        ends = ip_address("2001:db8::9"), ip_address("2001:db8::1")
        flow = replace(FLOW, daddr=ends[0], saddr=ends[1])
    raw = encode_acquire(Acquire(flow, TEMPLATE), sequence=5)
    length, kind, flags, sequence, _ = struct.unpack_from("=IHHII", raw)
    assert (length, kind, flags, sequence) == (len(raw), ACQUIRE, 5, 5)
    body = raw[16:]
    assert len(body) == 280 + 4 + 64
    assert flow.saddr is not None
    source, destination = (end.packed.ljust(16, b"\0") for end in (flow.saddr, flow.daddr))
    bits, number = flow.daddr.max_prefixlen, {4: 2, 6: 10}[family]
    for at in (40, 96):  # the selector, and that of the policy
        assert body[at : at + 32] == destination + source
        assert struct.unpack_from("!HHHH", body, at + 32) == (80, 0xFFFF, 0, 0)
        assert struct.unpack_from("=HBBB", body, at + 40) == (number, bits, bits, TCP)
    assert (body[20], body[24:40]) == (ESP, source)
    assert body[96 + 160] == 1, "outbound"
    assert struct.unpack_from("=HH", body, 280) == (68, 5)
    template = body[284:]
    assert (template[20], template[24]) == (ESP, number)
    assert struct.unpack_from("=IB", template, 44) == (7, Mode.TRANSPORT)


def test_a_flow_without_a_source_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match="no source"):
        encode_acquire(Acquire(replace(FLOW, saddr=None), TEMPLATE), sequence=1)


# --- the negotiation ----------------------------------------------------------------------


class Mesh:
    """A charon whose IKE_SAs the test sets, and a client of it."""

    def __init__(self, charon: FakeCharon, client: IkeClient) -> None:
        self.charon, self.client = charon, client
        self.sas: list[Section] = []
        self.sent = 0
        charon.handlers["list-sas"] = self._list

    async def _list(self, session: Session, _asked: Section) -> Section:
        for sa in self.sas:
            session.event("list-sa", sa)
        return {}

    async def negotiate(self, limit: float = 5.0, error: OSError | None = None) -> None:
        def send() -> None:
            self.sent += 1
            if error is not None:
                raise error

        await self.client.acquire(NAME, PEER, send, limit)
        await until(lambda: self.sent == 1)

    def log(self, text: str, unique: int = 7) -> None:
        line = {"ikesa-name": "gw", "ikesa-uniqueid": str(unique), "msg": text}
        self.charon.raise_event("log", line)


@pytest.fixture
async def mesh(charon: FakeCharon) -> Any:
    charon.known.add("log")
    async with await IkeClient.connect(charon.path) as client:
        yield Mesh(charon, client)


def half_open(**body: Any) -> Section:
    whole = ike_sa()["gw"]
    return {"gw": {**whole, "state": b"CONNECTING", "initiator": b"yes", "child-sas": {}, **body}}


async def test_it_is_done_when_the_child_comes_up_with_this_peer(mesh: Mesh) -> None:
    mesh.sas = [half_open()]
    await mesh.negotiate()
    mesh.sas = [ike_sa()]
    mesh.charon.raise_event("child-updown", UP)
    events = await next_events(mesh.client, 2)
    assert events[1] == NegotiationDone(NAME)
    assert mesh.sent == 1
    assert "initiate" not in [name for name, _ in mesh.charon.requests]


async def test_another_peer_of_the_child_is_not_enough(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acquisition, "LOOK_AGAIN", 0.05)
    other = {"remote-host": b"192.0.2.3"}
    mesh.sas = [half_open(), {"gw": {**ike_sa()["gw"], **other}}]
    await mesh.negotiate()
    await asyncio.sleep(0.3)
    assert mesh.client._events.empty()
    mesh.sas = [half_open(**other)]
    (event,) = await next_events(mesh.client)
    assert event == NegotiationFailed(NAME, Cause("strongSwan did not negotiate"))


async def test_the_log_of_its_own_ike_sa_gives_the_cause(mesh: Mesh) -> None:
    mesh.sas = [half_open()]
    await mesh.negotiate()
    mesh.log("initiating IKE_SA gw[6] to 192.0.2.3", 6)
    mesh.log("initiating IKE_SA gw[7] to 192.0.2.2", 7)
    mesh.log("received NO_PROPOSAL_CHOSEN notify error", 6)
    mesh.log("received AUTHENTICATION_FAILED notify error", 7)
    mesh.sas = []
    mesh.charon.raise_event("ike-updown", {"gw": {"uniqueid": "7"}})
    events = await next_events(mesh.client, 2)
    assert events[0] == IkeDown("gw", 7)
    assert isinstance(events[1], NegotiationFailed)
    assert "the peer refused our authentication" in events[1].cause.text


async def test_an_ike_sa_without_the_child_is_a_failure(mesh: Mesh) -> None:
    mesh.sas = [half_open()]
    await mesh.negotiate()
    mesh.log("initiating IKE_SA gw[7] to 192.0.2.2")
    mesh.log("received TS_UNACCEPTABLE notify, no CHILD_SA built")
    mesh.sas = [half_open(state=b"ESTABLISHED")]
    mesh.log("failed to establish CHILD_SA, keeping IKE_SA")
    (event,) = await next_events(mesh.client)
    assert isinstance(event, NegotiationFailed)
    assert event.cause.text == "the peer accepts none of our traffic selectors"


async def test_at_the_limit_only_the_half_open_ike_sa_with_this_peer_is_dropped(
    mesh: Mesh,
) -> None:
    other = half_open(uniqueid=b"8", **{"remote-host": b"192.0.2.3"})
    mesh.sas = [half_open(), other]
    await mesh.negotiate(limit=0.05)
    (event,) = await next_events(mesh.client)
    assert isinstance(event, NegotiationFailed)
    assert "slow or silent" in event.cause.text
    dropped = [asked for name, asked in mesh.charon.requests if name == "terminate"]
    assert [asked["ike-id"] for asked in dropped] == ["7"]


async def test_a_request_that_the_kernel_refuses_is_a_failure(mesh: Mesh) -> None:
    await mesh.negotiate(error=PermissionError(errno.EPERM, "ACQUIRE: Operation not permitted"))
    (event,) = await next_events(mesh.client)
    assert isinstance(event, NegotiationFailed)
    assert "ACQUIRE: Operation not permitted" in event.cause.text
    assert SA.remote_host == PEER
