"""Whose a refusal is: looked up once for each cgroup, at once while its process lives."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from ipsecgate.controller import callers
from ipsecgate.controller.callers import KEPT, NOBODY, WAITING, Caller, Callers
from ipsecgate.core.model.events import FlowRefused
from ipsecgate.edges.host import cgroups
from tests.unit.transcript import REFUSED

ID = "ab" * 32
Passed = list[tuple[FlowRefused, Caller]]


def put(found: dict[int, Caller], *refusals: FlowRefused) -> tuple[Passed, int]:
    """Return what is passed on before and after looking, and how many looks that took."""
    passed: Passed = []
    looks = 0

    def look(wanted: object) -> dict[int, Caller]:
        nonlocal looks
        looks += 1
        return found

    async def run() -> None:
        made = Callers(lambda refusal, caller: passed.append((refusal, caller)))
        task = asyncio.create_task(made.run())
        for refusal in refusals:
            made.put(refusal)
        while len(passed) < len(refusals):
            await asyncio.sleep(0.01)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callers, "look", look)
        asyncio.run(asyncio.wait_for(run(), 10))
    return passed, looks


def test_the_refusals_of_one_cgroup_wait_for_one_look_and_keep_their_order() -> None:
    unit = Caller("/sys/fs/cgroup/a.service", "a.service")
    refusals = [replace(REFUSED, pid=0, cgroup=7, at=float(number)) for number in range(5)]
    passed, looks = put({7: unit}, *refusals)
    assert passed == [(refusal, unit) for refusal in refusals]
    assert looks == 1


def test_a_cgroup_that_is_gone_is_looked_for_once() -> None:
    refusals = [replace(REFUSED, pid=0, cgroup=7), replace(REFUSED, pid=0, cgroup=7)]
    passed, looks = put({}, *refusals)
    assert [caller for _, caller in passed] == [NOBODY, NOBODY]
    assert looks == 1


def test_a_living_process_shows_its_cgroup_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "system.slice/a.service/sub"
    folder.mkdir(parents=True)
    monkeypatch.setattr(cgroups, "of_process", {9: folder}.__getitem__)
    number = folder.stat().st_ino
    passed, looks = put({}, replace(REFUSED, pid=9, cgroup=number))
    assert [caller for _, caller in passed] == [Caller(str(folder), "a.service")]
    assert looks == 0
    passed, looks = put({}, replace(REFUSED, pid=9, cgroup=number + 1))
    assert [caller for _, caller in passed] == [NOBODY], "another process has that pid now"
    assert looks == 1


def test_too_many_go_without_and_memory_is_bounded() -> None:
    refusals = [replace(REFUSED, pid=0, cgroup=1 + n) for n in range(WAITING + 50)]
    passed, _ = put({}, *refusals)
    assert len(passed) == WAITING + 50
    made = Callers(lambda *_: None)
    for number in range(3 * KEPT):
        made._keep(1 + number, NOBODY)
    assert len(made._known) == KEPT


@pytest.mark.parametrize(
    ("path", "unit", "container"),
    [
        ("/sys/fs/cgroup/system.slice/db.service", "db.service", ""),
        ("/sys/fs/cgroup/system.slice/db.service/worker", "db.service", ""),
        (f"/sys/fs/cgroup/system.slice/docker-{ID}.scope", f"docker-{ID}.scope", ID),
        (f"/sys/fs/cgroup/machine.slice/libpod-{ID}.scope/container", f"libpod-{ID}.scope", ID),
        (f"/sys/fs/cgroup/kubepods/pod1/{ID}", "", ID),
        ("/sys/fs/cgroup/test", "", ""),
    ],
)
def test_unit_and_container_of_a_cgroup(path: str, unit: str, container: str) -> None:
    assert cgroups.unit_in(Path(path)) == unit
    assert cgroups.container_in(Path(path)) == container


def test_this_process_is_found() -> None:
    path = cgroups.own()
    number = path.stat().st_ino
    assert callers.look({number, 1 << 60}) == {number: Caller(str(path), cgroups.unit_in(path))}
