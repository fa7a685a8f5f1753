"""Make each kind of call many times; print the median microseconds of each, as JSON."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable
from statistics import median


def timed(count: int, call: Callable[[], float]) -> float:
    """Return the median of what a call says that it took, in microseconds."""
    return median(call() for _ in range(count)) / 1000


def main() -> None:
    """Measure and print."""
    to, count = (sys.argv[1], int(sys.argv[2])), int(sys.argv[3])
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    connected = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def took(operation: Callable[[], object]) -> float:
        began = time.perf_counter_ns()
        operation()
        return time.perf_counter_ns() - began

    def tcp_connect() -> float:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            return took(lambda: sock.connect(to))

    def unix_connect() -> float:
        with socket.socket(socket.AF_UNIX) as sock:
            return took(lambda: sock.connect_ex("/nonexistent"))

    print(  # noqa: T201
        json.dumps(
            {
                "tcp connect": timed(max(1, count // 10), tcp_connect),
                "udp connect": timed(count, lambda: took(lambda: connected.connect(to))),
                "sendto": timed(count, lambda: took(lambda: datagrams.sendto(b"x", to))),
                "unix connect": timed(count, unix_connect),
            }
        )
    )


if __name__ == "__main__":
    main()
