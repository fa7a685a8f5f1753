"""Tables of any size are taken over and written in parts: other tasks run in between.

Counted are the functions, Python's and C's, that are called in one turn of the event loop: no clock
is read. Flows can be closed between two parts, and no flow is judged by half of a change.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from random import Random
from types import FrameType
from typing import Any

import pytest

from ipsecgate.controller.takeover import Takeover
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import Selector
from ipsecgate.core.model.ipsec import ESP, Action, Mode, Sa, SaId, SpdEntry, SpdKey, Template
from ipsecgate.core.state.spd import rules_of
from ipsecgate.core.tables.layout import Entry, State, TableId
from ipsecgate.core.tables.table import Rule, Table, Ternary, compile_table, ternary
from ipsecgate.edges.bpf.datapath import Datapath
from tests.system.hooked_cgroup import PEER, THERE, HookedCgroup, live, protect, went_out

FEW, MANY = 3000, 12_000
HIGHEST = 1.25  # times as many calls in the longest turn
FIRST = int(IPv4Address("10.0.0.0"))
GATEWAYS = IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")


def match(number: int) -> Ternary:
    return ternary(IPv4Network((FIRST + number, 32)))


def rules(count: int, state: State = State.LIVE) -> list[Rule]:
    return [Rule(match(number), Entry(state)) for number in range(count)]


def turns(work: Coroutine[Any, Any, None], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Do some work in a loop; return how many functions are called in each turn."""
    counted = [0]
    run = asyncio.events.Handle._run

    def profile(_frame: FrameType, event: str, _argument: object) -> None:
        counted[-1] += event in ("call", "c_call")

    def turn(handle: asyncio.Handle) -> None:
        counted.append(0)
        run(handle)

    with monkeypatch.context() as patched:
        patched.setattr(asyncio.events.Handle, "_run", turn)
        with asyncio.Runner() as runner:
            runner.get_loop()
            sys.setprofile(profile)
            try:
                runner.run(work)
            finally:
                sys.setprofile(None)
    return counted[1:]


def written(hooked: HookedCgroup, count: int) -> Coroutine[Any, Any, None]:
    return hooked.data.publish(TableId.SPD, compile_table(rules(count)))


def changed(hooked: HookedCgroup, count: int) -> Coroutine[Any, Any, None]:
    return hooked.data.change(
        TableId.SPD, [(match(number), Entry(State.LIVE, rank=1)) for number in range(count)]
    )


def removed(hooked: HookedCgroup, _count: int) -> Coroutine[Any, Any, None]:
    return hooked.data.publish(TableId.SPD, Table())


def taken_over(hooked: HookedCgroup, _count: int) -> Coroutine[Any, Any, None]:
    hooked.data.close()
    hooked.data = Datapath(hooked.pins)
    return hooked.data.take_over()


def checked(hooked: HookedCgroup, count: int) -> Coroutine[Any, Any, None]:
    content = compile_table(rules(count))

    async def check() -> None:
        assert await hooked.data.repair(TableId.SPD, content) == 0

    return check()


def test_no_turn_takes_longer_with_more_entries(
    hooked: HookedCgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither at a start nor in a change, nor while the maps grow, nor in the regular check."""
    works = [written, taken_over, checked, changed, removed]
    longest: dict[str, list[int]] = {}
    for count in (FEW, MANY):
        for work in works:
            counted = turns(work(hooked, count), monkeypatch)
            longest.setdefault(work.__name__, []).append(max(counted))
            assert sum(counted) > 3 * count, "the count sees the work"
    for few, many in longest.values():
        assert many <= few * HIGHEST, longest


def test_few_changes_need_no_pause(hooked: HookedCgroup, monkeypatch: pytest.MonkeyPatch) -> None:
    hooked.publish(TableId.SPD, *rules(FEW))
    change = hooked.data.change(TableId.SPD, [(match(n), Entry(State.DEAD)) for n in range(100)])
    counted = turns(change, monkeypatch)
    assert sum(calls > 100 for calls in counted) == 1, counted


class Pauses:
    """Calls a function in each pause, with the pause's number."""

    def __init__(self, hooked: HookedCgroup, work: Callable[[int], None]) -> None:
        self.count = 0
        self._hooked = hooked
        self._work = work

    def __enter__(self) -> Pauses:
        self._hooked.data.on_pause = self._on_pause
        return self

    def __exit__(self, *_error: object) -> None:
        self._hooked.data.on_pause = lambda: None

    def _on_pause(self) -> None:
        self._work(self.count)
        self.count += 1


@pytest.mark.parametrize("now", [None, Entry(State.DEAD)])
@pytest.mark.parametrize("part", ["first", "middle", "last"])
@pytest.mark.parametrize("table", TableId)
def test_a_flow_is_closed_at_once_while_a_large_change_is_written(
    hooked: HookedCgroup, table: TableId, part: str, now: Entry | None
) -> None:
    """And stays closed when the change is in force, though the change has it live."""
    four, six = live()
    content = [*rules(FEW, State.PROTECT), *protect()]
    if table is TableId.SPD:
        content = [*rules(FEW), four, six]
    with Pauses(hooked, lambda _number: None) as pauses:
        hooked.publish(table, *content)
    assert pauses.count > 20
    when = {"first": 0, "middle": pauses.count // 2, "last": pauses.count - 20}[part]
    hooked.renew()
    hooked.publish(TableId.SPD, four, six)
    assert went_out(hooked.gated("tcp", PEER[4]))

    def close(number: int) -> None:
        if number == when:
            assert went_out(hooked.gated("tcp", PEER[4]))
            assert hooked.data.cut(TableId.SPD, {four.match: now}) == {}
        if number >= when:
            assert hooked.gated("tcp", PEER[4]) == "EPERM"
            assert went_out(hooked.gated("tcp", PEER[6]))

    with Pauses(hooked, close) as pauses:
        hooked.publish(table, *content)
    assert pauses.count > when
    assert hooked.gated("tcp", PEER[4]) == "EPERM"
    assert went_out(hooked.gated("tcp", PEER[6]))
    assert hooked.data.entry_count() == (FEW if table is TableId.SPD else FEW + 2) + (
        len(live()) + len(protect()) - (now is None) - (2 if table is TableId.POLICY else 0)
    )


def test_a_flow_that_a_large_change_would_open_can_be_closed_before_it_does(
    hooked: HookedCgroup,
) -> None:
    four, six = live()
    for now, waits in ((Entry(State.DEAD), {}), (four.entry, {four.match: four.entry})):
        hooked.publish(TableId.SPD, replace(six, entry=Entry(State.DEAD)))
        met: list[Any] = []

        def close(_number: int, now: Entry = now, met: list[Any] = met) -> None:
            assert hooked.gated("tcp", PEER[4]) == hooked.gated("tcp", PEER[6]) == "EPERM"
            image = hooked.data.images[TableId.SPD].table
            if not met and image.get(four.match) is not None:
                met.append(hooked.data.cut(TableId.SPD, {four.match: now}))
                assert hooked.gated("tcp", PEER[4]) == "EPERM"

        with Pauses(hooked, close):
            hooked.publish(TableId.SPD, four, six, *rules(FEW))
        assert met == [waits]
        assert went_out(hooked.gated("tcp", PEER[4])) == (now == four.entry)
        assert went_out(hooked.gated("tcp", PEER[6]))


@pytest.mark.parametrize("seed", range(6))
def test_what_is_in_force_is_the_old_table_or_the_new_one_without_what_was_cut(
    hooked: HookedCgroup, seed: int
) -> None:
    random = Random(seed)

    def some() -> Table:
        table = Table()
        for number in random.sample(range(3000), 2000):
            state = random.choice((State.LIVE, State.DEAD))
            table.put(match(number), Entry(state, rank=random.randrange(4)))
        return table

    old, new = some(), some()
    asyncio.run(hooked.data.publish(TableId.SPD, old))
    wanted = new.copy()
    cut = 0

    def close(_number: int) -> None:
        nonlocal cut
        closings = {
            match(number): random.choice((None, Entry(State.DEAD, rank=9)))
            for number in random.sample(range(3000), 20)
        }
        wait = hooked.data.cut(TableId.SPD, closings)
        for one in closings.keys() - wait.keys():
            cut += 1
            wanted.put(one, closings[one])
            before = old.get(one)
            if before is not None and before.state is State.LIVE:
                old.put(one, closings[one])
        shown = hooked.data.table(TableId.SPD)
        assert shown in (old, wanted)
        assert shown is not None
        for one in wait:
            assert not is_live(shown, one)
            assert not is_live(hooked.data.images[TableId.SPD].table, one)

    with Pauses(hooked, close) as pauses:
        asyncio.run(hooked.data.publish(TableId.SPD, new))
    assert pauses.count > 20
    assert cut > 100
    assert hooked.data.table(TableId.SPD) == wanted
    hooked.take_over()
    assert hooked.data.table(TableId.SPD) == wanted
    assert asyncio.run(hooked.data.repair(TableId.SPD, wanted)) == 0


def test_a_flow_is_closed_in_any_part_of_a_takeover(
    hooked: HookedCgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SA is gone under which a predecessor has let it go, and nobody knows yet what else is."""
    tag, other = 0xC0FFEE, 7
    rules = [replace(one, entry=replace(one.entry, id=tag)) for one in live()]
    content = compile_table([
        rules[0], replace(rules[1], entry=replace(rules[1].entry, id=other)),
        *(Rule(match(number), Entry(State.LIVE, id=100 + number)) for number in range(FEW)),
    ])  # fmt: skip
    expected = content.copy()
    expected.put(
        rules[0].match,
        replace(content.rows[rules[0].match.mask][rules[0].match.value], state=State.DEAD),
    )
    parts = 0
    for when in (0, 5, 20, 10**6):
        asyncio.run(hooked.data.publish(TableId.SPD, content))
        assert went_out(hooked.gated("tcp", PEER[4]))

        async def take_over(when: int = when) -> None:
            nonlocal parts
            parts = 0
            hooked.data.close()
            hooked.data = Datapath(hooked.pins)
            work = asyncio.create_task(hooked.data.take_over())
            while not work.done():
                if parts == when:
                    await hooked.data.close_tagged({tag})
                    assert hooked.gated("tcp", PEER[4]) == "EPERM"
                parts += 1
                await asyncio.sleep(0)
            await work
            if when > parts:
                await hooked.data.close_tagged({tag})

        asyncio.run(take_over())
        assert hooked.gated("tcp", PEER[4]) == "EPERM"
        assert went_out(hooked.gated("tcp", PEER[6]))
        assert hooked.data.table(TableId.SPD) == expected
        assert hooked.data.images[TableId.SPD].table == expected
        assert asyncio.run(hooked.data.repair(TableId.SPD, expected)) == 0
    assert parts > 20


def sa_of(spi: int) -> Sa:
    return Sa(SaId(GATEWAYS[1], spi, ESP), GATEWAYS[0], reqid=1, mode=Mode.TUNNEL)


async def test_a_takeover_keeps_open_what_was_rekeyed_meanwhile(hooked: HookedCgroup) -> None:
    """The old SA is gone before the first dump, or after it; then the new one goes, too."""
    template = Template(ESP, Mode.TUNNEL, 1, 0, *GATEWAYS)
    key = SpdKey(Selector(IPv4Network("198.51.100.0/24"), THERE[4]))
    policy = SpdEntry(key, 100, Action.PROTECT, (template,))
    old, new = sa_of(0x1000), sa_of(0x2000)
    content = Table()
    for rule in rules_of(policy, lambda _reqid: (old,)):
        content.put(rule.match, rule.entry)
    for dumped in ((new,), (old, new), (old,)):
        await hooked.data.publish(TableId.SPD, content)
        hooked.data.close()
        hooked.data = Datapath(hooked.pins)
        takeover = Takeover(hooked.data)
        running = asyncio.create_task(takeover.run())
        takeover.put(on.KernelSnapshot((policy,), dumped))
        await asyncio.sleep(0.1)
        await hooked.data.take_over()  # the table is read only now
        if new not in dumped:
            takeover.put(on.SaSet(new))
        takeover.put(on.SaGone(old.id))
        await asyncio.sleep(0.1)
        assert went_out(hooked.gated("tcp", PEER[4]))
        takeover.put(on.SaGone(new.id))
        await asyncio.sleep(0.1)
        assert hooked.gated("tcp", PEER[4]) == "EPERM"
        takeover.end()
        await running


def is_live(table: Table, one: Ternary) -> bool:
    entry = table.get(one)
    return entry is not None and entry.state is State.LIVE


def test_a_writer_that_dies_in_the_middle_has_changed_nothing_but_what_was_cut(
    hooked: HookedCgroup,
) -> None:
    four, six = live()
    hooked.publish(TableId.SPD, four, six)

    def die(number: int) -> None:
        if number == 15:
            assert hooked.data.cut(TableId.SPD, {four.match: Entry(State.DEAD)}) == {}
            raise KeyboardInterrupt

    with Pauses(hooked, die), pytest.raises(KeyboardInterrupt):
        hooked.publish(TableId.SPD, replace(six, entry=Entry(State.DEAD)), *rules(FEW))
    hooked.take_over()
    left = Table()
    left.put(four.match, Entry(State.DEAD))
    left.put(six.match, Entry(State.LIVE, rank=1))  # as compile_table ranks it
    assert hooked.data.table(TableId.SPD) == left
    assert hooked.gated("tcp", PEER[4]) == "EPERM"
    assert went_out(hooked.gated("tcp", PEER[6]))
    assert hooked.data.entry_count() == len(protect()) + 2
