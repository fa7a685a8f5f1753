"""Attempts of a gated program to get around the gate, one per run.

python attacker.py ATTACK ADDRESS [ARGUMENT]  ->  ["EPERM", ...], the errno of each step
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import platform
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import uring  # type: ignore[import-not-found]

NOBODY = 65534
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
IPV6_FREEBIND = 78
AF_XDP = 44
ETH_P_IP = 0x0800
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000  # linux/if_tun.h
PR_SET_NO_NEW_PRIVS = 38
BEHIND = "10.9.8.2"  # the source address of packets that the host forwards
PR_CAPBSET_DROP, CAPABILITY_VERSION_3 = 24, 0x20080522  # linux/prctl.h, linux/capability.h
BPF = {"x86_64": 321, "aarch64": 280}[platform.machine()]
BPF_OBJ_GET, BPF_PROG_GET_NEXT_ID, BPF_MAP_GET_FD_BY_ID, BPF_LINK_GET_FD_BY_ID = 7, 11, 14, 30
PTRACE_SEIZE = 0x4206
# chown dac_override fowner fsetid kill setgid setuid setpcap net_bind_service net_raw sys_chroot
# mknod audit_write setfcap: linux/capability.h
DOCKER = (0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31)
EXPERIMENTAL = 253  # a protocol number, RFC 3692 section 2.1
PORT, IKE = 9, 500


def result(step: Callable[[], object]) -> str:
    """Return the name of the errno of a step, "" for success."""
    try:
        step()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, repr(error))
    return ""


def checked(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), "")


def raw(address: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, EXPERIMENTAL) as sock:
        return result(lambda: sock.sendto(b"x", (address, 0)))


def datagram(address: str) -> str:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        return result(lambda: sock.sendto(b"x", (address, PORT)))


def polled(address: str, _argument: str) -> Iterator[str]:
    """Let an io_uring kernel thread make a socket and connect it."""
    with uring.Ring(uring.SQPOLL) as ring:
        yield result(lambda: uring.polled_connect(ring, address, PORT))


def inherited_ring(address: str, argument: str) -> Iterator[str]:
    """Enter a cgroup; send a datagram; then connect through a ring whose maker stays outside."""
    answer, to = os.pipe()
    with uring.Ring(uring.SQPOLL) as ring:
        child = os.fork()
        if not child:
            Path(argument, "cgroup.procs").write_text("0")
            both = datagram(address), result(lambda: uring.polled_connect(ring, address, PORT))
            os.write(to, ",".join(both).encode())
            os._exit(0)
        os.waitpid(child, 0)
    yield from os.read(answer, 64).decode().split(",")


def handed(_address: str, argument: str) -> Iterator[str]:
    """Pass a socket to a process outside the cgroup."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        with socket.socket(fileno=int(argument)) as there:
            socket.send_fds(there, [b"x"], [sock.fileno()])
        yield ""


def posing(address: str, _argument: str) -> Iterator[str]:
    """Pose as the peer: packets to an own address are exempt."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        yield result(lambda: sock.bind((address, 0)))
        yield result(lambda: sock.sendto(b"x", (address, PORT)))


def keep(*capabilities: int) -> None:
    """Drop all other capabilities, for later programs too. Raises: OSError."""
    for number in range(64):
        if number not in capabilities:
            uring.libc.prctl(PR_CAPBSET_DROP, number)
    kept = sum(1 << number for number in capabilities)
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    low, high = kept & 0xFFFFFFFF, kept >> 32
    checked(uring.libc.capset(header, struct.pack("=6I", low, low, 0, high, high, 0)))


def bpf(command: int, *words: int) -> None:
    """Call bpf(2); `words` are the first members of union bpf_attr. Raises: OSError."""
    attr = struct.pack(f"={len(words)}Q", *words) + bytes(120 - 8 * len(words))
    checked(uring.libc.syscall(BPF, command, attr, len(attr)))


def powerless(_address: str, argument: str) -> Iterator[str]:
    """As root without capabilities, open a pinned map, then sockets that write frames."""
    keep()
    name = ctypes.create_string_buffer(argument.encode())
    yield result(lambda: bpf(BPF_OBJ_GET, ctypes.addressof(name)))
    for family in (socket.AF_PACKET, AF_XDP):
        yield result(partial(socket.socket, family, socket.SOCK_RAW))


def contained(address: str, _argument: str) -> Iterator[str]:
    """Try to undo the hooks as a container's root, with the capabilities that Docker gives it."""
    outside = os.getppid()
    keep(*DOCKER)
    libc = uring.libc
    for step in (
        lambda: bpf(BPF_PROG_GET_NEXT_ID, 0),
        lambda: bpf(BPF_LINK_GET_FD_BY_ID, 1),
        lambda: bpf(BPF_MAP_GET_FD_BY_ID, 1),
        lambda: checked(libc.unshare(CLONE_NEWNET)),
        lambda: os.close(os.open("/proc/1/ns/net", os.O_RDONLY)),
        lambda: checked(libc.mount(b"none", b"/mnt", b"bpf", 0, None)),
        lambda: checked(libc.ptrace(PTRACE_SEIZE, outside, None, None)),
    ):
        yield result(step)
    words = "xfrm policy add src 0.0.0.0/0 dst 0.0.0.0/0 dir out"
    done = subprocess.run(["/sbin/ip", *words.split()], capture_output=True, text=True, check=False)
    yield done.stderr.strip()
    yield raw(address)


def unshared(address: str, argument: str) -> Iterator[str]:
    """Become root in new user and network namespaces, with a link of a chosen index.

    Send a datagram and a raw packet, then another raw packet with a socket bound to IKE's port.
    """
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    uring.libc.prctl(4, 1)  # PR_SET_DUMPABLE: otherwise root owns its files in /proc
    if uring.libc.unshare(CLONE_NEWUSER | CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    for name, line in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {NOBODY} 1"),
        ("gid_map", f"0 {NOBODY} 1"),
    ):
        Path(f"/proc/self/{name}").write_text(line)
    for words in (
        f"link add out0 index {argument} type veth peer name nowhere index {int(argument) + 1}",
        "link set out0 arp off up",
        "link set nowhere up",
        "addr add 10.9.9.9/32 dev out0",
        "route add default dev out0",
    ):
        subprocess.run(["/sbin/ip", *words.split()], check=True)
    yield datagram(address)
    yield raw(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("", IKE))
        yield raw(address)


def packet_socket(address: str, argument: str) -> Iterator[str]:
    """Write a packet below every hook; `argument` is a device and optionally a MAC address."""
    device, _, to = argument.partition(" ")
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as sock:
        where = (device, ETH_P_IP, 0, 0, bytes.fromhex(to or "00" * 6))
        yield result(lambda: sock.sendto(packet(address), where))


def set_user_id(address: str, argument: str) -> Iterator[str]:
    """As nobody, run `packet_socket` in a set-user-id program, first with, then without privileges.

    `argument` is the program, which has a copy of this file beside it, and a device.
    """
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    program, device = argument.split(" ")
    for _ in range(2):
        script = str(Path(program).with_name("attacker.py"))
        words = [program, "-S", script, "packet_socket", address, device]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        yield (json.loads(done.stdout)[0] if done.stdout else done.stderr.split()[-1])
        uring.libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def tap(address: str, argument: str) -> Iterator[str]:
    """Without capabilities, write a frame into a TAP device that this user owns.

    `argument` is the device and its MAC address on the host, which forwards the packet.
    """
    keep()
    fd = os.open("/dev/net/tun", os.O_RDWR)
    device, to = argument.split(" ")
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TAP | IFF_NO_PI))
    frame = bytes.fromhex(to) + bytes([2, 0, 0, 0, 0, 9]) + struct.pack("!H", ETH_P_IP)
    yield result(lambda: os.write(fd, frame + packet(address)))


def packet(address: str) -> bytes:
    """Return an IPv4 packet of an experimental protocol, with a correct header checksum."""
    ends = socket.inet_aton(BEHIND) + socket.inet_aton(address)
    head = struct.pack("!BBHHHBB", 0x45, 0, 21, 1, 0, 64, EXPERIMENTAL)
    total = sum(struct.unpack("!9H", head + ends))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return head + struct.pack("!H", ~total & 0xFFFF) + ends + b"x"


WAYS = {
    way.__name__: way
    for way in (
        polled, inherited_ring, handed, posing, powerless, contained, unshared, packet_socket,
        set_user_id, tap,
    )
}  # fmt: skip

if __name__ == "__main__":
    print(json.dumps(list(WAYS[sys.argv[1]](*sys.argv[2:]))))  # noqa: T201
