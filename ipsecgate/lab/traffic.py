"""Real clients and servers, each in its own process: `python -m ipsecgate.lab.traffic ROLE …`.

tcp-server --bind ADDR --port N
udp-server --bind ADDR --port N
tcp-client --to ADDR --port N [--bind ADDR] [--limit S] [--retry ERRNOS] [--same-socket]
udp-client --to ADDR --port N [--bind ADDR [--local N]] [--limit S] [--retry ERRNOS] [--connected]
           [--count N] [--rate HZ] [--size BYTES]
ERRNOS is a list such as EPERM,EAGAIN (or none): these errors are retried after 1 ms.

Only a small part of the standard library is used, because every case starts a fresh interpreter
(`command()` returns the fastest command line). A client prints one line of JSON at its end. A
server prints a line when it is ready, answers each input line with its counts since the last
answer, and exits at the end of its input. Times are CLOCK_MONOTONIC in seconds, which all
namespaces of a kernel share. Sockets block, as in a plain application; the limit is an alarm, so
that connect() stays one system call that a supervisor can hold.
"""

from __future__ import annotations

import os
import signal
import sys

from ipsecgate.lab import clients, servers
from ipsecgate.lab.options import Options, UnknownWordError, say

CLIENTS = {"tcp-client": clients.tcp_client, "udp-client": clients.udp_client}
SERVERS = {"tcp-server": servers.tcp_server, "udp-server": servers.udp_server}
START = """\
import sys
sys.path.append(sys.argv.pop(1))
from ipsecgate.lab.traffic import main
sys.exit(main(sys.argv[1:]))
"""


def command(role: str, *arguments: str) -> list[str]:
    """Return the argv for a role: a Python interpreter without site or environment."""
    # No pathlib: importing it takes longer than importing this module.
    home = __file__
    for _ in ("traffic.py", "lab", "ipsecgate"):
        home = os.path.dirname(home)  # noqa: PTH120
    return [sys.executable, "-S", "-I", "-c", START, home, role, *arguments]


def main(arguments: list[str]) -> int:
    """Run the role named by the arguments; return the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    role = arguments[0] if arguments else ""
    try:
        options = Options(arguments[1:])
    except UnknownWordError as error:
        sys.stderr.write(f"unknown argument: {error}\n{__doc__}")
        return 2
    if role in SERVERS:
        SERVERS[role](options)
        return 0
    if role in CLIENTS:
        report = CLIENTS[role](options)
        say(report)
        return 0 if report["error"] is None else 1
    sys.stderr.write(__doc__ or "")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
