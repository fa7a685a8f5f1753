"""Measure what the backstop adds to small sends on a connected socket.

    .venv/bin/python -m bench.packet

This uses two hosts on this machine's own kernel, with userspace ESP. A covered datagram takes the
longest path through the backstop: it is looked up in the policy table, and its device is checked
against the IKE daemon's. A packet that no policy names passes because its socket remembers the
result. One process runs in the gated cgroup, another outside, and they send in turns; on a
connected socket only the backstop sees a send. Each turn gives one ratio.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from bench.report import Report, Row
from bench.tables import publish
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.host import Host
from ipsecgate.lab.hosts import ConnSpec, Lab
from ipsecgate.lab.netns import LabError

PORT = 7300
CLIENT = [sys.executable, "-S", str(Path(__file__).with_name("packet_client.py"))]
SPEC = ConnSpec("bench", "tunnel", 4)
PAUSE = 0.004
"""Seconds between turns, so that the packets of one turn are gone before the next."""


def start(host: Host, *words: object, cgroup: Path | None = None) -> subprocess.Popen[str]:
    """Start the client; wait until it is connected or listens. Raises: LabError."""
    argv = [*CLIENT, *map(str, words)]
    pipe = subprocess.PIPE
    process = host.popen(argv, cgroup=cgroup, stdin=pipe, stdout=pipe)
    read_line(process)
    return process


def read_line(process: subprocess.Popen[str]) -> str:
    """Return the next line of a client's output. Raises: LabError if it has exited."""
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        raise LabError(f"the client exited with {process.wait()}")
    return line


def turn(process: subprocess.Popen[str]) -> float:
    """Let a client send for one turn; return its mean nanoseconds per send. Raises: LabError."""
    time.sleep(PAUSE)
    if process.stdin:
        print(file=process.stdin, flush=True)
    return float(read_line(process))


def measure(
    packet: str, free: subprocess.Popen[str], gated: subprocess.Popen[str], turns: int
) -> list[Row]:
    """Return nanoseconds per send without the backstop and with it, and the ratio of each turn."""
    pairs = []
    for number in range(turns):
        if number % 2:
            pairs.append((turn(free), turn(gated)))
        else:
            pairs.append((turn(gated), turn(free))[::-1])
    of = {"packet": packet}
    return [
        Row("without", "ns", tuple(one for one, _ in pairs), of),
        Row("with the backstop", "ns", tuple(two for _, two in pairs), of),
        Row("ratio", "", tuple(two / one for one, two in pairs), of),
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--sends", type=int, default=100)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    options = parser.parse_args()
    rows: list[Row] = []
    with Lab("ipsecgate-bench-packet", libipsec=True) as lab:
        start(lab.b, "sink", PORT)
        with Gated(lab) as gate:
            lab.load(SPEC)
            gate.wait_policy(SPEC.name)
            first = [*CLIENT, "tcp", str(lab.b.address(SPEC)), str(PORT), "1"]
            lab.a.run(gate.exec_argv(*first))  # establishes coverage
            for name, kind, address in (
                ("udp, covered", "udp", lab.b.address(SPEC)),
                ("udp, no policy", "udp", lab.b.outer[4]),
                ("tcp, no policy", "tcp", lab.b.outer[4]),
            ):
                words = (kind, address, PORT, options.sends)
                free, gated = (start(lab.a, *words, cgroup=at) for at in (None, gate.cgroup))
                sys.stderr.write(f"{name}\n")
                rows += measure(name, free, gated, options.turns)
    settings = {"turns": options.turns, "sends in a turn": options.sends}
    publish(Report("packet", "A send of 64 bytes", tuple(rows), settings), options.json)


if __name__ == "__main__":
    main()
