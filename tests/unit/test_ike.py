"""The IKE client against a fake charon with real VICI packets: events, commands, negotiations."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from ipsecgate.core.codec.vici_sections import ViciError
from ipsecgate.core.model.events import (
    ChildUp,
    IkeGone,
    IkeUnparsed,
    IkeUp,
)
from ipsecgate.edges.strongswan import vici
from ipsecgate.edges.strongswan.client import IkeClient
from ipsecgate.edges.strongswan.vici import IkeRefusedError, IkeUnreachableError
from tests.unit.fake_charon import (
    YES,
    FakeCharon,
    answering,
    next_events,
    no,
    streaming,
)
from tests.unit.vici_messages import CHILD, SA, UP, conn, ike_sa


async def test_configurations_and_sas_are_listed(charon: FakeCharon, client: IkeClient) -> None:
    charon.handlers["list-conns"] = streaming("list-conn", conn(), conn())
    charon.handlers["list-sas"] = streaming("list-sa", ike_sa())
    assert [config.name.child for config in await client.children()] == ["net", "net"]
    assert await client.established() == (SA,)
    assert client.daemon_pid == os.getpid()


async def test_a_connection_is_parsed_again_only_when_it_has_changed(
    charon: FakeCharon, client: IkeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = []

    def message_of(packet: bytes) -> vici.Message:
        parsed.append(packet)
        return vici.message_of(packet)

    monkeypatch.setattr("ipsecgate.edges.strongswan.client.message_of", message_of)
    kept, changed = ({f"gw{n}": conn()["gw"]} for n in range(2))
    charon.handlers["list-conns"] = streaming("list-conn", kept, changed)
    first = await client.children()
    assert await client.children() == first
    assert len(parsed) == 2
    other = {"gw1": conn(local_addrs=[b"192.0.2.3"])["gw"]}
    charon.handlers["list-conns"] = streaming("list-conn", kept, other)
    assert [config.name.ike for config in await client.children()] == ["gw0", "gw1"]
    assert len(parsed) == 3


async def test_the_first_kernel_plugin_shows_whether_esp_is_in_userspace(
    charon: FakeCharon, client: IkeClient
) -> None:
    with pytest.raises(IkeRefusedError):
        await client.does_userspace_esp()
    for first in (True, False):
        plugins = ["kernel-libipsec", "kernel-netlink"][:: 1 if first else -1]
        charon.handlers["stats"] = answering({"plugins": plugins})
        assert await client.does_userspace_esp() is first


async def test_events_arrive_in_order_and_then_the_end_of_the_connection(
    charon: FakeCharon, client: IkeClient
) -> None:
    charon.raise_event("ike-updown", UP)
    charon.raise_event("child-updown", UP)
    assert await next_events(client, 2) == [IkeUp("gw", 7), ChildUp(SA)]
    charon.die()
    (gone,) = await next_events(client)
    assert isinstance(gone, IkeGone)
    assert "closed the connection" in gone.problem.text
    with pytest.raises(IkeUnreachableError):
        await client.established()


async def test_a_child_that_cannot_be_parsed_does_not_affect_the_others(
    charon: FakeCharon, client: IkeClient
) -> None:
    odd = {"local-ts": ["10.0.0.0/8[nosuch/protocol]"]}
    charon.raise_event("child-updown", ike_sa(**odd))
    charon.raise_event("child-updown", UP)
    unread, up = await next_events(client, 2)
    assert isinstance(unread, IkeUnparsed)
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
    (gone,) = await next_events(client)
    assert isinstance(gone, IkeGone)


async def test_an_oversized_packet_ends_the_session(charon: FakeCharon, client: IkeClient) -> None:
    for session in charon.sessions:
        session.writer.write(struct.pack("!I", vici.MAX_PACKET + 1))
    (gone,) = await next_events(client)
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
