"""A process that makes connect() calls without a pause until its input ends.

    argv: a list of [kind, address, port, covered] as JSON, kind is tcp or udp; STEP
    output: a line when it starts, and after every STEP calls; at its end how many calls there
            were, how many for what is covered were refused, how many for what is not were let
            go, and the errnos of those

A TCP socket is new each time and does not wait for its answer; a UDP socket is kept.
"""

from __future__ import annotations

import collections
import errno
import json
import select
import socket
import sys

ROUNDS = 100  # between two looks at the input


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
    sys.stdout.write("it starts\n")
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
