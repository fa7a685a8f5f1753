"""Ways round the gate that an auditor tries; what each comes to."""

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
from tests.system.bed import OTHER, PEER, Bed


def attack(
    bed: Bed, way: str, address: str, argument: str = "", fds: Sequence[int] = ()
) -> list[str]:
    words = [sys.executable, "-S", attacker.__file__, way, address, argument]
    script = f'echo 0 > {bed.cgroup}/cgroup.procs && exec nsenter --net={bed.namespace.path} "$@"'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *words],
        pass_fds=fds,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told: list[str] = json.loads(done.stdout)
    return told


def test_a_thread_of_the_kernels_is_gated_like_whoever_it_works_for(bed: Bed) -> None:
    assert attack(bed, "polled", PEER[4]) == ["EPERM"]
    assert bed.counted(Reason.REFUSE_UNCOVERED) == 1
    assert attack(bed, "polled", OTHER[4]) == [""]


def test_a_socket_handed_to_somebody_outside_stays_gated(bed: Bed) -> None:
    here, there = socket.socketpair()
    with here, there:
        assert attack(bed, "handed", "", str(there.fileno()), [there.fileno()]) == [""]
        _, (fd,), *_ = socket.recv_fds(here, 1, 1)
    with socket.socket(fileno=fd) as sock:
        with pytest.raises(PermissionError):
            sock.sendto(b"x", (PEER[4], 9))
        sock.sendto(b"x", (OTHER[4], 9))


def test_who_poses_as_the_peer_meets_the_backstop(bed: Bed) -> None:
    bed.data.set(Setting.TUN, 0)
    assert attack(bed, "posing", PEER[6]) == ["", "EPERM"]
    assert bed.counted(Reason.ALLOW_EXEMPT) == bed.counted(Reason.BLOCK_CLEAR) == 1


def test_root_of_namespaces_of_its_own_gets_nowhere(bed: Bed) -> None:
    assert attack(bed, "unshared", PEER[4], "77") == ["EPERM", "EPERM"]
    assert bed.counted(Reason.REFUSE_NETNS) == bed.counted(Reason.BLOCK_CLEAR) == 1
    assert attack(bed, "unshared", OTHER[4], "77") == ["", ""]


def test_an_interface_of_another_namespace_can_pass_for_the_daemons_own(bed: Bed) -> None:
    """A limit that docs/threat-model.md tells: only what never asked, and only with that index."""
    assert attack(bed, "unshared", PEER[4], str(bed.link)) == ["EPERM", ""]
    assert bed.counted(Reason.REFUSE_NETNS) == 1


def test_root_without_a_capability_may_open_the_pins(bed: Bed) -> None:
    """A limit that docs/threat-model.md tells: they are root's, and opening them takes no more."""
    pin = str(bed.pins.current.folder / "maps" / "settings")
    assert attack(bed, "powerless", "", pin) == [""]


def test_an_ike_daemon_that_has_ended_is_not_exempt(bed: Bed) -> None:
    """Its pid may be anybody's by now, in any cgroup."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    hooks = HookWriter(bed.data)
    hooks._exempt(gone.pid)
    assert bed.data.setting(Setting.IKE) == 0
    hooks._exempt(bed.gated.process.pid)
    assert bed.data.setting(Setting.IKE) == bed.gated.process.pid
    assert bed.data.setting(Setting.IKE_CGROUP) == bed.cgroup.stat().st_ino


def test_a_cgroup_made_anew_in_the_meantime_is_the_one_that_is_gated(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may make cgroups below it does so between a look at the name and its opening."""
    folder = bed.cgroup.with_name(f"{bed.cgroup.name}-anew")
    folder.mkdir()
    bed.pins.attach(folder)
    opening = os.open

    def anew(path: Path, *flags: int) -> int:
        if path == folder:
            folder.rmdir()
            folder.mkdir()
        return opening(path, *flags)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", anew)
            bed.pins.attach(folder)
        number = folder.stat().st_ino
        hooks = [a.hook for a in bed.pins.attachments() if a.cgroup_id == number]
        assert sorted(hooks) == sorted(HOOKS)
        bed.pins.detach(number)
    finally:
        folder.rmdir()
