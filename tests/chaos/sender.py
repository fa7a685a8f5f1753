"""A gated process that sends all the time; its peer; and one that sends a lot at once.

    sender PERIOD TARGETS    TARGETS: a JSON list of [kind, address, port]
        input "?": answers with a line of JSON: for each target, the start of the last attempt that
                   succeeded, of the last that failed, and of the last that was answered
        input "all": also the failures and counts since the last time; the first target's report
                   also has "pauses": when this process did not get the CPU for too long
    server PORT              echoes TCP, and datagrams that ask for it
    storm ADDRESS COUNT      sends COUNT datagrams to as many ports; prints how many were refused

Kinds: `fresh` and `kept` are sendto() on a new socket each time or on the same one, `connected` is
send() on a connected socket, `tcp` a connect() to a closed port, `stream` writes to an established
connection, `ping` and `raw` use sockets of these types. Times are CLOCK_MONOTONIC.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import select
import socket
import struct
import sys
import time

STAMP = struct.Struct("=d")
ECHO = b"E"
ASKS = ("kept", "connected", "stream")
LATE = 1.2  # periods between two rounds that count as a pause: the machine was busy
MAX_FAILURES = 5  # in a row, then a kept socket is replaced
PENDING = (errno.EINPROGRESS, errno.EAGAIN)


class Target:
    """One kind of call to one address, and its results."""

    def __init__(self, kind: str, address: str, port: int) -> None:
        self.kind, self.address, self.port = kind, address, port
        self.family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.sock: socket.socket | None = None
        self.rest = b""
        self.good = self.bad = self.echoed = 0.0
        self.failures = self.made = 0
        self.counts: collections.Counter[str] = collections.Counter()
        self.failed: list[tuple[float, float, str]] = []

    def send(self) -> None:
        """Make one attempt and record its result."""
        began = time.monotonic()
        name = ""
        try:
            self.attempt(began)
        except OSError as error:
            if error.errno not in PENDING:
                name = errno.errorcode.get(error.errno or 0, str(error))
        self.counts[name] += 1
        if not name:
            self.good, self.failures = began, 0
            return
        self.bad = began
        self.failures += 1
        self.failed.append((began, time.monotonic(), name))
        broken = self.kind == "stream" and name not in ("EPERM", "EHOSTUNREACH", "ENETUNREACH")
        if broken or (self.kind != "stream" and self.failures >= MAX_FAILURES):
            self.close()

    def attempt(self, now: float) -> None:
        match self.kind:
            case "tcp":
                with self.new(socket.SOCK_STREAM) as sock:
                    sock.connect((self.address, self.port))
            case "fresh":
                with self.new(socket.SOCK_DGRAM) as sock:
                    sock.sendto(b"fresh", (self.address, self.port))
            case "kept":
                self.keep(socket.SOCK_DGRAM).sendto(
                    ECHO + STAMP.pack(now), (self.address, self.port)
                )
            case "connected":
                self.keep(socket.SOCK_DGRAM, connect=True).send(ECHO + STAMP.pack(now))
            case "stream":
                self.keep(socket.SOCK_STREAM, connect=True).send(STAMP.pack(now))
            case "ping":
                v4 = self.family == socket.AF_INET
                echo = bytes([8 if v4 else 128]) + bytes(7)
                proto = socket.IPPROTO_ICMP if v4 else socket.IPPROTO_ICMPV6
                self.keep(socket.SOCK_DGRAM, proto).sendto(echo, (self.address, 0))
            case "raw":
                self.keep(socket.SOCK_RAW, 253).sendto(b"raw", (self.address, 0))
            case _:
                raise ValueError(self.kind)

    def new(self, kind: int, proto: int = 0) -> socket.socket:
        sock = socket.socket(self.family, kind, proto)
        sock.setblocking(False)
        return sock

    def keep(self, kind: int, proto: int = 0, *, connect: bool = False) -> socket.socket:
        if self.sock is None:
            sock = self.new(kind, proto)
            try:
                if connect:
                    sock.connect((self.address, self.port))
            except BlockingIOError:
                pass
            except OSError:
                sock.close()
                raise
            self.sock = sock
            self.rest = b""
            self.made += 1
        return self.sock

    def receive(self) -> None:
        """Read pending answers."""
        if self.sock is None:
            return
        try:
            while data := self.sock.recv(65536):
                if self.kind == "stream":
                    data = self.rest + data
                    whole = len(data) // STAMP.size * STAMP.size
                    self.rest = data[whole:]
                    data = data[:whole][-STAMP.size :]
                else:
                    data = data[1:]
                if self.kind in ASKS and len(data) == STAMP.size:
                    self.echoed = max(self.echoed, *STAMP.unpack(data))
        except OSError:  # no more data, or an error that the next attempt will get again
            return
        if self.kind == "stream":
            self.close()  # the peer closed it

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None
        self.failures = 0

    def report(self, everything: bool) -> dict[str, object]:
        report: dict[str, object] = {"good": self.good, "bad": self.bad, "echoed": self.echoed}
        if everything:
            report |= {"counts": self.counts, "failed": self.failed, "made": self.made}
            self.counts, self.failed, self.made = collections.Counter(), [], 0
        return report


def say(what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def sender(period: float, targets: list[Target]) -> None:
    say("ready")
    due = sent = time.monotonic()
    pauses: list[tuple[float, float]] = []
    while True:
        if select.select([sys.stdin], [], [], max(0.0, due - time.monotonic()))[0]:
            word = sys.stdin.readline().strip()
            if not word:
                return
            for target in targets:
                target.receive()
            reports = [target.report(word == "all") for target in targets]
            if word == "all":
                reports[0]["pauses"], pauses = pauses, []
            say(reports)
            continue
        before, sent = sent, time.monotonic()
        if sent > before + LATE * period:
            pauses.append((before, sent))
        for target in targets:
            target.receive()
            target.send()
        due = max(due + period, time.monotonic())


def server(port: int) -> None:
    datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    listener = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    for sock in (datagrams, listener):
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("::", port))
    listener.listen()
    say("ready")
    peers: list[socket.socket] = []
    while True:
        ready = set(select.select([sys.stdin, datagrams, listener, *peers], [], [])[0])
        if sys.stdin in ready:
            return
        for sock in {datagrams, listener, *peers} & ready:
            with contextlib.suppress(OSError):
                if sock is datagrams:
                    data, source = datagrams.recvfrom(2048)
                    if data.startswith(ECHO):
                        datagrams.sendto(data, source)
                elif sock is listener:
                    peers.append(listener.accept()[0])
                else:
                    data = sock.recv(65536)
                    sock.sendall(data)
                    if data:
                        continue
                    peers.remove(sock)
                    sock.close()


def storm(address: str, count: int) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    refused = 0
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        for port in range(1, count + 1):
            try:
                sock.sendto(b"storm", (address, port))
            except OSError:
                refused += 1
    say(refused)


def main() -> None:
    match sys.argv[1:]:
        case ["sender", period, targets]:
            sender(float(period), [Target(*words) for words in json.loads(targets)])
        case ["server", port]:
            server(int(port))
        case ["storm", address, count]:
            storm(address, int(count))


if __name__ == "__main__":
    main()
