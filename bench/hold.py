"""Measure the cost of a covered call without gate, gated and held; and how fast held calls resume.

    .venv/bin/python -m bench.hold

This uses two hosts on this machine's own kernel, with userspace ESP. It prints the median over all
rounds of each round's median in microseconds, and the ratios to the call without the gate. Then,
for many calls that wait for one negotiation, the time from the first to the last of them at the
hooks, and the controller's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab

PORT = 7300
CALLS = ("tcp connect", "udp connect", "sendto", "unix connect")
CLIENT = [sys.executable, "-S", str(Path(__file__).with_name("hold_client.py"))]
SPEC = ConnSpec("bench", "tunnel", 4)


def cost(lab: Lab, gate: Gated, calls: int) -> list[dict[str, float]]:
    """Return microseconds per call: without the gate, gated, and under `ipsecgate exec`."""
    client = [*CLIENT, str(lab.b.address(SPEC)), str(PORT), str(calls)]
    ways = [
        lab.a.run(client),
        lab.a.run(client, cgroup=gate.cgroup),
        lab.a.run(gate.exec_argv(*client)),
    ]
    return [json.loads(done.stdout) for done in ways]


def release(lab: Lab, gate: Gated, threads: int) -> float:
    """Return the milliseconds from the first to the last of many held calls that resume."""
    lab.a.charon.terminate(SPEC.name)
    while lab.a.established():
        time.sleep(0.01)
    os.kill(lab.a.charon.pid, signal.SIGSTOP)
    client = [*CLIENT, str(lab.b.address(SPEC)), str(PORT), str(threads), "threads"]
    process = lab.a.popen(gate.exec_argv(*client), stdout=subprocess.PIPE)
    while len(gate.ask()["holds"]) < threads:
        time.sleep(0.05)
    spread = gate.spread(threads, lambda: os.kill(lab.a.charon.pid, signal.SIGCONT))
    process.communicate()
    return spread * 1000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=500)
    options = parser.parse_args()
    table = Table(title=f"A covered call, median of {options.rounds} rounds, microseconds")
    for name in ("call", "no gate", "gated", "held", "gated/no gate", "held/no gate"):
        table.add_column(name, justify="right")
    with Lab("ipsecgate-bench-hold", libipsec=True) as lab:
        lab.b.serve("tcp-server", PORT)
        with Gated(lab) as gate:
            lab.load(SPEC)
            gate.wait_policy(SPEC.name)
            first = [*CLIENT, str(lab.b.address(SPEC)), str(PORT), "1"]
            lab.a.run(gate.exec_argv(*first))  # establishes coverage
            rounds = [cost(lab, gate, options.calls) for _ in range(options.rounds)]
            spreads = [release(lab, gate, options.threads) for _ in range(options.rounds)]
            memory = gate.memory()
    for call in CALLS:
        alone, gated, held = (median(r[way][call] for r in rounds) for way in range(3))
        numbers = (alone, gated, held, gated / alone, held / alone)
        table.add_row(call, *(f"{number:.1f}" for number in numbers))
    console = Console()
    console.print(table)
    console.print(
        f"{options.threads} held calls resumed within {median(spreads):.1f} ms "
        f"({min(spreads):.1f} to {max(spreads):.1f}); the controller used up to {memory:.1f} MiB"
    )


if __name__ == "__main__":
    main()
