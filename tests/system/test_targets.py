"""The cgroups that a configuration names: gated when they appear, and a reload's part in it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from ipsecgate.edges.bpf.objects import HOOKS
from ipsecgate.edges.bpf.pins import Pins
from ipsecgate.edges.host import cgroups
from ipsecgate.edges.host.inotify import Appeared, Folders, Vanished
from tests.system.caller import Caller
from tests.system.hooked_cgroup import OTHER, PEER, THERE
from tests.system.unit import PORT, Unit, caller, refused, unit

__all__ = ["caller", "unit"]

POLICY = f'[[policy]]\nname = "there"\nremote = ["{THERE[4]}"]\n'


@pytest.fixture
def folder(unit: Unit) -> Iterator[Path]:
    """A cgroup to make others in."""
    path = cgroups.root() / f"{unit.name}-tree"
    path.mkdir()
    yield path
    for inside, _, _ in os.walk(path, topdown=False):
        Path(inside).rmdir()


def gated(unit: Unit) -> set[int]:
    pins = Pins(Path("/sys/fs/bpf"), unit.name)
    hooks: dict[int, set[str]] = {}
    for attachment in pins.attachments():
        hooks.setdefault(attachment.cgroup_id, set()).add(attachment.hook)
    return {number for number, names in hooks.items() if names >= set(HOOKS)}


def is_gated(unit: Unit, cgroup: Path) -> bool:
    return cgroup.stat().st_ino in gated(unit)


def is_gone(unit: Unit, number: int) -> bool:
    return number not in gated(unit)


@contextlib.contextmanager
def calling(unit: Unit, cgroup: Path) -> Iterator[Caller]:
    made = Caller(unit.namespace.path, cgroup)
    try:
        yield made
    finally:
        made.close()


def start(unit: Unit, *targets: str, code: str = "") -> None:
    unit.configure(f"cgroups = {list(targets)!r}\n{POLICY}")
    unit.start(code=code)
    assert unit.hears("READY=1"), unit.log


def waiting(unit: Unit) -> list[str]:
    return [error for error in unit.ask()["errors"] if "does not exist" in error]


@pytest.mark.parametrize("kind", ["path", "unit", "container"])
def test_what_is_not_there_is_waited_for_and_followed(unit: Unit, folder: Path, kind: str) -> None:
    number = f"{unit.name}0123456789ab"
    names = {"path": "x/y", "unit": f"x/{unit.name}.service", "container": f"x/crio-{number}.scope"}
    cgroup = folder / names[kind]
    target = {"path": str(cgroup), "unit": f"unit:{unit.name}", "container": f"container:{number}"}
    start(unit, target[kind])
    assert waiting(unit) == [
        f"cgroup {target[kind]} does not exist: it will be gated when it appears"
    ]
    assert unit.cli("status").returncode == 1
    for _ in range(3):
        cgroup.mkdir(parents=True, exist_ok=True)
        assert unit.eventually(lambda: is_gated(unit, cgroup)), unit.log
        assert unit.eventually(lambda: waiting(unit) == [])
        with calling(unit, cgroup) as caller:
            assert refused(caller)
            assert caller("tcp", OTHER[4], PORT) == "EINPROGRESS"
        before = cgroup.stat().st_ino
        assert unit.eventually(lambda: not (cgroup / "cgroup.procs").read_text())
        cgroup.rmdir()
        assert unit.eventually(partial(is_gone, unit, before), 60), unit.log
        assert unit.eventually(lambda: waiting(unit))
    assert "only found every" not in unit.log, "the kernel told it"


def test_a_neighbour_is_not_gated(unit: Unit, folder: Path) -> None:
    start(unit, f"unit:{unit.name}")
    neighbour, named = folder / f"{unit.name}x.service", folder / f"{unit.name}.service"
    neighbour.mkdir()
    named.mkdir()
    assert unit.eventually(lambda: is_gated(unit, named))
    assert not is_gated(unit, neighbour)


def test_many_at_once(unit: Unit, folder: Path) -> None:
    start(unit, f"unit:{unit.name}")
    made = [folder / f"{n}.slice" / f"{unit.name}.service" for n in range(50)]
    for cgroup in made:
        cgroup.mkdir(parents=True)
    wanted = {cgroup.stat().st_ino for cgroup in made}
    assert unit.eventually(lambda: wanted <= gated(unit)), unit.log


def test_without_inotify_it_is_looked_for(unit: Unit, folder: Path) -> None:
    unit.configure(f'cgroups = ["{folder}/late"]\n{POLICY}')
    unit.start(
        code="from ipsecgate.edges.host import inotify\n"
        "inotify._libc.inotify_add_watch = lambda *words: -1\n"
    )
    assert unit.hears("READY=1"), unit.log
    (folder / "late").mkdir()
    assert unit.eventually(lambda: is_gated(unit, folder / "late")), unit.log
    assert "only found every 2 s" in unit.log


def test_a_sockets_gate_outlives_its_cgroup(unit: Unit, folder: Path) -> None:
    """Its pins stay until the last socket that was made in it is closed."""
    cgroup = folder / "short"
    cgroup.mkdir()
    start(unit, str(cgroup))
    before = cgroup.stat().st_ino
    with calling(unit, cgroup) as mover:
        assert mover("kept sendto", PEER[4], PORT) == "EPERM"
        (folder / "cgroup.procs").write_text(str(mover.process.pid))
        assert unit.eventually(lambda: not (cgroup / "cgroup.procs").read_text())
        cgroup.rmdir()
        time.sleep(3)
        assert mover("kept sendto", PEER[4], PORT) == "EPERM"
        assert before in gated(unit)
    assert unit.eventually(lambda: before not in gated(unit))


def test_what_can_never_be_a_cgroup_is_refused(unit: Unit) -> None:
    unit.configure('cgroups = ["/tmp"]\n')
    told = unit.cli("run")
    assert told.returncode == 2
    assert "gate.cgroups: /tmp is not below" in told.stderr
    assert not Pins(Path("/sys/fs/bpf"), unit.name).loaded


# --- reload ------------------------------------------------------------------------------


def test_a_reload_gates_what_is_new_and_ungates_what_is_not_named_any_more(
    unit: Unit, folder: Path
) -> None:
    old, new, by_hand = (folder / name for name in ("old", "new", "by-hand"))
    for cgroup in (old, new, by_hand):
        cgroup.mkdir()
    start(unit, str(old))
    assert unit.cli("attach", str(by_hand)).returncode == 0
    unit.configure(f'cgroups = ["{new}"]\n{POLICY}')
    unit.heard.clear()
    told = unit.cli("--json", "reload")
    assert told.returncode == 0, told.stderr
    assert is_gated(unit, new)
    assert not is_gated(unit, old)
    assert is_gated(unit, by_hand), "the configuration never named it"
    assert unit.hears("READY=1")
    order = [line.split("=")[0] for line in unit.heard]
    assert order.index("RELOADING") < order.index("READY")
    assert "MONOTONIC_USEC" in order


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[gate", "Expected ']'"),
        ('[gate]\nvici = "VICI"\ncgroups = ["/tmp"]\n', "gate.cgroups: /tmp is not below"),
        ('[gate]\nvici = "/elsewhere"\n', "gate.vici: cannot change"),
        ("[gate]\nmood = 1\n", "gate.mood: unknown key"),
    ],
)
def test_a_configuration_that_is_refused_changes_nothing(
    unit: Unit, caller: Caller, text: str, said: str
) -> None:
    start(unit, str(unit.cgroup))
    before = unit.ask()["policies"]
    unit.config.write_text(text.replace("VICI", f"{unit.folder}/vici"))
    told = unit.cli("reload")
    assert told.returncode == 2
    assert said in " ".join(told.stderr.split())
    assert refused(caller)
    status = unit.ask()
    assert status["policies"] == before
    assert any(said in error for error in status["errors"])
    assert is_gated(unit, unit.cgroup)
    unit.configure(f'cgroups = ["{unit.cgroup}"]\n{POLICY}')
    assert unit.cli("reload").returncode == 0
    assert not any("reload" in error for error in unit.ask()["errors"])


def test_policies_modes_and_errnos_change_at_sighup(unit: Unit, caller: Caller) -> None:
    start(unit, str(unit.cgroup))
    assert caller("tcp", PEER[4], PORT) == "EPERM"
    assert caller("tcp", OTHER[4], PORT) == "EINPROGRESS"
    other = POLICY.replace(str(THERE[4]), "192.0.2.0/24")
    unit.configure(
        f'cgroups = ["{unit.cgroup}"]\n[errno]\nuncovered = "EACCES"\n'
        f'{other}[[policy]]\nname = "away"\nremote = ["{THERE[4]}"]\naction = "bypass"\n'
    )
    assert unit.process is not None
    unit.process.send_signal(signal.SIGHUP)
    assert unit.eventually(lambda: caller("tcp", OTHER[4], PORT) == "EACCES", 10), unit.log
    assert caller("tcp", PEER[4], PORT) == "EINPROGRESS"
    unit.configure(f'mode = "audit"\ncgroups = ["{unit.cgroup}"]\n{other}')
    assert unit.cli("reload").returncode == 0
    assert caller("tcp", OTHER[4], PORT) == "EINPROGRESS"
    unit.configure(f'default = "deny"\ncgroups = ["{unit.cgroup}"]\n{other}')
    assert unit.cli("reload").returncode == 0
    assert caller("tcp", PEER[4], PORT) == "EPERM"
    assert unit.cli("--json", "status").stdout.count('"default": "deny"') == 1


def test_without_a_controller_reload_says_so(unit: Unit) -> None:
    assert unit.cli("reload").returncode == 3


# --- the edge -----------------------------------------------------------------------------


def test_folders_that_come_and_go_are_told(folder: Path) -> None:
    folders = Folders(folder, lambda path: path.name != "deaf")
    (folder / "a/b").mkdir(parents=True)
    (folder / "deaf/c").mkdir(parents=True)
    told = list(folders.news())
    assert {Appeared(folder / name) for name in ("a", "a/b", "deaf")} == set(told)
    (folder / "a/b/c").mkdir()
    assert list(folders.news()) == [Appeared(folder / "a/b/c")]
    (folder / "a/b/c").rmdir()
    (folder / "a/b").rmdir()
    assert list(folders.news()) == [Vanished(folder / "a/b/c"), Vanished(folder / "a/b")]
    (folder / "a/b").mkdir()
    (folder / "a/b/d").mkdir()
    assert Appeared(folder / "a/b/d") in list(folders.news())
    folders.close()
