"""Attacks below the hooks: limits in docs/threat-model.md, and what stops each of them."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipsecgate.lab.netns import Namespace
from tests.system.attacker import BEHIND, EXPERIMENTAL
from tests.system.caller import Caller
from tests.system.hooked_cgroup import OTHER, PEER, THERE, HookedCgroup
from tests.system.test_attacks import attack


@pytest.fixture
def wire(hooked: HookedCgroup) -> Iterator[socket.socket]:
    """A packet socket at the far end of the link that leads out."""
    with hooked.namespace.inside():
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
    with sock:
        sock.bind(("nowhere", 3))
        sock.settimeout(10)
        yield sock


def next_packet_goes_to(address: str, wire: socket.socket) -> bool:
    """Wait for the attacker's next packet; return whether it is for this address.

    Raises: TimeoutError.
    """
    while True:
        packet, source = wire.recvfrom(2048)
        if source[2] != socket.PACKET_OUTGOING and packet[0] == 0x45 and packet[9] == EXPERIMENTAL:
            return packet[16:20] == socket.inet_aton(address)


def test_a_packet_socket_passes_below_the_backstop(
    hooked: HookedCgroup, wire: socket.socket
) -> None:
    hooked.data.set_tunnels(())
    assert hooked.gated("raw", PEER[4]) == "EPERM"
    assert attack(hooked, "packet_socket", OTHER[4], "out0") == [""]
    assert next_packet_goes_to(OTHER[4], wire), "the raw packet left"
    assert attack(hooked, "packet_socket", PEER[4], "out0") == [""]
    assert next_packet_goes_to(PEER[4], wire)


def test_no_new_privileges_takes_a_set_user_id_programs_packet_socket(
    hooked: HookedCgroup, wire: socket.socket, tmp_path: Path
) -> None:
    for folder in (tmp_path, *list(tmp_path.parents)[:-2]):
        folder.chmod(0o755)
    program = tmp_path / "python"
    shutil.copy(Path(sys.executable).resolve(), program)
    program.chmod(0o4755)
    for name in ("attacker.py", "uring.py"):  # nobody may not be able to read the checkout
        shutil.copy(Path(__file__).with_name(name), tmp_path)
    assert attack(hooked, "set_user_id", PEER[4], f"{program} out0") == ["", "permitted"]
    assert next_packet_goes_to(PEER[4], wire)


@contextlib.contextmanager
def forwarding(hooked: HookedCgroup, device: str, link: str) -> Iterator[str]:
    """Add a device and forward the packets that it receives; yield its MAC address in hex."""
    ip = ["ip", "-n", hooked.namespace.name]
    for words in (link, f"addr add 10.9.8.1/24 dev {device}", f"link set {device} up"):
        subprocess.run([*ip, *words.split()], check=True)
    hooked.namespace.sysctl("ipv4/ip_forward", "1")
    with hooked.namespace.inside():
        shown = subprocess.check_output(["ip", "-o", "link", "show", device], text=True)
    try:
        yield shown.partition("link/ether ")[2].split()[0].replace(":", "")
    finally:
        hooked.namespace.sysctl("ipv4/ip_forward", "0")
        subprocess.run([*ip, "link", "del", device], check=True)


@contextlib.contextmanager
def blocked(hooked: HookedCgroup) -> Iterator[None]:
    """Block packets to the protected network by a kernel policy, as the host floor does."""
    policy = ["ip", "-n", hooked.namespace.name, "xfrm", "policy"]
    subprocess.run(
        [*policy, "add", "dst", str(THERE[4]), "dir", "out", "action", "block"], check=True
    )
    try:
        yield
    finally:
        hooked.namespace.flush_xfrm()


def test_the_host_forwards_frames_of_a_containers_root(
    hooked: HookedCgroup, wire: socket.socket, unique: str
) -> None:
    """Forwarded packets have no socket, so only a kernel policy blocks them."""
    inner = Namespace(unique)
    link = f"link add to0 type veth peer name eth0 netns {unique}"
    try:
        with forwarding(hooked, "to0", link) as mac:
            for words in (
                f"addr add {BEHIND}/24 dev eth0",
                "link set eth0 up",
                "route add default via 10.9.8.1",
            ):
                subprocess.run(["ip", "-n", unique, *words.split()], check=True)
            caller = Caller(inner.path, hooked.cgroup)
            assert caller("raw", PEER[4]) == "EPERM"
            caller.close()

            def write(address: str) -> None:
                argument = f"eth0 {mac}"
                done = attack(hooked, "packet_socket", address, argument, namespace=inner)
                assert done == [""]

            write(PEER[4])
            assert next_packet_goes_to(PEER[4], wire)
            with blocked(hooked):
                write(PEER[4])
                write(OTHER[4])
                assert next_packet_goes_to(OTHER[4], wire), "the kernel policy blocked nothing"
    finally:
        inner.remove()


def test_the_host_forwards_frames_of_a_tap_device(
    hooked: HookedCgroup, wire: socket.socket
) -> None:
    """As above: only a kernel policy blocks them."""
    subprocess.run(["modprobe", "tun"], check=False, capture_output=True)  # fails if built in
    with forwarding(hooked, "tap0", "tuntap add dev tap0 mode tap user 0") as mac:
        assert attack(hooked, "tap", PEER[4], f"tap0 {mac}") == [""]
        assert next_packet_goes_to(PEER[4], wire)
        with blocked(hooked):
            for address in (PEER[4], OTHER[4]):
                assert attack(hooked, "tap", address, f"tap0 {mac}") == [""]
            assert next_packet_goes_to(OTHER[4], wire), "the kernel policy blocked nothing"
