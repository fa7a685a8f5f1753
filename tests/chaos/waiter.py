"""A process whose calls are held, a thread for each target, until its input ends.

    waiter PERIOD TARGETS    TARGETS: a list of [kind, address, port] as JSON
        input "?":   a line with, for each target, when the last call that went began, the last
                     that failed, and the one that is under way (0: none)
        input "all": the same, and every call since the last time: [began, ended, error]

Kinds: `sendto` a datagram from a new socket, `associate` UDP's connect(), `connect` TCP's to a
port that nobody listens on. Sockets block; a handshake that is let go has HANDSHAKE seconds.
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
# The peer's answer, and none in time: in both cases the call was let go.
WENT = (errno.ECONNREFUSED, errno.EINPROGRESS)


class Target:
    """One way to speak to one address, and what came of it."""

    def __init__(self, kind: str, address: str, port: int) -> None:
        self.kind, self.where = kind, (address, port)
        self.family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.good = self.bad = self.under_way = 0.0
        self.calls: list[tuple[float, float, str]] = []

    def speak(self, period: float) -> None:
        """Call after call, until the process ends."""
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
            if error.errno not in WENT:
                return errno.errorcode.get(error.errno or 0, str(error))
        return ""

    def told(self, everything: bool) -> dict[str, object]:
        told: dict[str, object] = {"good": self.good, "bad": self.bad, "began": self.under_way}
        if everything:
            count = len(self.calls)  # its thread goes on
            told["calls"], self.calls[:count] = self.calls[:count], []
        return told


def main() -> None:
    targets = [Target(*words) for words in json.loads(sys.argv[2])]
    for target in targets:
        threading.Thread(target=target.speak, args=(float(sys.argv[1]),), daemon=True).start()
    sys.stdout.write('"ready"\n')
    sys.stdout.flush()
    for line in sys.stdin:
        told = [target.told(line.strip() == "all") for target in targets]
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
