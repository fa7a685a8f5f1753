"""A process that repeats a round of calls without end, and records the result of each.

    argv    seconds between two rounds; a list of [kind, address, port, source] as JSON
    input   at its end: seconds to go on until one whole round is let through ("" is 0)
    output  a line at the start; at the end, of every attempt [index of the target, start, end,
            errno or 0], as JSON

Kinds: `fresh` and `kept` send a datagram with sendto(), on a new socket each time or on one that
stays open and unconnected; `tcp` is a connect() that does not wait for the SYN-ACK. With source ""
the socket is unbound. Times are CLOCK_MONOTONIC.
"""

from __future__ import annotations

import errno
import json
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PERIOD = 0.005
KINDS = ("fresh", "kept", "tcp")

Target = tuple[str, str, int, str]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One system call: its target, start, end, and the name of its errno ("" if let through)."""

    target: Target
    began: float
    ended: float
    error: str


class Prober:
    """Such a process in a network namespace and a cgroup; it calls until `stop`."""

    def __init__(
        self, namespace: Path, cgroup: Path, targets: Sequence[Target], period: float = PERIOD
    ) -> None:
        self.targets = list(targets)
        script = 'echo 0 > "$0" && exec "$@"'
        enter = ["nsenter", f"--net={namespace}", sys.executable, "-S", "-I", __file__]
        self._process = subprocess.Popen(
            [
                *("sh", "-c", script, f"{cgroup}/cgroup.procs"),
                *(*enter, str(period), json.dumps(self.targets)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def stop(self, patience: float = 0.0) -> list[Attempt]:
        """End it when a whole round is let through, or after `patience` seconds.

        Returns every attempt, in order.
        """
        said, _ = self._process.communicate(str(patience), timeout=60 + patience)
        return [
            Attempt(self.targets[which], began, ended, errno.errorcode[code] if code else "")
            for which, began, ended, code in json.loads(said)
        ]

    def close(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.communicate()


def new(kind: str, address: str, source: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
    sock.setblocking(False)
    if source:
        sock.bind((source, 0))
    return sock


def attempt(target: Target, kept: dict[Target, socket.socket]) -> int:
    kind, address, port, source = target
    try:
        if kind == "kept":
            if target not in kept:
                kept[target] = new(kind, address, source)
            kept[target].sendto(b"kept", (address, port))
            return 0
        with new(kind, address, source) as sock:
            if kind == "tcp":
                code = sock.connect_ex((address, port))
                return 0 if code == errno.EINPROGRESS else code
            sock.sendto(b"fresh", (address, port))
            return 0
    except OSError as error:
        return error.errno or errno.EIO


def main() -> None:
    targets: list[Target] = [tuple(words) for words in json.loads(sys.argv[2])]
    period = float(sys.argv[1])
    kept: dict[Target, socket.socket] = {}
    log = []

    def is_let_through() -> bool:
        """Make one round; return whether no call was refused."""
        for which, target in enumerate(targets):
            began = time.monotonic()
            code = attempt(target, kept)
            log.append((which, began, time.monotonic(), code))
        return not any(code for *_, code in log[-len(targets) :])

    sys.stdout.write("it starts\n")
    sys.stdout.flush()
    due = time.monotonic()
    while not select.select([sys.stdin], [], [], max(0.0, due - time.monotonic()))[0]:
        is_let_through()
        due = max(due + period, time.monotonic())
    last = time.monotonic() + float(sys.stdin.read() or 0)
    while time.monotonic() < last and not is_let_through():
        time.sleep(period)
    sys.stdout.write(json.dumps(log))


if __name__ == "__main__":
    main()
