"""Measure when an application learns that there will be no SA, and from which error.

    .venv/bin/python -m ipsecgate.lab.guest -- .venv/bin/python -m bench.failure

A TCP client connects to a protected peer, and IKE fails: the peer is silent, has another key, or
accepts no proposal. strongSwan retransmits as it does by default (five times, 165 s in all).

    stock              strongSwan's trap policy; one connect() until it fails
    stock, queueing    the same with net.core.xfrm_larval_drop = 0
    gate               one connect() in a gated cgroup, which is refused at once
    gate, retrying     connect() again a millisecond after each EPERM, for up to 30 s: a refusal
                       turns into another error when IKE has failed
    gate, exec         one connect() under `ipsecgate exec`, which holds it

Without the gate an error takes minutes. So each stock way has a lab of its own, and while its
clients wait, those of the gate take turns in a third. `samples` says how many clients there are for
each way; those of a stock lab start a second apart.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.report import Report, Row, Value
from bench.tables import publish
from ipsecgate.edges.bpf import bytecode
from ipsecgate.lab import traffic
from ipsecgate.lab.connections import connection
from ipsecgate.lab.endpoints import Client
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab

PORT = 7000
STOCK_LIMIT, RETRY_LIMIT = 190.0, 30.0  # seconds, after which a client gives up
APART = 1.0
TRAP = ConnSpec("bench", "tunnel", 4, start_action="trap")
FAILURES = ("silent peer", "wrong key", "no proposal")
STOCK = {"stock": 1, "stock, queueing": 0}  # net.core.xfrm_larval_drop
GATE = ("gate", "gate, retrying", "gate, exec")
WAYS = (*STOCK, *GATE)
DEFAULTS = "retransmit_tries = 5\nretransmit_timeout = 4.0\nretransmit_base = 1.8"


def fail(lab: Lab, failure: str) -> None:
    """Bring a lab back to no SA, and make the next negotiation fail."""
    lab.reset()
    lab.load(TRAP)
    if failure == "silent peer":
        lab.drop_ike()
    elif failure == "wrong key":
        lab.break_psk()
    else:
        other = replace(TRAP, ike_proposals=("aes256-sha384-modp3072",))
        lab.b.charon.load(connection(other, lab.b.end(TRAP, ()), lab.a.end(TRAP, ()), "none"))


def client(lab: Lab, *options: str) -> list[str]:
    """Return the command line of a client that connects to host b."""
    return traffic.command(
        "tcp-client", "--to", str(lab.b.address(TRAP)), "--port", str(PORT), *options
    )


def gated(lab: Lab, cache: Path, failure: str, way: str) -> tuple[str, float]:
    """Return the error that a client behind the gate gets, and after how many milliseconds.

    The gate is a new one: it would remember a failure, and not try again for a while. `cache` keeps
    its compiled hooks.
    """
    fail(lab, failure)
    once = ("--retry", "none", "--limit", str(STOCK_LIMIT))
    options = ("--limit", str(RETRY_LIMIT)) if way == "gate, retrying" else once
    argv = client(lab, *options)
    with Gated(lab, cache=cache) as gate:
        gate.wait_policy(TRAP.name)
        if way == "gate, exec":
            running = lab.a.popen(gate.exec_argv(*argv), stdout=subprocess.PIPE)
        else:
            running = lab.a.popen(argv, cgroup=gate.cgroup, stdout=subprocess.PIPE)
        return error_of(Client(running))


def error_of(running: Client) -> tuple[str, float]:
    """Wait for a client; return its error and the milliseconds from its first attempt to that."""
    report = running.result(STOCK_LIMIT + 30)
    name = "none" if report["error"] is None else str(report["error"])
    # `limit` is no error of the system, but the end of the client's own patience.
    name = "only EPERM" if name == "limit" and "EPERM" in report["errnos"] else name
    return name, (report["finished"] - report["first"]) * 1000


def measure(failures: Sequence[str], samples: int) -> Iterator[Row]:
    """Yield one row for each failure, way and error."""
    with ExitStack() as stack:
        labs = {
            name: stack.enter_context(Lab(f"ipsecgate-bench-{number}"))
            for number, name in enumerate((*STOCK, "gate"))
        }
        for name, lab in labs.items():
            lab.warm_up([TRAP.mode], [TRAP.family])
            lab.a.charon.configure(DEFAULTS)
            if name in STOCK:
                lab.a.namespace.sysctl("core/xfrm_larval_drop", str(STOCK[name]))
        cache = Path(stack.enter_context(TemporaryDirectory(prefix="ipsecgate-bench-hooks-")))
        bytecode.get(cache)
        for failure in failures:
            found = of_one(labs, cache, failure, samples)
            in_order = sorted(found.items(), key=lambda at: WAYS.index(at[0][0]))
            for (way, error), times in in_order:
                of: dict[str, Value] = {"way": way, "failure": failure, "error": error}
                yield Row("told after", "ms", tuple(times), of)


def of_one(
    labs: dict[str, Lab], cache: Path, failure: str, samples: int
) -> dict[tuple[str, str], list[float]]:
    """Return the milliseconds by way and error, for one failure."""
    found: dict[tuple[str, str], list[float]] = {}
    waiting: list[tuple[str, Client]] = []
    for way in STOCK:
        fail(labs[way], failure)
    for _ in range(samples):
        for way in STOCK:
            lab = labs[way]
            argv = client(lab, "--retry", "none", "--limit", str(STOCK_LIMIT))
            waiting.append((way, Client(lab.a.popen(argv, stdout=subprocess.PIPE))))
        time.sleep(APART)
    for turn in range(samples):
        for way in GATE:
            sys.stderr.write(f"{failure}, {turn + 1} of {samples}: {way}\n")
            error, took = gated(labs["gate"], cache, failure, way)
            found.setdefault((way, error), []).append(took)
    sys.stderr.write(f"{failure}: stock, which takes minutes\n")
    for way, running in waiting:
        error, took = error_of(running)
        found.setdefault((way, error), []).append(took)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--failures", nargs="+", default=FAILURES, choices=FAILURES)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    options = parser.parse_args()
    rows = tuple(measure(options.failures, options.samples))
    title = "A failed negotiation: what the application gets, and when"
    publish(Report("failure", title, rows, {"samples": options.samples}), options.json)


if __name__ == "__main__":
    main()
