"""Send packets on one connected socket whenever asked, or receive such packets.

packet_client.py udp|tcp ADDRESS PORT COUNT
packet_client.py sink PORT

Either prints an empty line when it is connected or listens. The sender then reads lines: for each,
it sends COUNT times and prints the mean nanoseconds per send.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from contextlib import ExitStack

PAYLOAD = bytes(64)


def send_turns(kind: str, to: tuple[str, int], count: int) -> None:
    """Send COUNT times for each line of input, and print the mean nanoseconds per send."""
    socket_kind = socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM
    with socket.socket(socket.AF_INET, socket_kind) as sock:
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
    """Bind a UDP socket without reading it, and read everything from TCP connections."""

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
        send_turns(sys.argv[1], (sys.argv[2], int(sys.argv[3])), int(sys.argv[4]))
