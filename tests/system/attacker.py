"""Attempts of a gated program to get around the gate, one per run.

python attacker.py ATTACK ADDRESS [ARGUMENT]  ->  ["EPERM", ...], the errno of each step
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import uring  # type: ignore[import-not-found]

NOBODY = 65534
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
IPV6_FREEBIND = 78
PR_CAPBSET_DROP, CAPABILITY_VERSION_3 = 24, 0x20080522  # linux/prctl.h, linux/capability.h
BPF = {"x86_64": 321, "aarch64": 280}[platform.machine()]
BPF_OBJ_GET = 7
PORT = 9


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
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, 253) as sock:
        return result(lambda: sock.sendto(b"x", (address, 0)))


def datagram(address: str) -> str:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        return result(lambda: sock.sendto(b"x", (address, PORT)))


def polled(address: str, _argument: str) -> Iterator[str]:
    """Let an io_uring kernel thread make a socket and connect it."""
    yield result(lambda: uring.polled_connect(address, PORT))


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


def powerless(_address: str, argument: str) -> Iterator[str]:
    """Open a pinned map as root without capabilities."""
    for number in range(64):
        uring.libc.prctl(PR_CAPBSET_DROP, number)
    header, none = struct.pack("=Ii", CAPABILITY_VERSION_3, 0), bytes(24)
    if uring.libc.capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")
    name = ctypes.create_string_buffer(argument.encode())
    attr = struct.pack("=QII", ctypes.addressof(name), 0, 0) + bytes(104)
    yield result(lambda: checked(uring.libc.syscall(BPF, BPF_OBJ_GET, attr, 16)))


def unshared(address: str, argument: str) -> Iterator[str]:
    """Become root in new user and network namespaces, with a link of a chosen index."""
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


WAYS = {way.__name__: way for way in (polled, handed, posing, powerless, unshared)}

if __name__ == "__main__":
    print(json.dumps(list(WAYS[sys.argv[1]](*sys.argv[2:]))))  # noqa: T201
