"""A client that makes one kind of call, to be held, and prints the result as a line of JSON.

    python -m tests.system.held_client CALL ADDRESS PORT ARGUMENT
        ->  {"error": "" or an errno, "seconds": 0.1, ...}

Where it matters, libc makes the call directly: Python's own connect() hides EINTR.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.system import uring

Result = dict[str, Any]
SMALL_STACK = 128 << 10


def named(number: int | None) -> str:
    return errno.errorcode.get(number, str(number)) if number else ""


def tried(call: Callable[[], object]) -> Result:
    began = time.monotonic()
    try:
        call()
        error = ""
    except OSError as raised:
        error = named(raised.errno)
    return {"error": error, "seconds": time.monotonic() - began, "ended": time.monotonic()}


def checked(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), "connect")


def raw_connect(sock: socket.socket, name: ctypes.Array[ctypes.c_char]) -> None:
    checked(uring.libc.connect(sock.fileno(), name, len(name) - 1))


def new(kind: socket.SocketKind, address: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)


def tcp(address: str, port: int, _argument: str) -> Result:
    return tried(lambda: new(socket.SOCK_STREAM, address).connect((address, port)))


def non_blocking(address: str, port: int, _argument: str) -> Result:
    sock = new(socket.SOCK_STREAM, address)
    sock.setblocking(False)
    return tried(lambda: sock.connect((address, port)))


def udp_connect(address: str, port: int, _argument: str) -> Result:
    return tried(lambda: new(socket.SOCK_DGRAM, address).connect((address, port)))


def bound(address: str, port: int, source: str) -> Result:
    sock = new(socket.SOCK_STREAM, address)
    sock.bind((source, 0))
    return tried(lambda: sock.connect((address, port)))


def sendmsg(address: str, port: int, _argument: str) -> Result:
    sock = new(socket.SOCK_DGRAM, address)
    return tried(lambda: sock.sendmsg([b"x"], [], 0, (address, port)))


def sendmmsg(address: str, port: int, _argument: str) -> Result:
    sock = new(socket.SOCK_DGRAM, address)
    return tried(lambda: uring.sendmmsg(sock, address, port))


def uring_connect(address: str, port: int, _argument: str) -> Result:
    return tried(lambda: uring.connect(new(socket.SOCK_STREAM, address), address, port))


def twice(address: str, port: int, _argument: str) -> Result:
    """Connect twice, whatever the first result is."""
    return {"first": tcp(address, port, ""), **tcp(address, port, "")}


def threads(address: str, port: int, argument: str) -> Result:
    """Send a datagram from each of many threads at the same time, when a line arrives."""
    threading.stack_size(SMALL_STACK)
    socks = [new(socket.SOCK_DGRAM, address) for _ in range(int(argument))]
    results: list[Result] = []
    go = threading.Event()

    def one(sock: socket.socket) -> None:
        go.wait()
        results.append(tried(lambda: sock.sendto(b"x", (address, port))))

    workers = [threading.Thread(target=one, args=(sock,)) for sock in socks]
    for worker in workers:
        worker.start()
    sys.stdin.readline()
    go.set()
    for worker in workers:
        worker.join()
    ends = sorted(result["ended"] for result in results)
    errors = sorted({result["error"] for result in results})
    return {"errors": errors, "spread": ends[-1] - ends[0]}


def odd(address: str, port: int, _argument: str) -> Result:
    """Connect sockets of other families, then use bad descriptors and bad pointers."""
    name = ctypes.create_string_buffer(uring.sockaddr(address, port))
    errors = []
    for family, kind in (
        (socket.AF_NETLINK, socket.SOCK_RAW),
        (socket.AF_UNIX, socket.SOCK_STREAM),
        (socket.AF_PACKET, socket.SOCK_RAW),
    ):
        with socket.socket(family, kind) as sock:
            errors.append(tried(lambda s=sock: raw_connect(s, name))["error"])  # type: ignore[misc]
    for fd in (-1, 1 << 20, 0):
        uring.libc.connect(fd, name, 16)
    for where in (0, 1, 1 << 47):
        uring.libc.connect(socket.socket().fileno(), ctypes.c_void_p(where), 16)
    return {"errors": errors, **tcp(address, port, "")}


def served(address: str, port: int, path: str) -> Result:
    """Connect to an address that lies in memory mapped from `path`."""
    sock = new(socket.SOCK_STREAM, address)
    with Path(path).open("r+b") as file, mmap.mmap(file.fileno(), mmap.PAGESIZE) as memory:
        where = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        name = ctypes.c_void_p(where)
        return tried(lambda: checked(uring.libc.connect(sock.fileno(), name, 16)))


def posing(address: str, port: int, path: str) -> Result:
    """Call connect() on a file, then connect normally."""
    name = ctypes.create_string_buffer(uring.sockaddr(address, port))
    fd = os.open(path, os.O_RDONLY)  # never closed: close() would wait
    first = tried(lambda: checked(uring.libc.connect(fd, name, len(name) - 1)))
    return {"first": first, **tcp(address, port, "")}


def posing_twice(address: str, port: int, path: str) -> Result:
    """The same, and connect once more when a line arrives."""
    second = posing(address, port, path)
    sys.stdin.readline()
    first = second.pop("first")
    return {"first": first, "second": second, **tcp(address, port, "")}


def hammer(address: str, port: int, _argument: str) -> Result:
    """Connect by UDP from a few threads until the input ends; print the errors and the longest."""
    ended = threading.Event()
    results: list[Result] = []

    def one() -> None:
        with new(socket.SOCK_DGRAM, address) as sock:
            while not ended.is_set():
                results.append(tried(lambda: sock.connect((address, port))))

    workers = [threading.Thread(target=one) for _ in range(4)]
    for worker in workers:
        worker.start()
    sys.stdin.read()
    ended.set()
    for worker in workers:
        worker.join()
    errors = sorted({result["error"] for result in results})
    longest = max(result["seconds"] for result in results)
    return {"errors": errors, "calls": len(results), "longest": longest}


def handling(address: str, port: int, _argument: str) -> Result:
    """Connect with a handler for SIGALRM; print how many signals were handled.

    Python runs its own handlers only after the call, so this counts its C handler.
    """
    handled, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.siginterrupt(signal.SIGALRM, True)
    sock = new(socket.SOCK_STREAM, address)
    name = ctypes.create_string_buffer(uring.sockaddr(address, port))
    result = tried(lambda: raw_connect(sock, name))
    return {**result, "handled": len(os.read(handled, 1 << 16))}


def flip(address: str, port: int, other: str) -> Result:
    """Connect to one address; overwrite it with another when a line arrives."""
    name = ctypes.create_string_buffer(uring.sockaddr(address, port))
    sock = new(socket.SOCK_STREAM, address)
    changed = uring.sockaddr(other, port)

    def change() -> None:
        sys.stdin.readline()
        ctypes.memmove(name, changed, len(changed))
        sys.stderr.write("changed\n")
        sys.stderr.flush()

    threading.Thread(target=change).start()
    return tried(lambda: raw_connect(sock, name))


def flip_all_the_time(address: str, port: int, other: str) -> Result:
    """Connect many times while another thread keeps swapping two addresses."""
    one, two = uring.sockaddr(address, port), uring.sockaddr(other, port)
    name = ctypes.create_string_buffer(one)
    ended = threading.Event()
    errors: dict[str, int] = {}

    def flipping() -> None:
        while not ended.is_set():
            ctypes.memmove(name, random.choice((one, two)), len(one))

    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=flipping)
    thread.start()
    for _ in range(300):
        time.sleep(random.random() / 1000)  # on one processor the writer needs time, too
        with new(socket.SOCK_DGRAM, address) as sock:
            error = tried(lambda s=sock: raw_connect(s, name))["error"]  # type: ignore[misc]
            reached = error or sock.getpeername()[0]
            errors[reached] = errors.get(reached, 0) + 1
    ended.set()
    thread.join()
    return {"reached": errors}


CALLS: dict[str, Callable[[str, int, str], Result]] = {
    call.__name__: call
    for call in (
        tcp, non_blocking, udp_connect, bound, sendmsg, sendmmsg, uring_connect, twice, threads,
        handling, flip, flip_all_the_time, odd, hammer, served, posing, posing_twice,
    )
}  # fmt: skip


def command(call: str, address: object, port: int, argument: object = "") -> list[str]:
    """Return the words that run a call."""
    return [
        sys.executable,
        "-m",
        "tests.system.held_client",
        call,
        str(address),
        str(port),
        str(argument),
    ]


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    print(  # noqa: T201
        json.dumps(CALLS[sys.argv[1]](sys.argv[2], int(sys.argv[3]), sys.argv[4]))
    )
