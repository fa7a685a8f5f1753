"""A process that makes the system calls it is told to: one JSON line in, one errno out.

    {"call": "tcp", "address": "::1", "port": 80, "bind": null, "options": []}  ->  "" or "EPERM"

TCP does not wait: EINPROGRESS means that a SYN is on its way. A call that begins
with "kept " is made on one socket every time.
"""

from __future__ import annotations

import errno
import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

IP_FREEBIND = 15


class Caller:
    """Such a process in a network namespace, in a cgroup or outside any."""

    def __init__(self, namespace: Path, cgroup: Path | None) -> None:
        join = f"echo 0 > {cgroup}/cgroup.procs && " if cgroup else ""
        script = f"{join}exec nsenter --net={namespace} {sys.executable} -S -I {__file__}"
        self.process = subprocess.Popen(
            ["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(
        self,
        call: str,
        address: str,
        port: int = 80,
        *,
        bind: str | None = None,
        options: Sequence[tuple[int, int, int]] = (),
    ) -> str:
        """Make a call; return "" or the errno's name. `options`: level, name, value."""
        assert self.process.stdin
        assert self.process.stdout
        words: dict[str, object] = {"call": call, "address": address, "port": port, "bind": bind}
        words["options"] = [list(option) for option in options]
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


kept: dict[str, socket.socket] = {}


def attempt(call: str, address: str, port: int, bind: str | None, options: list[list[int]]) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = socket.SOCK_STREAM if call == "tcp" else socket.SOCK_DGRAM
    sock = kept.get(call) or socket.socket(family, kind)
    try:
        sock.setblocking(False)
        for level, name, value in options:
            sock.setsockopt(level, name, value)
        if bind:
            sock.setsockopt(socket.SOL_IP, IP_FREEBIND, 1)
            sock.bind((bind, 0))
        match call.removeprefix("kept "):
            case "tcp" | "udp connect":
                sock.connect((address, port))
            case "sendto":
                sock.sendto(b"x", (address, port))
            case "sendmsg":
                sock.sendmsg([b"x"], [], 0, (address, port))
            case _:
                raise ValueError(call)
    finally:
        if call.startswith("kept "):
            kept[call] = sock
        else:
            sock.close()


def main() -> None:
    for line in sys.stdin:
        try:
            attempt(**json.loads(line))
            told = ""
        except OSError as error:
            told = errno.errorcode.get(error.errno or 0, repr(error))
        sys.stdout.write(f"{told}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
