"""The cgroups that a configuration names are gated when they appear, and follow a reload."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from ipsecgate.edges.bpf.objects import HOOKS
from ipsecgate.edges.bpf.pins import Pins
from ipsecgate.edges.host import cgroups
from ipsecgate.edges.host.inotify import Appeared, Folders, Vanished
from tests.clients.containers import Containers
from tests.system.caller import Caller
from tests.system.controller_process import PORT, ControllerProcess, caller, controller, refused
from tests.system.hooked_cgroup import OTHER, PEER, THERE

__all__ = ["caller", "controller"]

REFUSED = (
    "the last reload was refused, so nothing has changed: "  # in the status until a reload succeeds
)
# Logged where inotify does not work.
POLLING = "only found every"
POLICY = f'[[policy]]\nname = "there"\nremote = ["{THERE[4]}"]\n'


@pytest.fixture
def folder(controller: ControllerProcess) -> Iterator[Path]:
    """A cgroup in which tests create others."""
    path = cgroups.root() / f"{controller.name}-tree"
    path.mkdir()
    yield path
    for inside, _, _ in os.walk(path, topdown=False):
        Path(inside).rmdir()


def gated(controller: ControllerProcess) -> set[int]:
    pins = Pins(Path("/sys/fs/bpf"), controller.name)
    hooks: dict[int, set[str]] = {}
    for attachment in pins.attachments():
        hooks.setdefault(attachment.cgroup_id, set()).add(attachment.hook)
    return {number for number, names in hooks.items() if names >= set(HOOKS)}


def is_gated(controller: ControllerProcess, cgroup: Path) -> bool:
    return cgroup.stat().st_ino in gated(controller)


def is_gone(controller: ControllerProcess, number: int) -> bool:
    return number not in gated(controller)


@contextlib.contextmanager
def calling(controller: ControllerProcess, cgroup: Path) -> Iterator[Caller]:
    made = Caller(controller.namespace.path, cgroup)
    try:
        yield made
    finally:
        made.close()


def start(controller: ControllerProcess, *targets: str, code: str = "") -> None:
    controller.configure(f"cgroups = {list(targets)!r}\n{POLICY}")
    controller.start(code=code)
    assert controller.hears("READY=1"), controller.log


def waiting(controller: ControllerProcess) -> list[str]:
    return [e["text"] for e in controller.ask()["errors"] if "it will be gated when" in e["text"]]


@pytest.mark.parametrize("kind", ["path", "unit"])
def test_a_missing_target_is_gated_whenever_it_appears(
    controller: ControllerProcess, folder: Path, kind: str
) -> None:
    cgroup = folder / {"path": "x/y", "unit": f"x/{controller.name}.service"}[kind]
    target = {"path": str(cgroup), "unit": f"unit:{controller.name}"}
    start(controller, target[kind])
    (error,) = waiting(controller)
    assert target[kind] in error
    assert controller.cli("status").returncode == 1
    for _ in range(3):
        cgroup.mkdir(parents=True, exist_ok=True)
        assert controller.eventually(lambda: is_gated(controller, cgroup)), controller.log
        assert controller.eventually(lambda: waiting(controller) == [])
        with calling(controller, cgroup) as caller:
            assert refused(caller)
            assert caller("tcp", OTHER[4], PORT) == "EINPROGRESS"
        before = cgroup.stat().st_ino
        assert controller.eventually(lambda: not (cgroup / "cgroup.procs").read_text())
        cgroup.rmdir()
        assert controller.eventually(partial(is_gone, controller, before), 60), controller.log
        assert controller.eventually(lambda: waiting(controller))
    assert POLLING not in controller.log, "inotify reported it"


def test_a_cgroup_with_a_similar_name_is_not_gated(
    controller: ControllerProcess, folder: Path
) -> None:
    start(controller, f"unit:{controller.name}")
    neighbour, named = folder / f"{controller.name}x.service", folder / f"{controller.name}.service"
    neighbour.mkdir()
    named.mkdir()
    assert controller.eventually(lambda: is_gated(controller, named))
    assert not is_gated(controller, neighbour)


def test_a_unit_of_a_user_or_in_a_container_is_not_the_systems(
    controller: ControllerProcess, folder: Path
) -> None:
    start(controller, f"unit:{controller.name}")
    name = f"{controller.name}.service"
    others = [
        folder / place / name
        for place in ("user@1000.service/app.slice", "libpod-1.scope/system.slice", "ab" * 32)
    ]
    own = folder / "system.slice" / name
    for cgroup in (*others, own):
        cgroup.mkdir(parents=True)
    assert controller.eventually(lambda: is_gated(controller, own)), controller.log
    assert gated(controller) == {own.stat().st_ino}


def test_a_container_is_gated_by_what_podman_knows_of_it(
    controller: ControllerProcess, folder: Path
) -> None:
    """By name, annotation, and with podman 5 by label; not conmon's cgroup, nor one named like it.

    Also another container that takes the name, which has another id.
    """
    name = f"{controller.name}-webshop"
    by_name, annotated = f"container:{name}", f"label:front={name}"
    labelled, other = f"label:tier={name}", f"label:tier={name}x"
    start(controller, by_name, annotated, labelled, other)
    errors = "\n".join(waiting(controller))
    assert f"{by_name} is not running" in errors
    assert f"{annotated} is on no running container" in errors
    assert controller.cli("status").returncode == 1
    alike = folder / name
    alike.mkdir()
    version = subprocess.run(["podman", "--version"], capture_output=True, text=True, check=True)
    reads_labels = int(re.findall(r"\d+", version.stdout)[0]) >= 5
    ids = set()
    for _ in range(2):
        # podman's own cleanup may still write there.
        with tempfile.TemporaryDirectory(prefix="box-", ignore_cleanup_errors=True) as place:
            box = Containers(Path(place), folder)
            argv = box.podman("crun", name, ["/bin/busybox", "sleep", "600"], None)
            at = argv.index("--rm")
            argv[at:at] = [f"--annotation=front={name}", f"--label=tier={name}"]
            process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
            assert controller.eventually(lambda: gated(controller)), controller.log
            (cgroup,) = (c for c in cgroups.walk() if c.stat().st_ino in gated(controller))
            assert re.fullmatch("libpod-[0-9a-f]{64}", cgroup.name)
            found = cgroups.find_all([by_name, annotated, labelled, other])
            assert found[by_name] == found[annotated] == [cgroup]
            assert found[labelled] == ([cgroup] if reads_labels else [])
            assert found[other] == []
            left = [other] if reads_labels else [labelled, other]
            assert [line.split()[0] for line in waiting(controller)] == left
            ids.add(cgroup.name)
            # As an operator would, for what runs now.
            assert controller.cli("detach", annotated).returncode == 0
            assert not gated(controller)
            assert controller.cli("attach", annotated).returncode == 0
            assert is_gated(controller, cgroup)
            subprocess.run([*argv[: argv.index("run")], "kill", name], check=True)
            process.wait()
            assert controller.eventually(lambda: not gated(controller), 60), controller.log
    assert len(ids) == 2
    assert not is_gated(controller, alike), "only its name is a container's"
    refused = controller.cli("attach", annotated)
    assert refused.returncode == 2
    assert f"{annotated} is on no running container" in " ".join(refused.stderr.split())


@pytest.mark.parametrize("target", ["label:=web", "pod:web-1", "container:"])
def test_a_malformed_target_is_refused(controller: ControllerProcess, target: str) -> None:
    controller.configure(f'cgroups = ["{target}"]\n')
    done = controller.cli("run")
    assert done.returncode == 2
    assert f"gate.cgroups: '{target}'" in done.stderr
    assert not Pins(Path("/sys/fs/bpf"), controller.name).loaded
    assert controller.cli("attach", target).returncode == 2


def test_many_cgroups_created_at_once_are_all_gated(
    controller: ControllerProcess, folder: Path
) -> None:
    start(controller, f"unit:{controller.name}")
    made = [folder / f"{n}.slice" / f"{controller.name}.service" for n in range(50)]
    for cgroup in made:
        cgroup.mkdir(parents=True)
    wanted = {cgroup.stat().st_ino for cgroup in made}
    assert controller.eventually(lambda: wanted <= gated(controller)), controller.log


def test_without_inotify_targets_are_polled_for(
    controller: ControllerProcess, folder: Path
) -> None:
    controller.configure(f'cgroups = ["{folder}/late"]\n{POLICY}')
    controller.start(
        code="from ipsecgate.edges.host import inotify\n"
        "inotify._libc.inotify_add_watch = lambda *words: -1\n"
    )
    assert controller.hears("READY=1"), controller.log
    (folder / "late").mkdir()
    assert controller.eventually(lambda: is_gated(controller, folder / "late")), controller.log
    assert f"{POLLING} 2 s" in controller.log


def test_a_socket_stays_gated_after_its_cgroup_is_removed(
    controller: ControllerProcess, folder: Path
) -> None:
    """Its pins stay until the last socket that was made in it is closed."""
    cgroup = folder / "short"
    cgroup.mkdir()
    start(controller, str(cgroup))
    before = cgroup.stat().st_ino
    with calling(controller, cgroup) as mover:
        assert mover("kept sendto", PEER[4], PORT) == "EPERM"
        (folder / "cgroup.procs").write_text(str(mover.process.pid))
        assert controller.eventually(lambda: not (cgroup / "cgroup.procs").read_text())
        cgroup.rmdir()
        time.sleep(3)
        assert mover("kept sendto", PEER[4], PORT) == "EPERM"
        assert before in gated(controller)
    assert controller.eventually(lambda: before not in gated(controller))


def test_a_path_outside_the_cgroup_tree_is_refused(controller: ControllerProcess) -> None:
    controller.configure('cgroups = ["/tmp"]\n')
    done = controller.cli("run")
    assert done.returncode == 2
    assert "gate.cgroups: /tmp is not below" in done.stderr
    assert not Pins(Path("/sys/fs/bpf"), controller.name).loaded


# --- reload ------------------------------------------------------------------------------


def test_a_reload_gates_new_targets_and_ungates_removed_ones(
    controller: ControllerProcess, folder: Path
) -> None:
    old, new, by_hand = (folder / name for name in ("old", "new", "by-hand"))
    for cgroup in (old, new, by_hand):
        cgroup.mkdir()
    start(controller, str(old))
    assert controller.cli("attach", str(by_hand)).returncode == 0
    controller.configure(f'cgroups = ["{new}"]\n{POLICY}')
    controller.heard.clear()
    done = controller.cli("--json", "reload")
    assert done.returncode == 0, done.stderr
    assert is_gated(controller, new)
    assert not is_gated(controller, old)
    assert is_gated(controller, by_hand), "the configuration never named it"
    assert controller.hears("READY=1")
    order = [line.split("=")[0] for line in controller.heard]
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
def test_a_refused_reload_changes_nothing(
    controller: ControllerProcess, caller: Caller, text: str, said: str
) -> None:
    start(controller, str(controller.cgroup))
    before = controller.ask()["policies"]
    controller.config.write_text(text.replace("VICI", f"{controller.folder}/vici"))
    done = controller.cli("reload")
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())
    assert refused(caller)
    status = controller.ask()
    assert status["policies"] == before
    texts = [error["text"] for error in status["errors"]]
    assert any(text.startswith(REFUSED) and said in text for text in texts)
    assert is_gated(controller, controller.cgroup)
    controller.configure(f'cgroups = ["{controller.cgroup}"]\n{POLICY}')
    assert controller.cli("reload").returncode == 0
    assert not any(error["text"].startswith(REFUSED) for error in controller.ask()["errors"])


def test_policies_modes_and_errnos_change_at_sighup(
    controller: ControllerProcess, caller: Caller
) -> None:
    start(controller, str(controller.cgroup))
    assert caller("tcp", PEER[4], PORT) == "EPERM"
    assert caller("tcp", OTHER[4], PORT) == "EINPROGRESS"
    other = POLICY.replace(str(THERE[4]), "192.0.2.0/24")
    controller.configure(
        f'cgroups = ["{controller.cgroup}"]\n[errno]\nuncovered = "EACCES"\n'
        f'{other}[[policy]]\nname = "away"\nremote = ["{THERE[4]}"]\naction = "bypass"\n'
    )
    assert controller.process is not None
    controller.process.send_signal(signal.SIGHUP)
    assert controller.eventually(lambda: caller("tcp", OTHER[4], PORT) == "EACCES", 10), (
        controller.log
    )
    assert caller("tcp", PEER[4], PORT) == "EINPROGRESS"
    controller.configure(f'mode = "audit"\ncgroups = ["{controller.cgroup}"]\n{other}')
    assert controller.cli("reload").returncode == 0
    assert caller("tcp", OTHER[4], PORT) == "EINPROGRESS"
    controller.configure(f'default = "deny"\ncgroups = ["{controller.cgroup}"]\n{other}')
    assert controller.cli("reload").returncode == 0
    assert caller("tcp", PEER[4], PORT) == "EPERM"
    assert controller.cli("--json", "status").stdout.count('"default": "deny"') == 1


def test_reload_without_a_controller_is_an_error(controller: ControllerProcess) -> None:
    assert controller.cli("reload").returncode == 3


# --- the inotify edge -----------------------------------------------------------------------


def test_folders_report_what_appears_and_vanishes(folder: Path) -> None:
    folders = Folders(folder, lambda path: path.name != "deaf")
    (folder / "a/b").mkdir(parents=True)
    (folder / "deaf/c").mkdir(parents=True)
    found = list(folders.events())
    assert {Appeared(folder / name) for name in ("a", "a/b", "deaf")} == set(found)
    (folder / "a/b/c").mkdir()
    assert list(folders.events()) == [Appeared(folder / "a/b/c")]
    (folder / "a/b/c").rmdir()
    (folder / "a/b").rmdir()
    assert list(folders.events()) == [Vanished(folder / "a/b/c"), Vanished(folder / "a/b")]
    (folder / "a/b").mkdir()
    (folder / "a/b/d").mkdir()
    assert Appeared(folder / "a/b/d") in list(folders.events())
    folders.close()
