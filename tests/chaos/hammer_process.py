"""A process that calls connect() without pause until its input ends.

    argv: a JSON list of [kind, address, port, covered], kind is tcp or udp; STEP
    output: a line at the start and after every STEP calls; at the end JSON with the number of
            calls, of refused calls to covered targets, of successful calls to uncovered targets,
            and the errnos of these wrong results

TCP uses a new non-blocking socket for each call, UDP always the same socket.
"""

from __future__ import annotations

import collections
import errno
import json
import select
import socket
import sys

ROUNDS = 100  # between two checks of the input


def main() -> None:
    errors: collections.Counter[str] = collections.Counter()
    attempts = refused = let_go = 0
    step = int(sys.argv[2])
    due = step
    targets = []
    for kind, address, port, covered in json.loads(sys.argv[1]):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        kept = socket.socket(family, socket.SOCK_DGRAM) if kind == "udp" else None
        targets.append((kept, family, (address, port), covered))
    sys.stdout.write("started\n")
    sys.stdout.flush()
    while not select.select([sys.stdin], [], [], 0)[0]:
        for _ in range(ROUNDS):
            for kept, family, where, covered in targets:
                if kept is None:
                    with socket.socket(family, socket.SOCK_STREAM) as sock:
                        sock.setblocking(False)
                        code = sock.connect_ex(where)
                else:
                    code = kept.connect_ex(where)
                went = code in (0, errno.EINPROGRESS)
                attempts += 1
                if went == covered:
                    continue
                errors[errno.errorcode.get(code, "none")] += 1
                if went:
                    let_go += 1
                else:
                    refused += 1
        if attempts >= due:
            due += step
            sys.stdout.write("on\n")
            sys.stdout.flush()
    sys.stdout.write(json.dumps([attempts, refused, let_go, errors]))


if __name__ == "__main__":
    main()
