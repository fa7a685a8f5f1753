"""Measure how long a first TCP connection takes, with several ways in turns.

    .venv/bin/python -m ipsecgate.lab.guest -- .venv/bin/python -m bench.first_connection

Two hosts with real IKE and ESP, and a path with a delay. Every connection begins without any SA.
The ways take turns, each round begins with another one. For each, the client's connect() is timed
from its first attempt, and from the kernel's notification of the new SA; host a's kernel counts
SYNs that it sent again; a capture between the hosts counts packets in clear.

    stock              a trap policy of strongSwan; the kernel drops packets until the SA is there
                       (net.core.xfrm_larval_drop = 1, the default)
    stock, queueing    the same, but the kernel queues them (net.core.xfrm_larval_drop = 0)
    Libreswan          an on-demand connection of Libreswan, with the kernel's defaults
    gate, retrying     the gate; the client tries again a millisecond after each refusal
    gate, exec         the gate; the client runs under `ipsecgate exec`, which holds its call
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from bench import libreswan
from bench.report import Report, Row
from bench.tables import publish
from ipsecgate.lab import traffic
from ipsecgate.lab.endpoints import Client
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab

PORT = 7000
LIMIT = 20.0  # seconds, after which a client gives up
SA_TIMEOUT = 10.0
TRAP = ConnSpec("bench", "tunnel", 4, start_action="trap")
WAYS = ("stock", "stock, queueing", "Libreswan", "gate, retrying", "gate, exec")


@dataclass(frozen=True)
class Way:
    """One way to connect. `prepare` makes its lab ready, `start` runs a client's command line."""

    name: str
    lab: Lab
    prepare: Callable[[], None]
    start: Callable[[Sequence[str]], subprocess.Popen[str]]


@contextmanager
def ways(wanted: Sequence[str]) -> Iterator[list[Way]]:
    """Build two labs, one with the gate and one with Libreswan, and return the ways wanted."""
    with ExitStack() as stack:
        lab = stack.enter_context(Lab("ipsecgate-bench"))
        lab.warm_up([TRAP.mode], [TRAP.family])
        gate = stack.enter_context(Gated(lab))

        def trap(larval_drop: int, gated: bool) -> None:
            lab.reset()
            lab.a.namespace.sysctl("core/xfrm_larval_drop", str(larval_drop))
            lab.load(TRAP)
            if gated:
                gate.wait_policy(TRAP.name)

        def free(argv: Sequence[str]) -> subprocess.Popen[str]:
            return lab.a.popen(argv, stdout=subprocess.PIPE)

        def refused(argv: Sequence[str]) -> subprocess.Popen[str]:
            return lab.a.popen(argv, cgroup=gate.cgroup, stdout=subprocess.PIPE)

        def held(argv: Sequence[str]) -> subprocess.Popen[str]:
            return lab.a.popen(gate.exec_argv(*argv), stdout=subprocess.PIPE)

        made = [
            Way("stock", lab, lambda: trap(1, gated=False), free),
            Way("stock, queueing", lab, lambda: trap(0, gated=False), free),
            Way("gate, retrying", lab, lambda: trap(1, gated=True), refused),
            Way("gate, exec", lab, lambda: trap(1, gated=True), held),
        ]
        if "Libreswan" in wanted:
            other = stack.enter_context(Lab("ipsecgate-bench-pluto"))
            other.warm_up([TRAP.mode], [TRAP.family])
            pluto = libreswan.Pluto(other, TRAP)
            popen = other.a.popen
            start = lambda argv: popen(argv, stdout=subprocess.PIPE)  # noqa: E731
            made.insert(2, Way("Libreswan", other, pluto.reset, start))
        yield [way for way in made if way.name in wanted]


def attempt(way: Way) -> dict[str, float]:
    """Make a first connection; return what was measured, by the name of the row.

    Raises: LabError.
    """
    way.prepare()
    lab = way.lab
    before = lab.a.counters()["TcpExtTCPSynRetrans"]
    options = ("--to", str(lab.b.address(TRAP)), "--port", str(PORT), "--limit", str(LIMIT))
    with lab.b.serve("tcp-server", PORT), lab.record() as recorder, lab.capture() as capture:
        report = Client(way.start(traffic.command("tcp-client", *options))).result()
        ready = recorder.wait("NEWSA", timeout=SA_TIMEOUT)
        clear = len(capture.stop().clear)
    measured = {
        "SYNs again": float(lab.a.counters()["TcpExtTCPSynRetrans"] - before),
        "packets in clear": float(clear),
        "not connected": float(report["connected"] is None),
    }
    if report["connected"] is not None and ready is not None:
        measured["connected"] = (report["connected"] - report["first"]) * 1000
        measured["after the SA"] = (report["connected"] - ready) * 1000
    return measured


def measure(wanted: Sequence[str], delays: Sequence[float], rounds: int) -> Iterator[Row]:
    """Yield the rows of each delay and way; `delays` in milliseconds, one way."""
    samples: dict[tuple[str, str, float], list[float]] = {}
    with ways(wanted) as made:
        for delay, turn in product(delays, range(rounds)):
            for lab in dict.fromkeys(way.lab for way in made):
                lab.set_delay(delay)
            first = turn % len(made)
            for way in made[first:] + made[:first]:
                sys.stderr.write(f"{delay:g} ms, round {turn + 1} of {rounds}: {way.name}\n")
                for name, value in attempt(way).items():
                    samples.setdefault((name, way.name, delay), []).append(value)
    for way_name, delay in product(wanted, delays):
        of = {"way": way_name, "one way": f"{delay:g} ms"}
        for name, unit in (("connected", "ms"), ("after the SA", "ms"), ("SYNs again", "")):
            if values := samples.get((name, way_name, delay)):
                yield Row(name, unit, tuple(values), of)
    for way_name, name in product(wanted, ("packets in clear", "not connected")):
        # A median would hide a single packet.
        total = sum(sum(samples[name, way_name, delay]) for delay in delays)
        yield Row(name, "", (total,), {"way": way_name})


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--delays", type=float, nargs="+", default=[0.0, 25.0, 100.0, 300.0])
    parser.add_argument("--without", nargs="+", default=[], choices=WAYS, metavar="WAY")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    options = parser.parse_args()
    wanted = [way for way in WAYS if way not in options.without]
    missing = "Libreswan" in wanted and not libreswan.home().is_dir()
    if missing:
        wanted.remove("Libreswan")
    rows = tuple(measure(wanted, options.delays, options.rounds))
    report = Report(
        "first_connection",
        "First TCP connection to a protected peer",
        rows,
        {"rounds": options.rounds, "mode": TRAP.mode},
    )
    publish(report, options.json)
    if missing:
        sys.exit("Libreswan was not measured: first run python -m bench.libreswan")


if __name__ == "__main__":
    main()
