"""A new version takes over the gate under load: nothing leaks, and no covered flow is refused.

The old version is this one with another number in its settings, or with a map of another shape.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ipsecgate.core.model.flow import HOST, FlowPath
from ipsecgate.core.tables.layout import INDEX, LAYOUT, SETTING, Setting, TableId
from ipsecgate.core.tables.table import compile_table
from ipsecgate.edges.bpf import bytecode, elements, libbpf
from ipsecgate.edges.bpf.datapath import Datapath
from ipsecgate.edges.bpf.libbpf import closing_fd
from ipsecgate.edges.bpf.objects import HOOKS
from ipsecgate.edges.bpf.pins import Pins
from tests.system.caller import called_again, hammering
from tests.system.hooked_cgroup import (
    HERE,
    OTHER,
    PEER,
    THERE,
    HookedCgroup,
    hooked_cgroup,
    live,
    no_backstop,
    protect,
    take_over,
    went_out,
)

Grow = Callable[[HookedCgroup], None]


def number(hooked: HookedCgroup) -> None:
    """Mark the maps as made by another version."""
    hooked.data.set(Setting.VERSION, LAYOUT + 1)


def shape(hooked: HookedCgroup) -> None:
    """Replace a map by one of another size."""
    path = hooked.pins.root / "maps" / "recent"
    with closing_fd(hooked.pins.current.open_map("recent")) as fd:
        found = libbpf.map_shape(fd)
    path.unlink()
    other = libbpf.MapShape(found.type, found.key_size, found.value_size, 16, found.flags)
    with closing_fd(libbpf.create_map("recent", other)) as fd:
        libbpf.pin(fd, path)


@pytest.fixture(params=[number, shape])
def old(request: pytest.FixtureRequest, unique: str, cache: Path) -> Iterator[HookedCgroup]:
    """A hooked cgroup with hooks of another version, whose tables cover the peers."""
    with hooked_cgroup(unique, cache) as hooked:
        hooked.renew()
        hooked.publish(TableId.SPD, *live())
        request.param(hooked)
        yield hooked


def publish_beside(hooked: HookedCgroup) -> Datapath:
    """Publish the current tables in the maps of the next version."""
    data = take_over(hooked.pins)
    data.set(Setting.NETNS, hooked.netns)
    no_backstop(data, hooked.link)
    data.set_paths(HOST, [(THERE[family], FlowPath(HERE[family])) for family in (4, 6)])

    async def publish() -> None:
        await data.publish(TableId.POLICY, compile_table(protect()))
        await data.publish(TableId.SPD, compile_table(live()))

    asyncio.run(publish())
    return data


def version(pins: Pins) -> int:
    with closing_fd(pins.current.open_map("settings")) as fd:
        raw = elements.lookup(fd, INDEX.pack(Setting.VERSION), SETTING.size)
    return int(SETTING.unpack(raw or b"")[0])


def is_the_new_one(hooked: HookedCgroup, data: Datapath) -> None:
    """Assert that every link runs programs that use these maps, and that nothing else is left."""
    assert {path.name for path in hooked.pins.root.iterdir()} == {"maps", "progs", "links"}
    assert version(hooked.pins) == LAYOUT
    assert hooked.pins.loaded
    running = {a.hook: a.prog_id for a in hooked.pins.attachments()}
    assert running.keys() == HOOKS.keys()
    assert went_out(hooked.gated("tcp", PEER[4]))
    asyncio.run(data.publish(TableId.SPD, compile_table(())))
    for address in PEER.values():
        assert hooked.gated("tcp", address) == "EPERM"
        assert hooked.gated("sendto", address) == "EPERM"
    assert went_out(hooked.gated("tcp", OTHER[4]))


def test_a_version_with_other_maps_takes_over_without_a_gap(old: HookedCgroup, cache: Path) -> None:
    code = bytecode.get(cache)
    space = old.namespace.path
    with (
        hammering(space, old.cgroup, "tcp", PEER[4], 80) as covered,
        hammering(space, old.cgroup, "sendto", str(THERE[6][99]), 80) as also,
        hammering(space, old.cgroup, "sendto", OTHER[4], 80) as unnamed,
    ):
        old.pins.load(code)
        assert old.pins.objects is old.pins.next
        data = publish_beside(old)
        old.pins.switch()
        for each in (covered, also, unnamed):
            called_again(each, 20)
        results = [*covered, *also, *unnamed]
    assert set(map(went_out, results)) == {True}
    is_the_new_one(old, data)
    data.close()


def test_uncovered_flows_stay_refused_during_an_upgrade(old: HookedCgroup, cache: Path) -> None:
    old.publish(TableId.SPD)
    with hammering(old.namespace.path, old.cgroup, "tcp", PEER[4], 80) as results:
        old.pins.load(bytecode.get(cache), audit=True)  # a mode that only the controller may set
        old.pins.switch()  # even before anything is published
        called_again(results, 20)
    assert set(results) == {"EPERM"}


class Killed(BaseException):
    """Stands for SIGKILL: no code catches it."""


@contextlib.contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, call: int) -> Iterator[None]:
    """Raise Killed in the nth call that changes bpffs."""
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


def test_an_upgrade_killed_at_any_step_is_finished_by_the_next_load(
    old: HookedCgroup, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt gets one call further, and none of them opens anything.

    Programs that are pinned already would be kept, so each attempt would get many calls further.
    """
    code, steps, done = bytecode.get(cache), 0, False
    other = Pins(old.pins.bpffs, old.pins.root.name)
    while not done:
        for path in (other.next.folder / "progs").glob("*"):
            path.unlink()
        with contextlib.suppress(Killed), killed_at(monkeypatch, steps):
            other.load(code)
            if other.next.exists:
                publish_beside(old).close()
            other.switch()
            done = True
        assert went_out(old.gated("tcp", PEER[4])), f"covered, killed at step {steps}"
        assert went_out(old.gated("sendto", PEER[6])), f"covered, killed at step {steps}"
        assert old.gated("tcp", PEER[4], bind="198.51.100.77") == "EPERM"
        steps += 1
    assert steps > 20
    data = take_over(other)
    is_the_new_one(old, data)
    data.close()
