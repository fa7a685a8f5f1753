"""Measure how long after the kernel has the policy a held call returns, on real ESP.

    .venv/bin/python -m ipsecgate.lab.guest -- .venv/bin/python -m bench.hold_release [--json FILE]

A UDP connect() under `ipsecgate exec` waits for a negotiation without a trap, so the outbound
policy is the last that it needs. The time runs from the kernel's notification of that policy, as a
thread of real-time priority hears it, to the return of connect(), by the client's own clock. Beside
it: the same connect() again, which the inspector answers.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import quantiles

from rich.console import Console

from bench.report import Report, Row
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab
from ipsecgate.lab.xfrm_events import POLICY_ADDED

PORT = 7300
SPEC = ConnSpec("release", "tunnel", 4, start_action="none")
CLIENT = """
import json, socket, sys, time
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
times = []
for _ in range(12):
    began = time.monotonic()
    sock.connect((sys.argv[1], int(sys.argv[2])))
    times.append((began, time.monotonic()))
print(json.dumps(times))
"""


def once(lab: Lab, gate: Gated) -> tuple[float, float]:
    """Return the milliseconds from the policy to the return of connect(), and of the last one."""
    lab.reset()
    lab.load(SPEC)
    gate.wait_policy(SPEC.name)
    with lab.record() as recorder:
        command = [sys.executable, "-S", "-c", CLIENT, str(lab.b.address(SPEC)), str(PORT)]
        times = json.loads(lab.a.run(gate.exec_argv(*command)).stdout)
        policy = recorder.wait(*POLICY_ADDED)
    if policy is None:
        raise SystemExit("the kernel has no policy")
    began, ended = times[-1]
    return (times[0][1] - policy) * 1000, (ended - began) * 1000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--delays", type=float, nargs="+", default=[0.0, 25.0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    rows = []
    with Lab("ipsecgate-bench-release") as lab:
        lab.warm_up(["tunnel"], [4])
        with Gated(lab) as gate:
            for delay in options.delays:
                lab.set_delay(delay)
                released, again = zip(
                    *(once(lab, gate) for _ in range(options.rounds)), strict=True
                )
                of = {"one way, ms": delay}
                rows += [
                    Row("policy to return", "ms", released, of),
                    Row("the same call again", "ms", again, of),
                ]
    settings = {"rounds": options.rounds}
    report = Report(
        "hold_release", "From the policy to the return of a held call", tuple(rows), settings
    )
    for row in report.rows:
        worst = quantiles(row.samples, n=100)[98]
        Console().print(
            f"{row.name}, {row.of}: median {row.median:.2f} ms, 99th percentile {worst:.2f} ms, "
            f"{min(row.samples):.2f} to {max(row.samples):.2f}"
        )
    if options.json is not None:
        report.write(options.json)


if __name__ == "__main__":
    main()
