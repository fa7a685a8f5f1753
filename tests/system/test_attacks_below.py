"""Ways below the hooks: limits that docs/threat-model.md tells, and where each of them ends."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipsecgate.core.layout import Setting
from ipsecgate.lab.netns import Namespace
from tests.system.attacker import BEHIND
from tests.system.bed import OTHER, PEER, THERE, Bed
from tests.system.caller import Caller
from tests.system.test_attacks import attack

PROTOCOL = 253  # of the attacker's packets


@pytest.fixture
def seen(bed: Bed) -> Iterator[socket.socket]:
    """What comes out at the far end of the way out."""
    with bed.namespace.inside():
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
    with sock:
        sock.bind(("nowhere", 3))
        sock.settimeout(10)
        yield sock


def came(seen: socket.socket, to: str) -> bool:
    """Wait until a packet of the attacker's comes; tell whether it is to that address."""
    while True:
        frame, address = seen.recvfrom(2048)
        if address[2] != socket.PACKET_OUTGOING and frame[0] == 0x45 and frame[9] == PROTOCOL:
            return frame[16:20] == socket.inet_aton(to)


def test_a_packet_socket(bed: Bed, seen: socket.socket) -> None:
    bed.data.set(Setting.TUN, 0)
    assert bed.gated("raw", PEER[4]) == "EPERM"
    assert attack(bed, "below", OTHER[4], "out0") == attack(bed, "below", PEER[4], "out0") == [""]
    assert came(seen, OTHER[4]), "the first that came"
    assert came(seen, PEER[4])


def test_a_set_user_id_program_has_one_but_for_no_new_privileges(
    bed: Bed, seen: socket.socket, tmp_path: Path
) -> None:
    for folder in (tmp_path, *list(tmp_path.parents)[:-2]):
        folder.chmod(0o755)
    program = tmp_path / "python"
    shutil.copy(Path(sys.executable).resolve(), program)
    program.chmod(0o4755)
    assert attack(bed, "risen", PEER[4], f"{program} out0") == ["", "permitted"]
    assert came(seen, PEER[4])


@contextlib.contextmanager
def forwarding(bed: Bed, device: str, *links: str) -> Iterator[str]:
    """Have the host forward what comes by a device; yield its address of the link."""
    ip = ["ip", "-n", bed.namespace.name]
    for words in (*links, f"addr add 10.9.8.1/24 dev {device}", f"link set {device} up"):
        subprocess.run([*ip, *words.split()], check=True)
    bed.namespace.sysctl("ipv4/ip_forward", "1")
    with bed.namespace.inside():
        shown = subprocess.check_output(["ip", "-o", "link", "show", device], text=True)
    try:
        yield shown.partition("link/ether ")[2].split()[0].replace(":", "")
    finally:
        bed.namespace.sysctl("ipv4/ip_forward", "0")
        subprocess.run([*ip, "link", "del", device], check=True)


@contextlib.contextmanager
def blocked(bed: Bed) -> Iterator[None]:
    """Have a floor, as `floor = "xfrm-block"` makes it, towards what must be protected."""
    policy = ["ip", "-n", bed.namespace.name, "xfrm", "policy"]
    subprocess.run(
        [*policy, "add", "dst", str(THERE[4]), "dir", "out", "action", "block"], check=True
    )
    try:
        yield
    finally:
        bed.namespace.flush_xfrm()


def test_a_containers_root_that_may_write_frames(
    bed: Bed, seen: socket.socket, unique: str
) -> None:
    """The host forwards them for nobody. What it sends by other sockets is blocked."""
    inner = Namespace(unique)
    link = f"link add to0 type veth peer name eth0 netns {unique}"
    try:
        with forwarding(bed, "to0", link) as host:
            for words in (
                f"addr add {BEHIND}/24 dev eth0",
                "link set eth0 up",
                "route add default via 10.9.8.1",
            ):
                subprocess.run(["ip", "-n", unique, *words.split()], check=True)
            caller = Caller(inner.path, bed.cgroup)
            assert caller("raw", PEER[4]) == "EPERM"
            caller.close()
            assert attack(bed, "below", PEER[4], f"eth0 {host}", namespace=inner) == [""]
            assert came(seen, PEER[4])
            with blocked(bed):
                for to in (PEER[4], OTHER[4]):
                    assert attack(bed, "below", to, f"eth0 {host}", namespace=inner) == [""]
                assert came(seen, OTHER[4]), "the first that came"
    finally:
        inner.remove()


def test_a_tap_device(bed: Bed, seen: socket.socket) -> None:
    subprocess.run(["modprobe", "tun"], check=False, capture_output=True)  # or it is built in
    with forwarding(bed, "tap0", "tuntap add dev tap0 mode tap user 0") as host:
        assert attack(bed, "tapped", PEER[4], f"tap0 {host}") == [""]
        assert came(seen, PEER[4])
        with blocked(bed):
            for to in (PEER[4], OTHER[4]):
                assert attack(bed, "tapped", to, f"tap0 {host}") == [""]
            assert came(seen, OTHER[4]), "the first that came"
