"""Measure the cost of a covered call without gate, gated and held; and how fast held calls resume.

    .venv/bin/python -m bench.hold [--json FILE]

This uses two hosts on this machine's own kernel, with userspace ESP. Each round measures in turn:

    no gate    the call alone
    bare       one Python process is notified of the call, and lets it continue at once
    gated      the hooks judge it
    held       the same under `ipsecgate exec`
    held --udp likewise, where sendmsg() is reported, too

Then many calls wait for one negotiation, each in a thread that does nothing else. From the first
answer on, the time until the last of them is answered, which is the gate's part, and until the last
is at the hooks, for which the threads need the processors. And the controller's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from bench.report import Report, Row
from ipsecgate.lab.gated import Gated, Spread
from ipsecgate.lab.hosts import ConnSpec, Lab
from ipsecgate.lab.netns import LabError

PORT = 7300
CALLS = (
    "tcp connect",
    "udp connect",
    "udp connect, mean",
    "sendto",
    "unix connect",
    "sendmsg, connected",
    "sendmsg, local",
)
WAYS = ("no gate", "bare", "gated", "held", "held --udp")
CLIENT = [sys.executable, "-S", str(Path(__file__).with_name("hold_client.py"))]
THREADS = Path(__file__).with_name("hold_threads.c")
BARE = [sys.executable, str(Path(__file__).with_name("bare_supervisor.py"))]
SPEC = ConnSpec("bench", "tunnel", 4)


def cost(lab: Lab, gate: Gated, calls: int) -> dict[str, dict[str, float]]:
    """Return microseconds per call, by way."""
    client = [*CLIENT, str(lab.b.address(SPEC)), str(PORT), str(calls)]
    done = (
        lab.a.run(client),
        lab.a.run([*BARE, *client]),
        lab.a.run(client, cgroup=gate.cgroup),
        lab.a.run(gate.exec_argv(*client)),
        lab.a.run(gate.exec_argv(*client, options=["--udp"])),
    )
    return {way: json.loads(one.stdout) for way, one in zip(WAYS, done, strict=True)}


def release(lab: Lab, gate: Gated, program: Path, threads: int, programs: int) -> Spread:
    """Return how long many held calls take to be answered, and to be at the hooks.

    `threads`: calls of each of so many programs; each program has a listener of its own.
    """
    lab.a.charon.terminate(SPEC.name)
    while lab.a.established():
        time.sleep(0.01)
    os.kill(lab.a.charon.pid, signal.SIGSTOP)
    client = [str(program), str(lab.b.address(SPEC)), str(PORT), str(threads)]
    processes = [
        lab.a.popen(gate.exec_argv(*client, options=["--hold", "2m"])) for _ in range(programs)
    ]
    while (held := len(gate.ask()["holds"])) < threads * programs:
        if any(process.poll() is not None for process in processes):
            raise LabError("a call was not held: is the machine too busy for an inspector?")
        time.sleep(0.05 + held / 5000)  # a long answer takes the controller's time
    spread = gate.spread(threads * programs, lambda: os.kill(lab.a.charon.pid, signal.SIGCONT))
    for process in processes:
        process.communicate()
    return spread


def releases(lab: Lab, gate: Gated, options: argparse.Namespace) -> list[Row]:
    """Measure the release of the calls of one program, and of many programs."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "threads"
        subprocess.run(["cc", "-O2", "-pthread", "-o", program, THREADS], check=True)
        for programs in sorted({1, options.programs}):
            of = {"calls": options.threads * programs}
            spreads = [
                release(lab, gate, program, options.threads, programs)
                for _ in range(options.releases)
            ]
            rows += [
                Row("answered", "ms", tuple(one.answered * 1000 for one in spreads), of),
                Row("at the hooks", "ms", tuple(one.at_hooks * 1000 for one in spreads), of),
                Row("controller's peak memory", "MiB", (gate.memory(),), of),
            ]
    return rows


def measure(options: argparse.Namespace) -> Report:
    """Measure all of it."""
    with Lab("ipsecgate-bench-hold", libipsec=True) as lab:
        lab.b.serve("tcp-server", PORT)
        with Gated(lab) as gate:
            lab.load(SPEC)
            gate.wait_policy(SPEC.name)
            first = [*CLIENT, str(lab.b.address(SPEC)), str(PORT), "1"]
            lab.a.run(gate.exec_argv(*first))  # establishes coverage
            rounds = [cost(lab, gate, options.calls) for _ in range(options.rounds)]
            released = releases(lab, gate, options)
    rows = [
        Row(call, "us", tuple(r[way][call] for r in rounds), {"way": way})
        for call in CALLS
        for way in WAYS
    ]
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    return Report(
        "hold", "A covered call, and the release of held ones", (*rows, *released), settings
    )


def show(report: Report) -> None:
    """Print medians over the rounds, and the ratio of held to bare in the same round."""
    table = Table(title="A covered call, medians of the rounds, microseconds")
    for name in ("call", *WAYS, "held/bare"):
        table.add_column(name, justify="right")
    for call in CALLS:
        by_way = {row.of["way"]: row for row in report.rows if row.name == call}
        pairs = zip(by_way["held"].samples, by_way["bare"].samples, strict=True)
        numbers = (*(by_way[way].median for way in WAYS), median(h / b for h, b in pairs))
        table.add_row(call, *(f"{number:.1f}" for number in numbers))
    console = Console()
    console.print(table)
    for row in report.rows[len(CALLS) * len(WAYS) :]:
        low, high = min(row.samples), max(row.samples)
        console.print(
            f"{row.name}, {row.of['calls']} calls: "
            f"{row.median:.1f} {row.unit} ({low:.1f} to {high:.1f})"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--releases", type=int, default=7)
    parser.add_argument("--threads", type=int, default=500)
    parser.add_argument("--programs", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    report = measure(options)
    show(report)
    if options.json is not None:
        report.write(options.json)


if __name__ == "__main__":
    main()
