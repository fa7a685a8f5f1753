"""A process whose calls are held: one thread per target sends until the input ends.

    held_sender PERIOD TARGETS    TARGETS: a JSON list of [kind, address, port]
        input "?":   answers with a line of JSON: for each target, the start of the last call that
                     succeeded, of the last that failed, and of one that is under way (0: none)
        input "all": also every call since the last time: [began, ended, error]

Kinds: `sendto` sends a datagram from a new socket, `associate` is UDP's connect(), `connect` is
TCP's, to a closed port. Sockets block; an allowed handshake has HANDSHAKE to complete.
Times are CLOCK_MONOTONIC.
"""

from __future__ import annotations

import errno
import json
import socket
import struct
import sys
import threading
import time

HANDSHAKE = struct.pack("@ll", 2, 0)  # struct timeval
# The peer's answer, and no answer in time: in both cases the call was allowed.
ALLOWED = (errno.ECONNREFUSED, errno.EINPROGRESS)


class Target:
    """One kind of call to one address, and its results."""

    def __init__(self, kind: str, address: str, port: int) -> None:
        self.kind, self.where = kind, (address, port)
        self.family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.good = self.bad = self.under_way = 0.0
        self.calls: list[tuple[float, float, str]] = []

    def send(self, period: float) -> None:
        """Make one call after the other, until the process ends."""
        while True:
            with self.new() as sock:
                self.under_way = began = time.monotonic()
                name = self.call(sock)
                self.calls.append((began, time.monotonic(), name))
            self.under_way = 0.0
            if name:
                self.bad = began
            else:
                self.good = began
            time.sleep(period)

    def new(self) -> socket.socket:
        kind = socket.SOCK_STREAM if self.kind == "connect" else socket.SOCK_DGRAM
        sock = socket.socket(self.family, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, HANDSHAKE)
        return sock

    def call(self, sock: socket.socket) -> str:
        try:
            if self.kind == "sendto":
                sock.sendto(b"held", self.where)
            else:
                sock.connect(self.where)
        except OSError as error:
            if error.errno not in ALLOWED:
                return errno.errorcode.get(error.errno or 0, str(error))
        return ""

    def report(self, everything: bool) -> dict[str, object]:
        report: dict[str, object] = {"good": self.good, "bad": self.bad, "began": self.under_way}
        if everything:
            count = len(self.calls)  # the thread may append more meanwhile
            report["calls"], self.calls[:count] = self.calls[:count], []
        return report


def main() -> None:
    targets = [Target(*words) for words in json.loads(sys.argv[2])]
    for target in targets:
        threading.Thread(target=target.send, args=(float(sys.argv[1]),), daemon=True).start()
    sys.stdout.write('"ready"\n')
    sys.stdout.flush()
    for line in sys.stdin:
        reports = [target.report(line.strip() == "all") for target in targets]
        sys.stdout.write(json.dumps(reports) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
