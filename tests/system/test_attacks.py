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

from ipsecgate.core.layout import Reason, Setting
from ipsecgate.edges.objects import HOOKS
from ipsecgate.hooks import Hooks
from ipsecgate.lab.netns import Namespace
from tests.system import attacker
from tests.system.bed import OTHER, PEER, Bed, ike_socket


def attack(
    bed: Bed,
    way: str,
    address: str,
    argument: str = "",
    *,
    fds: Sequence[int] = (),
    namespace: Namespace | None = None,
    gated: bool = True,
) -> list[str]:
    words = [sys.executable, "-S", attacker.__file__, way, address, argument]
    join = f"echo 0 > {bed.cgroup}/cgroup.procs && " if gated else ""
    script = f'{join}exec nsenter --net={(namespace or bed.namespace).path} "$@"'
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


def test_a_ring_is_its_makers_hand(bed: Bed) -> None:
    """A limit that docs/threat-model.md tells: one made outside makes sockets outside."""
    assert attack(bed, "ring_of_another", PEER[4], str(bed.cgroup), gated=False) == ["EPERM", ""]


def test_a_socket_handed_to_somebody_outside_stays_gated(bed: Bed) -> None:
    here, there = socket.socketpair()
    with here, there:
        assert attack(bed, "handed", "", str(there.fileno()), fds=[there.fileno()]) == [""]
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
    assert attack(bed, "unshared", PEER[4], "77") == ["EPERM", "EPERM", "EPERM"]
    assert bed.counted(Reason.REFUSE_NETNS) == 1
    assert bed.counted(Reason.BLOCK_CLEAR) == 2
    assert attack(bed, "unshared", OTHER[4], "77") == ["", "", ""]


def test_an_interface_of_another_namespace_does_not_pass_for_the_daemons_own(bed: Bed) -> None:
    """It may have the same index, and a socket of IKE's port beside it."""
    index = str(bed.link)
    assert attack(bed, "unshared", PEER[4], index) == ["EPERM", "EPERM", "EPERM"]
    assert bed.counted(Reason.REFUSE_NETNS) == 1
    assert bed.counted(Reason.BLOCK_CLEAR) == 2
    assert attack(bed, "unshared", OTHER[4], index) == ["", "", ""]
    assert bed.gated("raw", PEER[4]) == "", "the daemon's own"
    assert bed.counted(Reason.BLOCK_CLEAR) == 2


def test_a_device_is_the_daemons_where_its_socket_is(bed: Bed) -> None:
    """Whoever else has IKE's port there, and a daemon of which nobody knows where it is."""
    bed.data.set(Setting.IKE_CGROUP, bed.cgroup.stat().st_ino)
    assert bed.gated("raw", PEER[4]) == "EPERM"
    bed.data.set(Setting.IKE_CGROUP, 0)
    assert bed.gated("raw", PEER[4]) == "EPERM"
    bed.renew()
    assert bed.gated("raw", PEER[4]) == ""
    bed.ike.close()
    assert bed.gated("raw", PEER[4]) == "EPERM"
    with bed.namespace.inside():
        bed.ike = ike_socket(4500)
        assert bed.gated("raw", PEER[4]) == ""
        bed.ike.close()
        bed.ike = ike_socket()


def test_root_without_a_capability_may_open_the_pins(bed: Bed) -> None:
    """A limit that docs/threat-model.md tells: they are root's, and opening them takes no more."""
    pin = str(bed.pins.current.folder / "maps" / "settings")
    opened, frames, xdp = attack(bed, "powerless", "", pin)
    assert (opened, frames) == ("", "EPERM")
    try:
        socket.socket(attacker.AF_XDP, socket.SOCK_RAW).close()
    except OSError:
        assert xdp == "EAFNOSUPPORT", "this kernel has no AF_XDP"
    else:
        assert xdp == "EPERM"


def test_a_containers_root_cannot_undo_the_hooks(bed: Bed) -> None:
    """With what Docker gives it. It may have what powerless root has, and packet sockets."""
    bed.data.set(Setting.TUN, 0)
    *tried, policy, raw = attack(bed, "contained", PEER[4])
    assert tried == ["EPERM", "EPERM", "EPERM", "EPERM", "EACCES", "EPERM", "EPERM"]
    assert policy == "RTNETLINK answers: Operation not permitted"
    assert raw == "EPERM"
    assert bed.counted(Reason.BLOCK_CLEAR) == 1


def test_an_ike_daemon_that_has_ended_is_not_exempt(bed: Bed) -> None:
    """Its pid may be anybody's by now, in any cgroup."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    hooks = Hooks(bed.data)
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
