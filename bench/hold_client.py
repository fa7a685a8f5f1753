"""Make each kind of call COUNT times and print the median in microseconds, as JSON.

    hold_client.py ADDRESS PORT COUNT [threads]

With `threads`: only make one UDP connect() from each of COUNT threads.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from statistics import median

STACK = 128 << 10


def took(operation: Callable[[], object]) -> float:
    """Return the duration of an operation in microseconds."""
    began = time.perf_counter_ns()
    operation()
    return (time.perf_counter_ns() - began) / 1000


def costs(to: tuple[str, int], count: int) -> dict[str, float]:
    """Return the median duration of each kind of call in microseconds."""
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    connected = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def tcp_connect() -> float:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            return took(lambda: sock.connect(to))

    def unix_connect() -> float:
        with socket.socket(socket.AF_UNIX) as sock:
            return took(lambda: sock.connect_ex("/nonexistent"))

    calls: dict[str, Callable[[], float]] = {
        "tcp connect": tcp_connect,
        "udp connect": lambda: took(lambda: connected.connect(to)),
        "sendto": lambda: took(lambda: datagrams.sendto(b"x", to)),
        "unix connect": unix_connect,
    }
    rounds = {"tcp connect": max(1, count // 10)}
    return {
        name: median(call() for _ in range(rounds.get(name, count))) for name, call in calls.items()
    }


def connect_at_once(to: tuple[str, int], count: int) -> None:
    """Call connect() from many threads at the same time."""
    threading.stack_size(STACK)
    go = threading.Event()

    def one(sock: socket.socket) -> None:
        go.wait()
        sock.connect(to)

    socks = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(count)]
    threads = [threading.Thread(target=one, args=(sock,)) for sock in socks]
    for thread in threads:
        thread.start()
    go.set()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    where, number = (sys.argv[1], int(sys.argv[2])), int(sys.argv[3])
    if sys.argv[4:] == ["threads"]:
        connect_at_once(where, number)
    else:
        print(json.dumps(costs(where, number)))  # noqa: T201
