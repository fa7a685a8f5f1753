"""A process that makes system calls on request: one JSON line in, one errno out.

    {"call": "tcp", "address": "::1", "port": 80, "bind": null, "options": []}  ->  "" or "EPERM"

TCP does not wait: EINPROGRESS means that a SYN was sent. A call that begins with "kept " uses the
same socket every time. `bind` is an address, or address#port.
"""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

IP_FREEBIND = 15


class Caller:
    """Such a process in a network namespace, in a cgroup or in none."""

    def __init__(self, namespace: Path, cgroup: Path | None) -> None:
        join = f"echo 0 > {cgroup}/cgroup.procs && " if cgroup else ""
        script = f"{join}exec nsenter --net={namespace} {sys.executable} -S {__file__}"
        self.process = subprocess.Popen(
            ["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(
        self,
        call: str,
        address: str,
        port: int = 80,
        *,
        bind: str | None = None,
        options: Sequence[tuple[int, int, int]] = (),
    ) -> str:
        """Make a call; return "" or the errno's name. `options`: level, name, value."""
        assert self.process.stdin
        assert self.process.stdout
        words: dict[str, object] = {"call": call, "address": address, "port": port, "bind": bind}
        words["options"] = [list(option) for option in options]
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def forget(self) -> None:
        """Close the sockets that were kept."""
        self("forget", "")

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def called_again(results: Sequence[str], times: int = 5) -> None:
    """Wait until `hammering` has made that many more calls."""
    enough, deadline = len(results) + times, time.monotonic() + 30
    while len(results) < enough:
        assert time.monotonic() < deadline, "no more calls were made"
        time.sleep(0.01)


@contextlib.contextmanager
def hammering(
    namespace: Path, cgroup: Path | None, call: str, address: str, port: int
) -> Iterator[list[str]]:
    """Repeat a call without a pause during the block, which begins after the first one.

    Yields the growing list of results.
    """
    caller = Caller(namespace, cgroup)
    results: list[str] = []
    ended = threading.Event()

    def hammer() -> None:
        while not ended.is_set():
            results.append(caller(call, address, port))

    thread = threading.Thread(target=hammer)
    thread.start()
    try:
        while not results:
            time.sleep(0.01)
        yield results
    finally:
        ended.set()
        thread.join()
        caller.close()


kept: dict[str, socket.socket] = {}

UDPLITE = 136
IPPROTO_MPTCP = 262
KINDS = {
    "tcp": (socket.SOCK_STREAM, 0),
    "stream": (socket.SOCK_STREAM, 0),
    "fastopen": (socket.SOCK_STREAM, 0),
    "uring connect": (socket.SOCK_STREAM, 0),
    "mptcp": (socket.SOCK_STREAM, IPPROTO_MPTCP),
    "udplite": (socket.SOCK_DGRAM, UDPLITE),
    "sctp": (socket.SOCK_STREAM, 132),
    "raw": (socket.SOCK_RAW, 253),
    "solicit": (socket.SOCK_RAW, 58),
    "packet": (socket.SOCK_RAW, socket.IPPROTO_RAW),
}


def has_udplite() -> bool:
    """Return whether this kernel has UDP-Lite, which Linux 7.3 no longer has."""
    try:
        socket.socket(socket.AF_INET, *KINDS["udplite"]).close()
    except OSError as error:
        if error.errno != errno.EPROTONOSUPPORT:
            raise
        return False
    return True


def new_socket(call: str, family: int) -> socket.socket:
    if call == "ping":
        icmp = socket.IPPROTO_ICMP if family == socket.AF_INET else socket.IPPROTO_ICMPV6
        return socket.socket(family, socket.SOCK_DGRAM, icmp)
    if call.startswith("packet "):
        call = "packet"
    return socket.socket(family, *KINDS.get(call, (socket.SOCK_DGRAM, 0)))


def attempt(call: str, address: str, port: int, bind: str | None, options: list[list[int]]) -> None:
    import forger  # type: ignore[import-not-found]  # noqa: PLC0415  beside this script

    if call == "forget":
        while kept:
            kept.popitem()[1].close()
        forger.forget()
        return
    if call.startswith("forge "):
        forger.steps(call.split()[1:], address, port)
        return
    if call.startswith("threaded "):
        in_thread(call.removeprefix("threaded "), address, port, bind, options)
        return
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = kept.get(call) or new_socket(call.removeprefix("kept "), family)
    try:
        sock.setblocking(False)
        for level, name, value in options:
            sock.setsockopt(level, name, value)
        if bind:
            sock.setsockopt(socket.SOL_IP, IP_FREEBIND, 1)
            host, _, number = bind.partition("#")
            sock.bind((host, int(number or 0)))
        make(call.removeprefix("kept "), sock, address, port)
    finally:
        if call.startswith("kept "):
            kept[call] = sock
        else:
            sock.close()


def in_thread(call: str, *words: Any) -> None:
    """Make a call in a new thread."""
    errors: list[OSError] = []

    def run() -> None:
        try:
            attempt(call, *words)
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def make(call: str, sock: socket.socket, address: str, port: int) -> None:  # noqa: C901, PLR0912
    import uring  # type: ignore[import-not-found]  # noqa: PLC0415  beside this script

    match call:
        case "tcp" | "udp connect" | "mptcp" | "sctp":
            sock.connect((address, port))
        case "sendto":
            sock.sendto(b"x", (address, port))
        case "raw":
            sock.sendto(b"x", (address, 0))
        case "ping":
            echo = b"\x08" if sock.family == socket.AF_INET else b"\x80"
            sock.sendto(echo + bytes(7), (address, 0))
        case "udplite":
            sock.connect((address, port))
            sock.send(b"x")
        case "connected 4" | "connected 6":
            if f"kept {call}" not in kept:
                sock.connect((address, port))
            sock.send(b"longer than an SPI")
        case "solicit":  # a neighbour
            sock.sendto(b"\x87" + bytes(23), (address, 0))
        case _ if call.startswith("packet "):  # with its header, in hexadecimal
            sock.sendto(bytes.fromhex(call.split()[1]), (address, 0))
        case "stream":
            if "kept stream" not in kept:
                sock.setblocking(True)
                sock.connect((address, port))
                sock.setblocking(False)
            sock.send(b"x")
        case "sendmsg":
            sock.sendmsg([b"x"], [], 0, (address, port))
        case "pktinfo":
            # "address" is destination%source
            to, source = address.split("%")
            sock.sendmsg([b"x"], pktinfo(source), 0, (to, port))
        case "fastopen":
            sock.sendto(b"x", socket.MSG_FASTOPEN, (address, port))
        case "sendmmsg":
            uring.sendmmsg(sock, address, port)
        case "uring connect":
            uring.connect(sock, address, port)
        case "uring sendmsg":
            uring.sendmsg(sock, address, port)
        case _:
            raise ValueError(call)


def pktinfo(source: str) -> list[tuple[int, int, bytes]]:
    """Return the control message that sets a datagram's source."""
    if ":" in source:
        raw = socket.inet_pton(socket.AF_INET6, source) + bytes(4)
        return [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, raw)]
    raw = bytes(4) + socket.inet_pton(socket.AF_INET, source) + bytes(4)
    return [(socket.SOL_IP, 8, raw)]  # IP_PKTINFO


def main() -> None:
    for line in sys.stdin:
        try:
            attempt(**json.loads(line))
            result = ""
        except OSError as error:
            result = errno.errorcode.get(error.errno or 0, repr(error))
        sys.stdout.write(f"{result}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
