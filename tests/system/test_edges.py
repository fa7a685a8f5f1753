"""The XFRM edge against the kernel: SPD and SAD as ip(8) makes them."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import statistics
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from ipsecgate.core.model.events import (
    KernelSnapshot,
    PoliciesFlushed,
    PolicyGone,
    PolicySet,
    SaGone,
    SaSet,
    SasFlushed,
)
from ipsecgate.core.model.flow import Selector
from ipsecgate.core.model.ipsec import (
    ESP,
    Action,
    Direction,
    Mark,
    Mode,
    Sa,
    SaId,
    SpdEntry,
    SpdKey,
    Template,
)
from ipsecgate.core.state.kernel_state import KernelState
from ipsecgate.edges.kernel.probe import has_esp
from ipsecgate.edges.kernel.xfrm import XfrmMonitor
from ipsecgate.lab.netns import Namespace
from tests.system.event_recorder import batch, following, ip
from tests.until import until

pytestmark = [
    pytest.mark.second_guest,
    pytest.mark.skipif(os.geteuid() != 0, reason="missing: root"),
    pytest.mark.skipif(not has_esp(), reason="missing: ESP in the kernel"),
]

KEYS = "enc cbc(aes) 0x" + "11" * 16 + " auth hmac(sha256) 0x" + "22" * 32
TUNNEL = "tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 7 mode tunnel"
HOST, PEER = ip_address("192.0.2.1"), ip_address("192.0.2.2")
NET = SpdEntry(
    SpdKey(Selector(ip_network("10.1.0.0/16"), ip_network("10.2.0.0/16"))),
    100,
    Action.PROTECT,
    (Template(ESP, Mode.TUNNEL, 7, 0, HOST, PEER),),
)
ADD_NET = f"xfrm policy add src 10.1.0.0/16 dst 10.2.0.0/16 dir out priority 100 {TUNNEL}"
SA = Sa(SaId(PEER, 0x1001, ESP), HOST, 7, Mode.TUNNEL)
STATE = "xfrm state add src 192.0.2.1 dst 192.0.2.2 proto esp spi 0x1001 reqid 7 mode tunnel"


@pytest.fixture(autouse=True)
def _namespace(unique: str) -> Iterator[None]:
    """The test, its sockets and its programs run in a namespace of their own."""
    space = Namespace(f"edges-{unique}")
    try:
        with space.inside():
            ip("link set lo up")
            yield
    finally:
        space.remove()


async def test_the_first_event_is_a_snapshot() -> None:
    ip(ADD_NET)
    ip(f"{STATE} {KEYS}")
    async with following() as (_, recorder):
        (first,) = await recorder.next()
        assert isinstance(first, KernelSnapshot)
        assert [replace(entry, index=0) for entry in first.policies] == [NET]
        (sa,) = first.sas
        assert abs(sa.installed_at - time.time()) < 60
        assert replace(sa, installed_at=0, selector=None) == SA


POLICIES = {
    "v4": (ADD_NET.removeprefix("xfrm policy add "), NET),
    "v6, transport, optional": (
        "src 2001:db8::1/128 dst 2001:db8::2/128 dir out priority 1"
        " tmpl proto esp mode transport reqid 9 level use",
        SpdEntry(
            SpdKey(Selector(ip_network("2001:db8::1/128"), ip_network("2001:db8::2/128"))),
            1,
            Action.PROTECT,
            (Template(ESP, Mode.TRANSPORT, 9, optional=True),),
        ),
    ),
    "ports, mark, interface id, block": (
        "src 0.0.0.0/0 dst 10.3.0.0/16 proto udp sport 5000 dport 53 dir out action block"
        " mark 5 mask 0xff if_id 12",
        SpdEntry(
            SpdKey(
                Selector(
                    *(ip_network("0.0.0.0/0"), ip_network("10.3.0.0/16")),
                    *(17, 5000, 0xFFFF, 53, 0xFFFF),
                ),
                Mark(5, 0xFF),
                12,
            ),
            0,
            Action.DISCARD,
        ),
    ),
    "bypass": (
        "src 0.0.0.0/0 dst 10.4.0.0/16 dir out",
        SpdEntry(
            SpdKey(Selector(ip_network("0.0.0.0/0"), ip_network("10.4.0.0/16"))),
            0,
            Action.BYPASS,
        ),
    ),
}


@pytest.mark.parametrize("name", POLICIES)
async def test_a_policy_is_reported_when_added_updated_and_deleted(name: str) -> None:
    command, entry = POLICIES[name]
    selector = command.split(" action")[0].split(" tmpl")[0].split(" priority")[0]
    marks = command[command.index("mark") :] if "mark" in command else ""
    async with following() as (_, recorder):
        await recorder.next()
        ip(f"xfrm policy add {command}")
        ip(f"xfrm policy update {command}")
        ip(f"xfrm policy del {selector} {marks}")
        assert await recorder.next(3) == [PolicySet(entry), PolicySet(entry), PolicyGone(entry.key)]


async def test_directions_are_told_apart() -> None:
    async with following() as (monitor, recorder):
        await recorder.next()
        ip(
            f"xfrm policy add src 10.1.0.0/16 dst 10.2.0.0/16 dir fwd {TUNNEL}"
        )  # forward policies are ignored
        for direction in Direction:
            where = f"src 10.1.0.0/16 dst 10.2.0.0/16 dir {direction.name.lower()}"
            ip(f"xfrm policy add {where} {TUNNEL}")
            ip(f"xfrm policy del {where}")
            key = replace(NET.key, direction=direction)
            ip(f"xfrm policy add {where} {TUNNEL}")
            came, went, again = await recorder.next(3)
            assert isinstance(came, PolicySet)
            assert came.entry.key == key
            assert went == PolicyGone(key)
            assert again == came
        there = [entry.key.direction for entry in (await monitor.snapshot()).policies]
        assert sorted(there) == sorted(Direction)


async def test_a_state_is_reported_when_added_and_deleted() -> None:
    async with following() as (_, recorder):
        await recorder.next()
        ip(f"{STATE} {KEYS} mark 1 mask 3 if_id 5")
        ip("xfrm state del src 192.0.2.1 dst 192.0.2.2 proto esp spi 0x1001 mark 1 mask 3")
        came, went = await recorder.next(2)
        assert isinstance(came, SaSet)
        assert replace(came.sa, selector=None) == replace(SA, mark=Mark(1, 3), if_id=5)
        assert went == SaGone(SA.id)


async def test_a_larval_state_is_recognised() -> None:
    async with following() as (_, recorder):
        await recorder.next()
        ip("xfrm state allocspi src 192.0.2.1 dst 192.0.2.2 proto esp reqid 7 min 16 max 16")
        recorder.events.clear()  # kernels differ in whether they notify ALLOCSPI
        ip(ADD_NET)
        await recorder.next()
    async with following() as (monitor, _):
        sas = (await monitor.snapshot()).sas
        assert [sa.larval for sa in sas] == [True]


async def test_a_hard_expiry_is_reported_as_a_deletion() -> None:
    async with following() as (_, recorder):
        await recorder.next()
        ip(f"{STATE} {KEYS} limit time-hard 1")
        ip(f"{ADD_NET} limit time-hard 1")
        events = await recorder.next(4)
    kinds = [type(event) for event in events]
    assert {*kinds} == {SaSet, SaGone, PolicySet, PolicyGone}
    assert kinds.index(SaSet) < kinds.index(SaGone)
    assert kinds.index(PolicySet) < kinds.index(PolicyGone)
    assert events[kinds.index(SaSet)].sa.hard_lifetime == 1


async def test_a_flush_is_followed_by_a_snapshot() -> None:
    ip(f"{STATE} {KEYS}")
    ip(ADD_NET)
    async with following() as (_, recorder):
        await recorder.next()
        ip("xfrm policy flush")
        flushed, snapshot = await recorder.next(2)
        assert flushed == PoliciesFlushed()
        assert (len(snapshot.policies), len(snapshot.sas)) == (0, 1)
        ip("xfrm state flush")
        assert await recorder.next(2) == [SasFlushed(), KernelSnapshot((), ())]


async def test_a_deletion_does_not_wait_for_a_dump(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is reported while the dump is read, and again after it, because it may have the state."""
    ip(f"{STATE} {KEYS}")
    async with following() as (monitor, recorder):
        await recorder.next()
        dump = monitor.snapshot
        meanwhile: list[Any] = []

        async def snapshot() -> KernelSnapshot:
            taken = await dump()
            ip("xfrm state del src 192.0.2.1 dst 192.0.2.2 proto esp spi 0x1001")
            ip(ADD_NET)
            meanwhile.extend(await recorder.next())
            await asyncio.sleep(0.1)
            assert not recorder.events, "what opens flows waits"
            return taken

        monkeypatch.setattr(monitor, "snapshot", snapshot)
        await monitor.resync(check=True)
        assert meanwhile == [SaGone(SA.id)]
        taken, *behind = await recorder.next(3)
        assert [len(taken.sas), len(taken.policies), taken.check] == [1, 0, True]
        assert behind == [SaGone(SA.id), PolicySet(NET)]


@pytest.mark.parametrize("seed", random.sample(range(2**32), 1))
async def test_events_applied_to_a_dump_equal_the_next_dump(seed: int) -> None:
    dice = random.Random(seed)
    async with following() as (monitor, recorder):
        (before,) = await recorder.next()
        present: set[int] = set()
        commands = []
        for _ in range(200):
            net = dice.randrange(20)
            where = f"src 10.1.0.0/16 dst 10.9.{net}.0/24 dir out"
            verb = dice.choice(["update", "delete"]) if net in present else "add"
            present.symmetric_difference_update({net} if verb != "update" else ())
            what = "" if verb == "delete" else f"priority {dice.randrange(100)} {TUNNEL}"
            commands.append(f"xfrm policy {verb} {where} {what}")
        batch(commands)
        events = await recorder.next(200)
        after = await monitor.snapshot()
        state = KernelState()
        state.replace(before)
        for event in events:
            state.apply(event)
        assert state.policies == {entry.key: replace(entry, index=0) for entry in after.policies}


async def test_an_overrun_leads_to_a_new_snapshot() -> None:
    count = 2000
    async with following(receive_buffer=8192) as (monitor, recorder):
        await recorder.next()
        batch([  # the event loop does not run meanwhile
            f"xfrm policy add src 10.1.0.0/16 dst 10.9.{i >> 8}.{i & 255}/32 dir out {TUNNEL}"
            for i in range(count)
        ])  # fmt: skip
        async with asyncio.timeout(30):
            await until(lambda: any(isinstance(e, KernelSnapshot) for e in recorder.events))
        assert recorder.overruns
        assert "buffer" in recorder.overruns[0].cause
        assert monitor.overruns == len(recorder.overruns)
        last = [event for event in recorder.events if isinstance(event, KernelSnapshot)][-1]
        assert len(last.policies) == count
        recorder.events.clear()
        ip(f"{STATE} {KEYS}")  # it still reports events
        (came,) = await recorder.next()
        assert isinstance(came, SaSet)


async def test_nothing_is_lost_with_the_usual_buffer() -> None:
    count = 2000
    async with following() as (_, recorder):
        await recorder.next()
        batch([
            f"xfrm policy add src 10.1.0.0/16 dst 10.9.{i >> 8}.{i & 255}/32 dir out {TUNNEL}"
            for i in range(count)
        ])  # fmt: skip
        assert len(await recorder.next(count)) == count
        assert not recorder.overruns


async def test_an_exception_in_the_consumer_ends_the_monitor() -> None:
    follows = asyncio.Event()

    def deliver(event: Any) -> None:
        if isinstance(event, KernelSnapshot):
            follows.set()
        if isinstance(event, PolicySet):
            raise RuntimeError("no")

    async with XfrmMonitor(deliver) as monitor:
        run = asyncio.create_task(monitor.run())
        await asyncio.wait_for(follows.wait(), 30)
        ip(ADD_NET)
        with pytest.raises(RuntimeError, match="no"):
            await asyncio.wait_for(run, 60)


async def test_events_arrive_without_delay() -> None:
    """From the kernel's answer to the callback: an order of magnitude, not a promise."""
    nets = ip_address("10.2.0.0").packed.ljust(16, b"\0") + HOST.packed.ljust(16, b"\0")
    policy = nets + bytes(8) + struct.pack("=HBB12x", socket.AF_INET, 16, 32) + bytes(96)
    policy += struct.pack("=IIBB6x", 1, 0, 1, 1)
    request = struct.pack("=IHHII", 16 + len(policy), 0x19, 0x1, 1, 0) + policy
    times = []
    async with following() as (_, recorder):
        await recorder.next()
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 6) as sender:
            for _ in range(200):
                recorder.arrived.clear()
                sender.send(request)
                began = time.perf_counter()
                await recorder.next()
                times.append(recorder.arrived[0] - began)
    assert statistics.median(times) < 0.1
