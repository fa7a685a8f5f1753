"""What the backstop adds to a packet: small sends on a connected socket, with it and without.

    .venv/bin/python -m bench.packet

Two hosts on this machine's own kernel, whose strongSwans do ESP themselves: a covered packet is
looked up, and its device is looked for, which is the longest way through the backstop. A packet
that no policy names is remembered by its socket. One process is in the gated cgroup, the other
outside; they send in turns. No hook is asked for either but the backstop. Prints medians, and
the median of the turns' ratios with its quartiles.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median, quantiles

from rich.console import Console
from rich.table import Table

from ipsecgate.lab.gated import Gated
from ipsecgate.lab.host import Host
from ipsecgate.lab.hosts import ConnSpec, Lab
from ipsecgate.lab.netns import LabError

PORT = 7300
PROGRAM = [sys.executable, "-S", str(Path(__file__).with_name("packet_client.py"))]
SPEC = ConnSpec("bench", "tunnel", 4)
PAUSE = 0.004
"""For a turn's packets to be gone, in seconds."""


def start(host: Host, *words: object, cgroup: Path | None = None) -> subprocess.Popen[str]:
    """Start the program and wait until it is connected, or listens. Raises: LabError."""
    argv = [*PROGRAM, *map(str, words)]
    pipe = subprocess.PIPE
    process = host.popen(argv, cgroup=cgroup, stdin=pipe, stdout=pipe)
    answer(process)
    return process


def answer(process: subprocess.Popen[str]) -> str:
    """Return the next line of its output. Raises: LabError."""
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        raise LabError(f"it ended with {process.wait()}")
    return line


def turn(process: subprocess.Popen[str]) -> float:
    """Have it send for one turn; return the nanoseconds of one send."""
    time.sleep(PAUSE)
    if process.stdin:
        print(file=process.stdin, flush=True)
    return float(answer(process))


def measure(free: subprocess.Popen[str], gated: subprocess.Popen[str], turns: int) -> list[str]:
    """Return a line of the table."""
    pairs = []
    for number in range(turns):
        if number % 2:
            pairs.append((turn(free), turn(gated)))
        else:
            pairs.append((turn(gated), turn(free))[::-1])
    without, beside = (median(side) for side in zip(*pairs, strict=True))
    low, middle, high = quantiles([two / one for one, two in pairs])
    return [f"{without:.0f}", f"{beside:.0f}", f"{middle:.3f} ({low:.3f} to {high:.3f})"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--sends", type=int, default=100)
    options = parser.parse_args()
    table = Table(title=f"A send of 64 bytes, {options.turns} turns of {options.sends}, ns")
    for name in ("packet", "no backstop", "backstop", "ratio (quartiles)"):
        table.add_column(name, justify="right")
    with Lab("ipsecgate-bench-packet", libipsec=True) as lab:
        start(lab.b, "sink", PORT)
        with Gated(lab) as gate:
            lab.load(SPEC)
            gate.wait_policy(SPEC.name)
            first = [*PROGRAM, "tcp", str(lab.b.address(SPEC)), str(PORT), "1"]
            lab.a.run(gate.holding(*first))  # from now on it is covered
            for name, kind, address in (
                ("udp, covered", "udp", lab.b.address(SPEC)),
                ("udp, no policy", "udp", lab.b.outer[4]),
                ("tcp, no policy", "tcp", lab.b.outer[4]),
            ):
                words = (kind, address, PORT, options.sends)
                pair = [start(lab.a, *words, cgroup=cgroup) for cgroup in (None, gate.cgroup)]
                table.add_row(name, *measure(pair[0], pair[1], options.turns))
    Console().print(table)


if __name__ == "__main__":
    main()
