"""What a covered call costs: alone, gated, and gated with `ipsecgate exec`, in turns.

    .venv/bin/python -m bench.hold

Two hosts on this machine's own kernel, whose strongSwans do ESP themselves. Prints medians
of the rounds' medians in microseconds, and their ratios to the call that no gate sees.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab

PORT = 7300
CALLS = ("tcp connect", "udp connect", "sendto", "unix connect")
CLIENT = Path(__file__).with_name("hold_client.py")


def measure(lab: Lab, gate: Gated, to: str, calls: int) -> list[dict[str, float]]:
    """Return microseconds a call: outside the gate, gated, and held where need be."""
    client = [sys.executable, "-S", str(CLIENT), to, str(PORT), str(calls)]
    ways = [
        lab.a.run(client),
        lab.a.run(client, cgroup=gate.cgroup),
        lab.a.run(gate.holding(*client)),
    ]
    return [json.loads(done.stdout) for done in ways]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=2000)
    options = parser.parse_args()
    table = Table(title=f"A covered call, median of {options.rounds} rounds, microseconds")
    for name in ("call", "no gate", "gated", "held", "gated/no gate", "held/no gate"):
        table.add_column(name, justify="right")
    with Lab("ipsecgate-bench-hold", libipsec=True) as lab:
        spec = ConnSpec("bench", "tunnel", 4)
        lab.b.serve("tcp-server", PORT)
        with Gated(lab) as gate:
            lab.load(spec)
            gate.wait_policy(spec.name)
            to = str(lab.b.address(spec))
            lab.a.run(gate.holding(sys.executable, "-S", str(CLIENT), to, str(PORT), "1"))
            rounds = [measure(lab, gate, to, options.calls) for _ in range(options.rounds)]
    for call in CALLS:
        alone, gated, held = (median(r[way][call] for r in rounds) for way in range(3))
        numbers = (alone, gated, held, gated / alone, held / alone)
        table.add_row(call, *(f"{number:.1f}" for number in numbers))
    Console().print(table)


if __name__ == "__main__":
    main()
