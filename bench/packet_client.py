"""Send in turns on one connected socket, or take what is sent.

packet_client.py udp|tcp ADDRESS PORT COUNT     a line in: nanoseconds a send, the mean, out
packet_client.py sink PORT
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from contextlib import ExitStack

PAYLOAD = bytes(64)


def turns(kind: str, to: tuple[str, int], count: int) -> None:
    """Send so often for each line, and print how long one send took."""
    of = socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM
    with socket.socket(socket.AF_INET, of) as sock:
        sock.connect(to)
        if kind == "tcp":
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        print(flush=True)  # noqa: T201
        for _ in sys.stdin:
            began = time.perf_counter_ns()
            for _ in range(count):
                sock.send(PAYLOAD)
            print((time.perf_counter_ns() - began) / count, flush=True)  # noqa: T201


def sink(port: int) -> None:
    """Have a UDP socket that nobody reads, and read all that comes by TCP."""

    def read(sock: socket.socket) -> None:
        with sock:
            while sock.recv(1 << 16):
                pass

    with ExitStack() as stack:
        datagrams = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        datagrams.bind(("", port))
        listener = stack.enter_context(socket.create_server(("", port)))
        print(flush=True)  # noqa: T201
        while True:
            threading.Thread(target=read, args=[listener.accept()[0]], daemon=True).start()


if __name__ == "__main__":
    if sys.argv[1] == "sink":
        sink(int(sys.argv[2]))
    else:
        turns(sys.argv[1], (sys.argv[2], int(sys.argv[3])), int(sys.argv[4]))
