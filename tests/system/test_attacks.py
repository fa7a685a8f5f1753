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
from ipsecgate.core.tables.packed import ports_setting
from ipsecgate.edges.bpf.objects import HOOKS
from ipsecgate.lab.netns import Namespace
from tests.system import attacker
from tests.system.hooked_cgroup import OTHER, PEER, HookedCgroup, ike_socket


def attack(
    hooked: HookedCgroup,
    way: str,
    address: str,
    argument: str = "",
    *,
    fds: Sequence[int] = (),
    namespace: Namespace | None = None,
    gated: bool = True,
) -> list[str]:
    """Run an attack, by default in the gated cgroup and its namespace; return each step's errno."""
    words = [sys.executable, "-S", attacker.__file__, way, address, argument]
    join = f"echo 0 > {hooked.cgroup}/cgroup.procs && " if gated else ""
    script = f'{join}exec nsenter --net={(namespace or hooked.namespace).path} "$@"'
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


def test_an_inherited_ring_acts_for_its_ungated_maker(hooked: HookedCgroup) -> None:
    """A limit in docs/threat-model.md: a ring made outside the cgroup makes sockets outside."""
    results = attack(hooked, "inherited_ring", PEER[4], str(hooked.cgroup), gated=False)
    assert results == ["EPERM", ""]


def test_a_socket_passed_to_an_ungated_process_stays_gated(hooked: HookedCgroup) -> None:
    here, there = socket.socketpair()
    with here, there:
        assert attack(hooked, "handed", "", str(there.fileno()), fds=[there.fileno()]) == [""]
        _, (fd,), *_ = socket.recv_fds(here, 1, 1)
    with socket.socket(fileno=fd) as sock:
        with pytest.raises(PermissionError):
            sock.sendto(b"x", (PEER[4], 9))
        sock.sendto(b"x", (OTHER[4], 9))


def test_a_process_that_poses_as_the_peer_is_blocked_by_the_backstop(hooked: HookedCgroup) -> None:
    hooked.data.set_tunnels(())
    assert attack(hooked, "posing", PEER[6]) == ["", "EPERM"]
    assert hooked.counted(Reason.ALLOW_EXEMPT) == hooked.counted(Reason.BLOCK_CLEAR) == 1


def test_root_in_its_own_namespaces_is_refused(hooked: HookedCgroup) -> None:
    assert attack(hooked, "unshared", PEER[4], "77") == ["EPERM", "EPERM", "EPERM"]
    assert hooked.counted(Reason.REFUSE_NETNS) == 1
    assert hooked.counted(Reason.BLOCK_CLEAR) == 2
    assert attack(hooked, "unshared", OTHER[4], "77") == ["", "", ""]


def test_an_interface_in_another_namespace_does_not_pass_for_the_daemons(
    hooked: HookedCgroup,
) -> None:
    """Neither the same index nor a socket on IKE's port in that namespace helps."""
    index = str(hooked.link)
    assert attack(hooked, "unshared", PEER[4], index) == ["EPERM", "EPERM", "EPERM"]
    assert hooked.counted(Reason.REFUSE_NETNS) == 1
    assert hooked.counted(Reason.BLOCK_CLEAR) == 2
    assert attack(hooked, "unshared", OTHER[4], index) == ["", "", ""]
    assert hooked.gated("raw", PEER[4]) == "", "the daemon's own device"
    assert hooked.counted(Reason.BLOCK_CLEAR) == 2


def test_the_daemons_device_is_recognised_by_its_socket(hooked: HookedCgroup) -> None:
    """The socket must be on IKE's port, in the daemon's cgroup, and in the device's namespace."""
    hooked.data.set(Setting.IKE_CGROUP, hooked.cgroup.stat().st_ino)
    assert hooked.gated("raw", PEER[4]) == "EPERM", "the socket is another cgroup's"
    hooked.data.set(Setting.IKE_CGROUP, 0)
    assert hooked.gated("raw", PEER[4]) == "EPERM", "the daemon's cgroup is not known"
    hooked.renew()
    assert hooked.gated("raw", PEER[4]) == ""
    hooked.ike.close()
    assert hooked.gated("raw", PEER[4]) == "EPERM", "there is no socket"
    with hooked.namespace.inside():
        for port in (4500, 4600):
            hooked.ike = ike_socket(port)
            assert hooked.gated("raw", PEER[4]) == ("" if port == 4500 else "EPERM")
            hooked.data.set(Setting.IKE_PORTS, ports_setting((4600, 61000)))
            assert hooked.gated("raw", PEER[4]) == ("" if port == 4600 else "EPERM")
            hooked.data.set(Setting.IKE_PORTS, ports_setting((61000, 4600)))
            assert hooked.gated("raw", PEER[4]) == ("" if port == 4600 else "EPERM")
            hooked.ike.close()
            hooked.renew()
        hooked.ike = ike_socket()


def test_root_without_capabilities_can_open_the_pins(hooked: HookedCgroup) -> None:
    """A limit in docs/threat-model.md: root owns the pins, and opening them needs nothing else."""
    pin = str(hooked.pins.current.folder / "maps" / "settings")
    opened, packet_socket, xdp = attack(hooked, "powerless", "", pin)
    assert (opened, packet_socket) == ("", "EPERM")
    try:
        socket.socket(attacker.AF_XDP, socket.SOCK_RAW).close()
    except OSError:
        assert xdp == "EAFNOSUPPORT", "this kernel has no AF_XDP"
    else:
        assert xdp == "EPERM"


def test_a_containers_root_cannot_undo_the_hooks(hooked: HookedCgroup) -> None:
    """With Docker's capabilities. As root it may open visible pins; it may make packet sockets."""
    hooked.data.set_tunnels(())
    *steps, policy, raw = attack(hooked, "contained", PEER[4])
    assert steps == ["EPERM", "EPERM", "EPERM", "EPERM", "EACCES", "EPERM", "EPERM"]
    assert policy == "RTNETLINK answers: Operation not permitted"
    assert raw == "EPERM"
    assert hooked.counted(Reason.BLOCK_CLEAR) == 1


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
