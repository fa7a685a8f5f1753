"""A process with an open TCP connection and a connected UDP socket, which reports how they end.

argv: ADDRESS PORT, where `tests/chaos/sender.py server` echoes
output: "ready" once both sockets got an answer; a line [kind, error, when] as soon as an idle
        socket fails; when is CLOCK_MONOTONIC
input: any line; the answer is {kind: "" if it was echoed, else the error}
"""

from __future__ import annotations

import errno
import json
import select
import signal
import socket
import sys
import time

PAYLOAD = b"E, and eight bytes and more"  # E requests an echo of a datagram
ANSWER_TIMEOUT = 5.0  # seconds
LIFETIME = 120  # seconds, so that its reader does not wait forever


def named(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, type(error).__name__)


def say(what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def echo(sock: socket.socket) -> str:
    try:
        sock.send(PAYLOAD)
        return "" if sock.recv(len(PAYLOAD)) == PAYLOAD else "a wrong answer"
    except OSError as error:
        return named(error)


def main() -> None:
    signal.alarm(LIFETIME)
    address, port = sys.argv[1], int(sys.argv[2])
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kinds = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
    socks = {name: socket.socket(family, kind) for name, kind in kinds.items()}
    for sock in socks.values():
        sock.settimeout(ANSWER_TIMEOUT)
        sock.connect((address, port))
    say("ready" if not any(map(echo, socks.values())) else "no answer")
    open_sockets = dict(socks)
    while True:
        ready = select.select([sys.stdin, *open_sockets.values()], [], [])[0]
        for name, sock in list(open_sockets.items()):
            if sock in ready:
                try:
                    error = "" if sock.recv(1) else "closed"
                except OSError as raised:
                    error = named(raised)
                say([name, error, time.monotonic()])
                del open_sockets[name]
        if sys.stdin in ready:
            if not sys.stdin.readline():
                return
            say({name: echo(sock) for name, sock in socks.items()})


if __name__ == "__main__":
    main()
