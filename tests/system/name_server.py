"""Two name servers for tests: `python -m tests.system.name_server ROLE ADDR …`.

authority ADDR NAME ANSWER      answers every question for NAME's IPv4 address with ANSWER
resolver ADDR SERVER            asks SERVER; a question that it cannot pass on fails at once

Each serves UDP port 53 at ADDR, and prints a line when it is ready. Source: RFC 1035 section 4.
"""

from __future__ import annotations

import socket
import struct
import sys

PORT = 53
A = 1
QR, RD, RA = 0x8000, 0x0100, 0x0080
SERVFAIL, NXDOMAIN = 2, 3


def question(query: bytes) -> tuple[str, int, bytes]:
    """Return the name, type and bytes of a query's question."""
    labels, at = [], 12
    while query[at]:
        labels.append(query[at + 1 : at + 1 + query[at]].decode())
        at += 1 + query[at]
    (kind,) = struct.unpack_from("!H", query, at + 1)
    return ".".join(labels), kind, query[12 : at + 5]


def answer(query: bytes, code: int = 0, address: str = "") -> bytes:
    """Return the response to a query, with an IPv4 address if one is given."""
    count = 1 if address else 0
    head = query[:2] + struct.pack("!HHHHH", QR | RD | RA | code, 1, count, 0, 0)
    body = question(query)[2]
    if address:
        body += struct.pack("!HHHIH", 0xC00C, A, 1, 0, 4) + socket.inet_aton(address)
    return head + body


def ask(server: str, query: bytes) -> bytes:
    """Return a server's response, or a failure if it cannot be asked."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(2)
        try:
            sock.sendto(query, (server, PORT))
            return sock.recv(512)
        except OSError:
            return answer(query, SERVFAIL)


def main(role: str, address: str, *words: str) -> None:
    """Serve until killed."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((address, PORT))
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            query, client = sock.recvfrom(512)
            if role == "resolver":
                sock.sendto(ask(words[0], query), client)
                continue
            name, kind, _ = question(query)
            known = name == words[0]
            found = words[1] if known and kind == A else ""
            sock.sendto(answer(query, 0 if known else NXDOMAIN, found), client)


if __name__ == "__main__":
    main(*sys.argv[1:])
