"""A process that makes the system calls it is told to: one JSON line in, one errno out.

    {"call": "tcp", "address": "::1", "port": 80, "bind": null}  ->  "" or "EPERM"

TCP does not wait: EINPROGRESS means that a SYN is on its way.
"""

from __future__ import annotations

import errno
import json
import socket
import sys

IP_FREEBIND = 15


def attempt(call: str, address: str, port: int, bind: str | None) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = socket.SOCK_STREAM if call == "tcp" else socket.SOCK_DGRAM
    with socket.socket(family, kind) as sock:
        sock.setblocking(False)
        if bind:
            sock.setsockopt(socket.SOL_IP, IP_FREEBIND, 1)
            sock.bind((bind, 0))
        if call in ("tcp", "udp connect"):
            sock.connect((address, port))
        elif call == "sendto":
            sock.sendto(b"x", (address, port))
        elif call == "sendmsg":
            sock.sendmsg([b"x"], [], 0, (address, port))
        else:
            raise ValueError(call)


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
