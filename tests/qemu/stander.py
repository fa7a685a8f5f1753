"""A process with a TCP connection and a connected UDP socket that stand, and say how they end.

argv: ADDRESS PORT, where `tests/chaos/speaker.py server` echoes
output: "ready" when both were answered; a line [kind, error, when] as soon as one fails that
        nobody uses; when is CLOCK_MONOTONIC
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

SAID = b"E, and eight bytes and more"  # E: a datagram that asks for an answer
PATIENCE = 5.0  # seconds
LIFE = 120  # seconds, so that nobody waits for ever for its word


def named(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, type(error).__name__)


def say(what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def echo(sock: socket.socket) -> str:
    try:
        sock.send(SAID)
        return "" if sock.recv(len(SAID)) == SAID else "another answer"
    except OSError as error:
        return named(error)


def main() -> None:
    signal.alarm(LIFE)
    address, port = sys.argv[1], int(sys.argv[2])
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kinds = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
    socks = {name: socket.socket(family, kind) for name, kind in kinds.items()}
    for sock in socks.values():
        sock.settimeout(PATIENCE)
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
