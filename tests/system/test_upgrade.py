"""Another version takes the gate over, under load: nothing leaks, nothing covered is refused.

The version before is this one with another number in its settings, or a map of another shape.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ipsecgate.core.layout import INDEX, LAYOUT, SETTING, Setting, TableId
from ipsecgate.core.table import compile_table
from ipsecgate.edges import bytecode, libbpf
from ipsecgate.edges.datapath import Datapath
from ipsecgate.edges.objects import HOOKS, opened
from ipsecgate.edges.pins import Pins
from tests.system.bed import HERE, OTHER, PEER, THERE, Bed, live, no_backstop, protect, went_out
from tests.system.bed import bed as make_bed
from tests.system.caller import called_again, hammering

Grow = Callable[[Bed], None]


def number(bed: Bed) -> None:
    """Make the maps say that another version made them."""
    bed.data.set(Setting.VERSION, LAYOUT + 1)


def shape(bed: Bed) -> None:
    """Put a map of another size in the place of one."""
    path = bed.pins.root / "maps" / "recent"
    with opened(bed.pins.current.open_map("recent")) as fd:
        found = libbpf.map_shape(fd)
    path.unlink()
    other = libbpf.MapShape(found.type, found.key_size, found.value_size, 16, found.flags)
    with opened(libbpf.create_map("recent", other)) as fd:
        libbpf.pin(fd, path)


@pytest.fixture(params=[number, shape])
def old(request: pytest.FixtureRequest, unique: str, cache: Path) -> Iterator[Bed]:
    """A bed of another version, that covers the peers."""
    with make_bed(unique, cache) as bed:
        bed.renew()
        bed.publish(TableId.SPD, *live())
        request.param(bed)
        yield bed


def take_over(bed: Bed) -> Datapath:
    """Publish in the maps of the next version what was in force before."""
    data = Datapath(bed.pins)
    data.set(Setting.NETNS, bed.netns)
    no_backstop(data, bed.link)
    data.set_sources([(THERE[family], HERE[family]) for family in (4, 6)])

    async def publish() -> None:
        await data.publish(TableId.POLICY, compile_table(protect()))
        await data.publish(TableId.SPD, compile_table(live()))
        while data.clearing:
            await asyncio.sleep(0.001)

    asyncio.run(publish())
    return data


def version(pins: Pins) -> int:
    with opened(pins.current.open_map("settings")) as fd:
        raw = libbpf.lookup(fd, INDEX.pack(Setting.VERSION), SETTING.size)
    return int(SETTING.unpack(raw or b"")[0])


def is_the_new_one(bed: Bed, data: Datapath) -> None:
    """Assert that every link runs programs that look into these maps, and nothing else is left."""
    assert {path.name for path in bed.pins.root.iterdir()} == {"maps", "progs", "links"}
    assert version(bed.pins) == LAYOUT
    assert bed.pins.loaded
    running = {a.hook: a.prog_id for a in bed.pins.attachments()}
    assert running.keys() == HOOKS.keys()
    assert went_out(bed.gated("tcp", PEER[4]))
    asyncio.run(data.publish(TableId.SPD, compile_table(())))
    for address in PEER.values():
        assert bed.gated("tcp", address) == "EPERM"
        assert bed.gated("sendto", address) == "EPERM"
    assert went_out(bed.gated("tcp", OTHER[4]))


def test_a_version_with_other_maps_takes_over_without_a_gap(old: Bed, cache: Path) -> None:
    code = bytecode.get(cache)
    space = old.namespace.path
    with (
        hammering(space, old.cgroup, "tcp", PEER[4], 80) as covered,
        hammering(space, old.cgroup, "sendto", str(THERE[6][99]), 80) as also,
        hammering(space, old.cgroup, "sendto", OTHER[4], 80) as unnamed,
    ):
        old.pins.load(code)
        assert old.pins.objects is old.pins.next
        data = take_over(old)
        old.pins.switch()
        for each in (covered, also, unnamed):
            called_again(each, 20)
        told = [*covered, *also, *unnamed]
    assert set(map(went_out, told)) == {True}
    is_the_new_one(old, data)
    data.close()


def test_uncovered_flows_stay_refused_all_the_time(old: Bed, cache: Path) -> None:
    old.publish(TableId.SPD)
    with hammering(old.namespace.path, old.cgroup, "tcp", PEER[4], 80) as told:
        old.pins.load(bytecode.get(cache))
        old.pins.switch()  # published or not
        called_again(told, 20)
    assert set(told) == {"EPERM"}


class Killed(BaseException):
    """What a SIGKILL is to the code that it hits."""


@contextlib.contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, call: int) -> Iterator[None]:
    """Die in the nth call that changes what is in bpffs."""
    left = call

    def dying(real: Callable[..., object]) -> Callable[..., object]:
        def instead(*args: object, **named: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real(*args, **named)

        return instead

    with monkeypatch.context() as patch:
        patch.setattr(libbpf, "update_link", dying(libbpf.update_link))
        patch.setattr(libbpf, "pin", dying(libbpf.pin))
        for name in ("rename", "unlink", "mkdir", "rmdir"):
            patch.setattr(Path, name, dying(getattr(Path, name)))
        yield


def test_killed_anywhere_the_next_load_finishes_it(
    old: Bed, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step by step: each attempt gets one call further, and none of them opens anything."""
    code, steps, done = bytecode.get(cache), 0, False
    other = Pins(old.pins.bpffs, old.pins.root.name)
    while not done:
        with contextlib.suppress(Killed), killed_at(monkeypatch, steps):
            other.load(code)
            if other.next.any:
                take_over(old).close()
            other.switch()
            done = True
        assert went_out(old.gated("tcp", PEER[4])), f"covered, killed at step {steps}"
        assert went_out(old.gated("sendto", PEER[6])), f"covered, killed at step {steps}"
        assert old.gated("tcp", str(THERE[4][1])[:-1] + "9", bind="198.51.100.77") == "EPERM"
        steps += 1
    assert steps > 20
    data = Datapath(other)
    is_the_new_one(old, data)
    data.close()
