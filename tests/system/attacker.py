"""Ways round the gate, each tried by a program that is gated: one word, one line of JSON.

python attacker.py WAY ADDRESS [ARGUMENT]  ->  ["EPERM", ...], what each step was told
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
BEHIND = "10.9.8.2"  # who sends what is forwarded
PR_CAPBSET_DROP, CAPABILITY_VERSION_3 = 24, 0x20080522  # linux/prctl.h, linux/capability.h
BPF = {"x86_64": 321, "aarch64": 280}[platform.machine()]
BPF_OBJ_GET, BPF_PROG_GET_NEXT_ID, BPF_MAP_GET_FD_BY_ID, BPF_LINK_GET_FD_BY_ID = 7, 11, 14, 30
PTRACE_SEIZE = 0x4206
# chown dac_override fowner fsetid kill setgid setuid setpcap net_bind_service net_raw sys_chroot
# mknod audit_write setfcap: linux/capability.h
DOCKER = (0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31)
PORT, IKE = 9, 500


def told(step: Callable[[], object]) -> str:
    """Return an errno's name, "" for none."""
    try:
        step()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, repr(error))
    return ""


def checked(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), "")


def raw(address: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, 253) as sock:
        return told(lambda: sock.sendto(b"x", (address, 0)))


def datagram(address: str) -> str:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        return told(lambda: sock.sendto(b"x", (address, PORT)))


def polled(address: str, _argument: str) -> Iterator[str]:
    """Have a thread of the kernel's make the socket, and connect it."""
    with uring.Ring(uring.SQPOLL) as ring:
        yield told(lambda: uring.polled_connect(ring, address, PORT))


def ring_of_another(address: str, argument: str) -> Iterator[str]:
    """The same from within a cgroup, by a ring whose maker stays outside."""
    answer, to = os.pipe()
    with uring.Ring(uring.SQPOLL) as ring:
        child = os.fork()
        if not child:
            Path(argument, "cgroup.procs").write_text("0")
            both = datagram(address), told(lambda: uring.polled_connect(ring, address, PORT))
            os.write(to, ",".join(both).encode())
            os._exit(0)
        os.waitpid(child, 0)
    yield from os.read(answer, 64).decode().split(",")


def handed(_address: str, argument: str) -> Iterator[str]:
    """Give a socket to somebody outside."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        with socket.socket(fileno=int(argument)) as there:
            socket.send_fds(there, [b"x"], [sock.fileno()])
        yield ""


def posing(address: str, _argument: str) -> Iterator[str]:
    """Pose as the peer: what goes to an own address is exempt."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        yield told(lambda: sock.bind((address, 0)))
        yield told(lambda: sock.sendto(b"x", (address, PORT)))


def keep(*capabilities: int) -> None:
    """Have no other capability, and none to come."""
    for number in range(64):
        if number not in capabilities:
            uring.libc.prctl(PR_CAPBSET_DROP, number)
    kept = sum(1 << number for number in capabilities)
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    low, high = kept & 0xFFFFFFFF, kept >> 32
    checked(uring.libc.capset(header, struct.pack("=6I", low, low, 0, high, high, 0)))


def bpf(command: int, *words: int) -> None:
    """Raises: OSError."""
    attr = struct.pack(f"={len(words)}Q", *words) + bytes(120 - 8 * len(words))
    checked(uring.libc.syscall(BPF, command, attr, len(attr)))


def powerless(_address: str, argument: str) -> Iterator[str]:
    """Be root without a capability: open the maps' pins, write frames."""
    keep()
    name = ctypes.create_string_buffer(argument.encode())
    yield told(lambda: bpf(BPF_OBJ_GET, ctypes.addressof(name)))
    for family in (socket.AF_PACKET, AF_XDP):
        yield told(partial(socket.socket, family, socket.SOCK_RAW))


def contained(address: str, _argument: str) -> Iterator[str]:
    """Be a container's root, with what Docker gives it, and want to undo the hooks."""
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
        yield told(step)
    words = "xfrm policy add src 0.0.0.0/0 dst 0.0.0.0/0 dir out"
    done = subprocess.run(["/sbin/ip", *words.split()], capture_output=True, text=True, check=False)
    yield done.stderr.strip()
    yield raw(address)


def unshared(address: str, argument: str) -> Iterator[str]:
    """Be root of namespaces of its own: choose the way out's index, and have IKE's port."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    uring.libc.prctl(4, 1)  # PR_SET_DUMPABLE: else its files in /proc are root's
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


def below(address: str, argument: str) -> Iterator[str]:
    """Write a frame below every hook; `argument` is a device, and where its frames go."""
    device, _, to = argument.partition(" ")
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as sock:
        where = (device, ETH_P_IP, 0, 0, bytes.fromhex(to or "00" * 6))
        yield told(lambda: sock.sendto(packet(address), where))


def risen(address: str, argument: str) -> Iterator[str]:
    """Have a set-user-id program write one, as nobody; once more with no new privileges."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    program, device = argument.split(" ")
    for _ in range(2):
        words = [program, "-S", __file__, "below", address, device]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        yield (json.loads(done.stdout)[0] if done.stdout else done.stderr.split()[-1])
        uring.libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def tapped(address: str, argument: str) -> Iterator[str]:
    """Write one into a TAP device that is ours, without a capability; the host forwards it."""
    keep()
    tap = os.open("/dev/net/tun", os.O_RDWR)
    device, to = argument.split(" ")
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TAP | IFF_NO_PI))
    frame = bytes.fromhex(to) + bytes([2, 0, 0, 0, 0, 9]) + struct.pack("!H", ETH_P_IP)
    yield told(lambda: os.write(tap, frame + packet(address)))


def packet(address: str) -> bytes:
    """Return an IPv4 packet of a protocol that nobody has; the checksum is right."""
    ends = socket.inet_aton(BEHIND) + socket.inet_aton(address)
    head = struct.pack("!BBHHHBB", 0x45, 0, 21, 1, 0, 64, 253)
    total = sum(struct.unpack("!9H", head + ends))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return head + struct.pack("!H", ~total & 0xFFFF) + ends + b"x"


PLAIN = (polled, ring_of_another, handed, posing, powerless, contained, unshared)
WAYS = {way.__name__: way for way in (*PLAIN, below, risen, tapped)}

if __name__ == "__main__":
    print(json.dumps(list(WAYS[sys.argv[1]](*sys.argv[2:]))))  # noqa: T201
