"""What an event costs the controller as the number of tunnels grows: processor time, no kernel.

    .venv/bin/python -m bench.growth [100 1000 10000 100000]

Each tunnel is a kernel policy for one host, an SA, and a CHILD_SA that the IKE daemon lists. Timed
are the first compilation of all of them, and then, tunnel by tunnel, the deletion of its SA (it
closes) and a new SA (it opens), up to the bytes that go into the maps.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from pathlib import Path

from rich.console import Console
from rich.table import Table as Screen

from bench.report import Report, Row
from ipsecgate.core.model.events import KernelSnapshot, SaGone, SaSet, XfrmEvent
from ipsecgate.core.model.flow import Selector, TrafficSelector
from ipsecgate.core.model.ipsec import (
    ESP,
    Action,
    ChildName,
    ChildSa,
    Mode,
    Sa,
    SaId,
    SpdEntry,
    SpdKey,
    Template,
)
from ipsecgate.core.state.kernel_state import KernelState
from ipsecgate.core.tables.image import TableImage
from ipsecgate.core.tables.layout import TableId
from ipsecgate.core.tables.rule_table import RuleTable

HERE, NEAR = ip_address("192.0.2.1"), ip_network("10.200.0.0/16")
SIZES = (100, 1000, 10_000, 100_000)
STEP = 1000  # policies in one go
TIMED = 300  # tunnels that are closed and opened


def tunnel(number: int) -> tuple[SpdEntry, Sa, ChildSa]:
    """Return a road warrior's kernel policy, SA, and CHILD_SA."""
    far, peer = ip_network((0x0A000000 + number, 32)), ip_address(0xC6000000 + number)
    spi = 0x1000 + number
    template = Template(ESP, Mode.TUNNEL, number + 1, spi, HERE, peer)
    policy = SpdEntry(SpdKey(Selector(NEAR, far)), 1000, Action.PROTECT, (template,))
    sa = Sa(SaId(peer, spi, ESP), HERE, reqid=number + 1, mode=Mode.TUNNEL)
    child = ChildSa(
        ChildName("ike", f"c{number}"), number + 1, spi, spi, peer,
        (TrafficSelector(NEAR),), (TrafficSelector(far),),
    )  # fmt: skip
    return policy, sa, child


class Hub:
    """The state that one SPD table is made of."""

    def __init__(self, count: int) -> None:
        self.tunnels = [tunnel(number) for number in range(count)]
        self.state = KernelState()
        self.state.ike_connected(child for _, _, child in self.tunnels)
        self.rules = RuleTable(lambda _rules: ())
        self.image = TableImage(TableId.SPD)
        self.generation = 1

    def publish(self) -> int:
        """Bring the table up to date; return how many entries are written."""
        while self.state.pending:
            for owner, rules in self.state.changed_rules(STEP):
                self.rules.assign(owner, rules)
        changes = ((match, now) for match, (_before, now) in self.rules.changes().items())
        self.generation += 1
        return len(self.image.change(changes, self.generation, 0).puts)

    def load(self) -> int:
        """Take in everything at once."""
        policies = tuple(policy for policy, _, _ in self.tunnels)
        self.state.replace(KernelSnapshot(policies, tuple(sa for _, sa, _ in self.tunnels)))
        return self.publish()

    def apply(self, event: XfrmEvent) -> int:
        """Take in one notification."""
        self.state.apply(event)
        return self.publish()


def timed(work: Callable[[], object]) -> float:
    """Return the seconds of processor time that something takes."""
    began = time.process_time_ns()
    work()
    return (time.process_time_ns() - began) / 1e9


def measure(count: int) -> dict[str, list[float]]:
    """Return seconds to load, microseconds to close and to open each tunnel, MiB of memory."""
    hub = Hub(count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gc.disable()  # as the controller does: nothing here is in cycles
    load = timed(hub.load)
    gc.freeze()
    gc.enable()
    close, open_ = [], []
    for number in range(0, count, max(1, count // TIMED)):
        sa = hub.tunnels[number][1]
        close.append(timed(lambda sa=sa: hub.apply(SaGone(sa.id))) * 1e6)  # type: ignore[misc]
        open_.append(timed(lambda sa=sa: hub.apply(SaSet(sa))) * 1e6)  # type: ignore[misc]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"load": [load], "close": close, "open": open_, "memory": [grown / 1024]}


COLUMNS = {"load": "s", "close": "us", "open": "us", "memory": "MiB"}


def main() -> None:
    """Measure each size in a process of its own, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        sys.stdout.write(json.dumps(measure(options.one)))
        return
    rows: list[Row] = []
    screen = Screen(title="Processor time of the controller's core")
    for name in ("tunnels", "load, s", "close one, µs", "open one, µs", "memory, MiB"):
        screen.add_column(name, justify="right")
    for size in options.sizes:
        command = [sys.executable, "-m", "bench.growth", "--one", str(size)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout)
        these = [
            Row(name, unit, tuple(found[name]), {"tunnels": size}) for name, unit in COLUMNS.items()
        ]
        screen.add_row(
            f"{size:,}", *(f"{row.median:.{2 if row.unit == 's' else 0}f}" for row in these)
        )
        rows += these
    Console().print(screen)
    if options.json:
        title = "Processor time of the controller's core, and its memory"
        Report("growth", title, tuple(rows)).write(options.json)


if __name__ == "__main__":
    main()
