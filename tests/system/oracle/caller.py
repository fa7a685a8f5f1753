"""A process that makes calls in batches: a JSON line in, a JSON line out.

    [[kind, address, port, bind address or null, bind port, late, mark, device], ...]
    -> [[errno's name or "", names of the XFRM counters that moved], ...]

Before each call, and after the last, it sends a marker frame with the call's number through the
same interface: the packets between two markers are that call's. TCP does not wait; a socket closed
in SYN_SENT sends nothing more. As a script it uses only the standard library.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

MARKER = 0x88B5  # IEEE 802: local experiments
DEVICE = "eth0"
IP_FREEBIND, IP_BIND_ADDRESS_NO_PORT, IP_PKTINFO, SO_MARK = 15, 24, 8, 36
CLONE_NEWNET = 0x40000000
TAG = b"oracle"

Answer = tuple[str, list[str]]


class Caller:
    """Such a process in a network namespace, in a cgroup or in none.

    `inner`: another namespace, in which it makes the calls, and the device here that leads there.
    """

    def __init__(
        self, namespace: Path, cgroup: Path | None, inner: tuple[Path, str] | None = None
    ) -> None:
        join = f"echo 0 > {cgroup}/cgroup.procs && " if cgroup else ""
        script = f"{join}exec nsenter --net={namespace} {sys.executable} -S -I {__file__}"
        script += " {} {}".format(*inner) if inner else ""
        self.process = subprocess.Popen(
            ["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, calls: list[list[Any]]) -> list[Answer]:
        """Make the calls in order; return the answer to each."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(calls) + "\n")
        self.process.stdin.flush()
        answers = [(name, moved) for name, moved in json.loads(self.process.stdout.readline())]
        assert len(answers) == len(calls)
        return answers

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def attempt(
    kind: str,
    address: str,
    port: int,
    bind: str | None,
    sport: int,
    late: bool,
    mark: int,
    device: str,
) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    stream = socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM
    with socket.socket(family, stream | socket.SOCK_NONBLOCK) as sock:
        if mark:
            sock.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
        if device:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        if late:
            sock.setsockopt(socket.SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        ancillary = []
        if kind == "pktinfo" and bind and family == socket.AF_INET:
            info = struct.pack("=I4s4s", 0, socket.inet_aton(bind), bytes(4))
            ancillary = [(socket.SOL_IP, IP_PKTINFO, info)]
        elif kind == "pktinfo" and bind:
            info = socket.inet_pton(socket.AF_INET6, bind) + struct.pack("=I", 0)
            ancillary = [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, info)]
        elif bind or sport:
            sock.setsockopt(socket.SOL_IP, IP_FREEBIND, 1)
            sock.bind((bind or ("::" if family == socket.AF_INET6 else "0.0.0.0"), sport))
        if kind == "tcp":
            sock.connect((address, port))
        elif kind == "udp connect":
            sock.connect((address, port))
            sock.send(TAG)
        else:
            sock.sendmsg([TAG], ancillary, 0, (address, port))


def counters(fd: int) -> dict[bytes, bytes]:
    words = os.pread(fd, 1 << 14, 0).split()
    return dict(zip(words[::2], words[1::2], strict=True))


class Forwarded:
    """In a namespace whose packets are forwarded: waits until those sent so far were.

    It sends a frame the same way, to `port`, where the host receives it. Enters the namespace.
    """

    def __init__(self, namespace: str, port: str) -> None:
        self.here = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(MARKER))
        self.here.bind((port, MARKER))
        fd = os.open(namespace, os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), namespace)
        self.there = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self.there.bind((DEVICE, 0))

    def wait(self) -> None:
        frame = bytes(12) + struct.pack("!H", MARKER) + os.urandom(46)
        self.there.send(frame)
        while self.here.recv(60) != frame:
            pass  # another caller's


def batch(
    calls: list[list[Any]], wire: socket.socket, fd: int, forwarded: Forwarded | None
) -> list[Answer]:
    answers: list[Answer] = []
    header = bytes(12) + struct.pack("!H", MARKER)
    before = counters(fd)
    for number, call in enumerate(calls):
        wire.send(header + struct.pack("=I", number))
        try:
            attempt(*call)
            name = ""
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, repr(error))
        if forwarded:
            forwarded.wait()
        after = counters(fd)
        answers.append((name, [k.decode() for k in after if after[k] != before[k]]))
        before = after
    wire.send(header + struct.pack("=I", len(calls)))
    return answers


def main() -> None:
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    wire.bind((DEVICE, 0))
    fd = os.open("/proc/self/net/xfrm_stat", os.O_RDONLY)
    forwarded = Forwarded(*sys.argv[1:]) if sys.argv[1:] else None
    for line in sys.stdin:
        json.dump(batch(json.loads(line), wire, fd, forwarded), sys.stdout)
        sys.stdout.write("\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
