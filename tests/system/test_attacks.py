"""Attempts to get around the gate, and the result of each (see `attacker`)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from ipsecgate.controller.hook_writer import HookWriter
from ipsecgate.core.tables.layout import Reason, Setting
from ipsecgate.edges.bpf.objects import HOOKS
from tests.system import attacker
from tests.system.hooked_cgroup import OTHER, PEER, HookedCgroup


def attack(
    hooked: HookedCgroup, way: str, address: str, argument: str = "", fds: Sequence[int] = ()
) -> list[str]:
    words = [sys.executable, "-S", attacker.__file__, way, address, argument]
    script = (
        f'echo 0 > {hooked.cgroup}/cgroup.procs && exec nsenter --net={hooked.namespace.path} "$@"'
    )
    done = subprocess.run(
        ["sh", "-c", script, "sh", *words],
        pass_fds=fds,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results: list[str] = json.loads(done.stdout)
    return results


def test_an_io_uring_kernel_thread_is_gated_like_its_process(hooked: HookedCgroup) -> None:
    assert attack(hooked, "polled", PEER[4]) == ["EPERM"]
    assert hooked.counted(Reason.REFUSE_UNCOVERED) == 1
    assert attack(hooked, "polled", OTHER[4]) == [""]


def test_a_socket_passed_to_an_ungated_process_stays_gated(hooked: HookedCgroup) -> None:
    here, there = socket.socketpair()
    with here, there:
        assert attack(hooked, "handed", "", str(there.fileno()), [there.fileno()]) == [""]
        _, (fd,), *_ = socket.recv_fds(here, 1, 1)
    with socket.socket(fileno=fd) as sock:
        with pytest.raises(PermissionError):
            sock.sendto(b"x", (PEER[4], 9))
        sock.sendto(b"x", (OTHER[4], 9))


def test_a_process_that_poses_as_the_peer_is_blocked_by_the_backstop(hooked: HookedCgroup) -> None:
    hooked.data.set(Setting.TUN, 0)
    assert attack(hooked, "posing", PEER[6]) == ["", "EPERM"]
    assert hooked.counted(Reason.ALLOW_EXEMPT) == hooked.counted(Reason.BLOCK_CLEAR) == 1


def test_root_in_its_own_namespaces_is_refused(hooked: HookedCgroup) -> None:
    assert attack(hooked, "unshared", PEER[4], "77") == ["EPERM", "EPERM"]
    assert hooked.counted(Reason.REFUSE_NETNS) == hooked.counted(Reason.BLOCK_CLEAR) == 1
    assert attack(hooked, "unshared", OTHER[4], "77") == ["", ""]


def test_an_interface_in_another_namespace_can_pass_for_the_daemons(
    hooked: HookedCgroup,
) -> None:
    """A limit in docs/threat-model.md: only raw sockets, and only with exactly that index."""
    assert attack(hooked, "unshared", PEER[4], str(hooked.link)) == ["EPERM", ""]
    assert hooked.counted(Reason.REFUSE_NETNS) == 1


def test_root_without_capabilities_can_open_the_pins(hooked: HookedCgroup) -> None:
    """A limit in docs/threat-model.md: root owns the pins, and opening them needs nothing else."""
    pin = str(hooked.pins.current.folder / "maps" / "settings")
    assert attack(hooked, "powerless", "", pin) == [""]


def test_an_ike_daemon_that_has_ended_is_not_exempt(hooked: HookedCgroup) -> None:
    """Its pid may belong to any process by now."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    hooks = HookWriter(hooked.data)
    hooks._exempt(gone.pid)
    assert hooked.data.setting(Setting.IKE) == 0
    hooks._exempt(hooked.gated.process.pid)
    assert hooked.data.setting(Setting.IKE) == hooked.gated.process.pid
    assert hooked.data.setting(Setting.IKE_CGROUP) == hooked.cgroup.stat().st_ino


def test_a_cgroup_recreated_during_attach_is_gated(
    hooked: HookedCgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cgroup is removed and recreated between the lookup of its name and its opening."""
    folder = hooked.cgroup.with_name(f"{hooked.cgroup.name}-recreated")
    folder.mkdir()
    hooked.pins.attach(folder)
    opening = os.open

    def recreate(path: Path, *flags: int) -> int:
        if path == folder:
            folder.rmdir()
            folder.mkdir()
        return opening(path, *flags)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", recreate)
            hooked.pins.attach(folder)
        number = folder.stat().st_ino
        hooks = [a.hook for a in hooked.pins.attachments() if a.cgroup_id == number]
        assert sorted(hooks) == sorted(HOOKS)
        hooked.pins.detach(number)
    finally:
        folder.rmdir()
