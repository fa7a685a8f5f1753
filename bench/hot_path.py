"""What the hooks add to a call, as the ratio to the same call without them.

    .venv/bin/python -m bench.hot_path [--masks 32] [--selectors 16384] [--json FILE]

On this machine's own kernel, in a namespace whose only link leads nowhere, two equal clients make
the same calls in turns, one of them in a gated cgroup. Each turn gives one ratio; printed are their
median and quartiles. The SPD table holds as many selectors as asked for, in as many masks; the
destinations are spread over all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from ipaddress import IPv4Address, ip_network
from pathlib import Path

from rich.console import Console
from rich.table import Table as Screen

from bench.report import Report, Row
from ipsecgate.core.model.flow import HOST, FlowPath
from ipsecgate.core.tables.layout import Entry, Setting, State, TableId
from ipsecgate.core.tables.table import Rule, Table, compile_table, ternary
from ipsecgate.edges.bpf import bytecode
from ipsecgate.edges.bpf.datapath import Datapath
from ipsecgate.edges.bpf.pins import Pins
from ipsecgate.edges.kernel.probe import netns_cookie
from ipsecgate.lab import path
from ipsecgate.lab.cgroups import Tree
from ipsecgate.lab.netns import Namespace

NAME = "ipsecgate-bench-hot-path"
SOURCE = Path(__file__).with_name("hot_path_client.c")
CACHE = Path(".cache/bytecode")
HERE = ip_network("198.51.100.1/32")
OURS, OTHERS = IPv4Address("10.0.0.0"), IPv4Address("172.16.0.0")
PORT = 9
CALLS = (
    ("UDP connect, same flow", "connect", 1, True),
    ("UDP connect, any covered flow", "connect", 16384, True),
    ("UDP connect, not ours", "connect", 1, False),
    ("sendto, one peer", "sendto", 1, True),
    ("sendto, 8 peers", "sendto", 8, True),
    ("sendto, 500 peers", "sendto", 500, True),
    ("sendto, not ours", "sendto", 1, False),
    ("connected send", "send", 1, True),
    ("TCP connect, same peer", "tcp", 1, True),
    ("TCP connect, 500 peers", "tcp", 500, True),
    ("TCP connect, not ours", "tcp", 1, False),
)


def spd(masks: int, selectors: int) -> Table:
    """Return live selectors in so many masks (at most 256), each mask in a /16 of its own.

    The masks differ in the prefix lengths of both ends and in the bits of the port that count.
    """
    rules = []
    for number in range(masks):
        bits, shape = 28 + number % 5, number // 5
        source = HERE.supernet(new_prefix=32 - shape % 8)
        port_mask = 0xFFFF << shape // 8 & 0xFFFF
        first = int(OURS) + (number << 16)
        rules += [
            Rule(
                ternary(
                    ip_network((first + (at << 32 - bits), bits)),
                    src=source,
                    dport=(PORT & port_mask, port_mask),
                ),
                Entry(State.LIVE),
            )
            for at in range(min(max(1, selectors // masks), 1 << bits - 16))
        ]
    return compile_table(rules)


@contextlib.contextmanager
def namespace() -> Iterator[Namespace]:
    """A namespace with a link that leads nowhere."""
    made = Namespace(NAME)
    try:
        path.prepare(made)
        for words in (
            "link set lo up",
            "link add out0 type veth peer name nowhere",
            "link set nowhere up",
            "link set out0 arp off up",
            f"addr add {HERE} dev out0",
            "route add default dev out0",
        ):
            subprocess.run(["ip", "-n", NAME, *words.split()], check=True)
        yield made
    finally:
        made.remove()


class Client:
    """One of the two."""

    def __init__(
        self, program: Path, addresses: Path, place: Namespace, cgroup: Path | None
    ) -> None:
        join = f"echo $$ >{cgroup}/cgroup.procs && " if cgroup else ""
        command = f"{join}exec nsenter --net={place.path} {program} {addresses}"
        self._process = subprocess.Popen(
            ["sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def cost(self, kind: str, destinations: int, calls: int) -> float:
        """Return nanoseconds a call."""
        assert self._process.stdin is not None  # noqa: S101
        assert self._process.stdout is not None  # noqa: S101
        self._process.stdin.write(f"{kind} {destinations} {calls}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def end(self) -> None:
        """End it."""
        self._process.communicate()


Clients = dict[tuple[bool, bool], Client]
"""By whether their destinations are covered, and whether they are gated."""


@contextlib.contextmanager
def prepared(masks: int, selectors: int) -> Iterator[Clients]:
    """The clients, in a namespace with hooks whose SPD table has these selectors."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        program = folder / "client"
        subprocess.run(["cc", "-O2", "-o", program, SOURCE], check=True)
        place = stack.enter_context(namespace())
        tree = Tree(NAME)
        stack.callback(tree.remove)
        cgroup = tree.make("gated")
        pins = Pins(Path("/sys/fs/bpf"), NAME)
        stack.callback(pins.unload)
        pins.load(bytecode.get(CACHE))
        pins.attach(cgroup)
        # The hooks alone. `bench.packet` measures the backstop, which would block these packets.
        (pins.root / "links" / f"egress-{cgroup.stat().st_ino}").unlink()
        data = Datapath(pins)
        stack.callback(data.close)
        asyncio.run(data.take_over())
        with place.inside():
            data.set(Setting.NETNS, netns_cookie())
        data.set_paths(HOST, [(ip_network("10.0.0.0/8"), FlowPath(HERE[0]))])
        policies = [Rule(ternary(ip_network("10.0.0.0/8")), Entry(State.PROTECT))]
        asyncio.run(data.publish(TableId.POLICY, compile_table(policies)))
        table = spd(masks, selectors)
        asyncio.run(data.publish(TableId.SPD, table))
        clients = {}
        networks = sorted({match.value.daddr & 0xFFFFFFFF for match, _ in table.entries()})
        ours = [IPv4Address(networks[n * 7919 % len(networks)]) for n in range(16384)]
        for covered, addresses in ((True, ours), (False, [OTHERS + n for n in range(16384)])):
            listed = folder / f"addresses-{covered}"
            listed.write_text("\n".join(f"{int(address):x}" for address in addresses))
            for gated in (True, False):
                client = Client(program, listed, place, cgroup if gated else None)
                stack.callback(client.end)
                clients[covered, gated] = client
        yield clients


def measure(clients: Clients, only: str, turns: int, calls: int) -> Iterator[tuple[Row, Row, Row]]:
    """Yield for each call what it costs without hooks, gated, and the ratio."""
    for call, kind, destinations, covered in CALLS:
        if only not in call:
            continue
        number = calls // (10 if kind == "tcp" else 1)
        pairs = []
        for _ in range(turns):
            free = clients[covered, False].cost(kind, destinations, number)
            pairs.append((free, clients[covered, True].cost(kind, destinations, number)))
        of = {"call": call}
        yield (
            Row("without", "ns", tuple(free for free, _ in pairs), of),
            Row("gated", "ns", tuple(gated for _, gated in pairs), of),
            Row("ratio", "", tuple(gated / free for free, gated in pairs), of),
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--masks", type=int, default=32)
    parser.add_argument("--selectors", type=int, default=16384)
    parser.add_argument("--turns", type=int, default=41)
    parser.add_argument("--calls", type=int, default=20000)
    parser.add_argument("--only", default="", help="measure calls whose name contains this")
    parser.add_argument("--json", type=Path, help="write the report there, too")
    options = parser.parse_args()
    title = f"{options.selectors} selectors in {options.masks} masks"
    screen = Screen(title=title)
    for name in ("call", "without, ns", "gated, ns", "ratio", "quartiles"):
        screen.add_column(name, justify="left" if name == "call" else "right")
    rows: list[Row] = []
    with prepared(options.masks, options.selectors) as clients:
        for free, gated, ratio in measure(clients, options.only, options.turns, options.calls):
            rows += (free, gated, ratio)
            low, high = ratio.quartiles
            screen.add_row(
                str(ratio.of["call"]),
                f"{free.median:.0f}",
                f"{gated.median:.0f}",
                f"{ratio.median:.2f}",
                f"{low:.2f} to {high:.2f}",
            )
    Console().print(screen)
    if options.json:
        settings = {name: getattr(options, name) for name in ("masks", "selectors", "calls")}
        Report("hot_path", title, tuple(rows), settings).write(options.json)


if __name__ == "__main__":
    main()
