"""Measure how long a first TCP connection takes, alternately without and with the gate.

    .venv/bin/python -m ipsecgate.lab.guest -- .venv/bin/python -m bench.first_connection

For each delay of the path, print both medians, their ratio and, for the gate, the time from the
policy that takes effect to the start of the attempt that succeeds (the client retries every
millisecond).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from rich.console import Console
from rich.table import Table

from ipsecgate.lab import first_connection
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import Lab

CASE = first_connection.Case("tcp", 4, "tunnel", gated=True)


def in_turns(
    lab: Lab, gate: Gated, delay: float, rounds: int
) -> list[list[first_connection.Outcome]]:
    """Return the outcomes without and with the gate, measured alternately."""
    lab.set_delay(delay)
    pairs = [
        [
            first_connection.measure(lab, replace(CASE, gated=False), None),
            first_connection.measure(lab, CASE, gate),
        ]
        for _ in range(rounds)
    ]
    return [list(side) for side in zip(*pairs, strict=True)]


def row(
    delay: float,
    stock: Sequence[first_connection.Outcome],
    gated: Sequence[first_connection.Outcome],
) -> list[str]:
    """Return a row of the table."""
    took = [median(o.connected or float("inf") for o in side) for side in (stock, gated)]
    released = [o.released for o in gated if o.released is not None]
    again = [sum(o.syn_retransmissions for o in side) for side in (stock, gated)]
    return [
        f"{delay:g}",
        f"{took[0]:.0f}",
        f"{took[1]:.0f}",
        f"{took[0] / took[1]:.1f}",
        f"{again[0]}/{again[1]}",
        f"{median(released):.1f} ({min(released):.1f} to {max(released):.1f})",
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--delays", type=float, nargs="+", default=[0.0, 25.0, 100.0])
    options = parser.parse_args()
    table = Table(title=f"First TCP connection, medians of {options.rounds}, ms")
    for name in ("one way", "stock", "gate", "ratio", "SYNs again", "policy to attempt"):
        table.add_column(name, justify="right")
    with Lab("ipsecgate-bench") as lab:
        lab.warm_up(["tunnel"], [4])
        with Gated(lab) as gate:
            for delay in options.delays:
                table.add_row(*row(delay, *in_turns(lab, gate, delay, options.rounds)))
    Console().print(table)


if __name__ == "__main__":
    main()
