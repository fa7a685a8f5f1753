"""Make each kind of call COUNT times and print medians in microseconds, as JSON.

hold_client.py ADDRESS PORT COUNT
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable
from statistics import mean, median

SLOW = 10  # times fewer TCP connections: each one is a handshake


def took(operation: Callable[[], object]) -> float:
    """Return the duration of an operation in microseconds."""
    began = time.perf_counter_ns()
    operation()
    return (time.perf_counter_ns() - began) / 1000


def costs(to: tuple[str, int], count: int) -> dict[str, float]:
    """Return the median duration of each kind of call, and the mean of one, in microseconds."""
    datagrams, associated, connected, here = (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(4)
    )
    here.bind(("127.0.0.1", 0))
    connected.connect(here.getsockname())
    ours, theirs = socket.socketpair()

    def tcp_connect() -> float:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            return took(lambda: sock.connect(to))

    def unix_connect() -> float:
        with socket.socket(socket.AF_UNIX) as sock:
            return took(lambda: sock.connect_ex("/nonexistent"))

    def local_message() -> float:
        result = took(lambda: ours.sendmsg([b"x"]))
        theirs.recv(1)
        return result

    calls: dict[str, Callable[[], float]] = {
        "tcp connect": tcp_connect,
        "udp connect": lambda: took(lambda: associated.connect(to)),
        "sendto": lambda: took(lambda: datagrams.sendto(b"x", to)),
        "unix connect": unix_connect,
        "sendmsg, connected": lambda: took(lambda: connected.sendmsg([b"x"])),
        "sendmsg, local": local_message,
    }
    samples = {
        name: [call() for _ in range(max(1, count // SLOW) if name == "tcp connect" else count)]
        for name, call in calls.items()
    }
    medians = {name: median(values) for name, values in samples.items()}
    return {**medians, "udp connect, mean": mean(samples["udp connect"])}


if __name__ == "__main__":
    print(json.dumps(costs((sys.argv[1], int(sys.argv[2])), int(sys.argv[3]))))  # noqa: T201
