"""How long a flow stays open whose SA goes while a controller starts over a predecessor's tables.

    .venv/bin/python -m bench.footprint takeover [--json FILE]

The SAs are larval ones, which need no ESP in the kernel and are deleted with the same notification.
A predecessor's table has a live entry for each of them, beside those of 100,000 policies. Once the
controller has read the kernel's SAs it closes all of these entries, because a larval SA protects
nothing; that is the end of the measurement.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import ip_address, ip_network
from pathlib import Path

from bench.gate_process import Gate
from bench.report import Row
from bench.spd_sender import NETLINK_XFRM, delete_state
from ipsecgate.core.model.ipsec import ESP, SaId
from ipsecgate.core.state.spd import sa_tag
from ipsecgate.core.tables.layout import Entry, State, TableId
from ipsecgate.core.tables.table import Ternary, ternary
from ipsecgate.edges.bpf.datapath import Datapath
from ipsecgate.edges.bpf.maps import Maps
from ipsecgate.edges.bpf.pins import Pins

NEAR, PEER, FIRST_SPI = "192.0.2.1", "192.0.2.2", 0x1000
EVERY = 0.1  # seconds between deletions, from the moment at which the controller would hear them
PATIENCE = 10.0


def takeover(size: int = 100_000, deletions: int = 60) -> Iterator[Row]:
    """Seconds from the deletion of an SA to a closed entry, at moments all over a start."""
    with ExitStack() as stack:
        gate = Gate(stack)
        gate.policies("add", size)
        with gate.controller():
            pass
        keys, waited, used = _lay_out(gate, deletions), [], []
        with gate.place.inside():
            kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_XFRM)
        with kernel, gate.controller(wait=False) as running:
            while not _listens(gate):
                time.sleep(0.001)
            os.setpriority(os.PRIO_PROCESS, 0, -20)  # as the controller, to see it in time
            began = time.monotonic()
            for number, key in enumerate(keys):
                time.sleep(max(0.0, began + number * EVERY - time.monotonic()))
                if not _is_live(gate.pins, key):
                    break
                before, sent = running.run_time(), time.monotonic()
                kernel.send(delete_state(PEER, FIRST_SPI + number))
                _wait_closed(gate.pins, key)
                waited.append((time.monotonic() - sent) * 1000)
                used.append((running.run_time() - before) * 1000)
            os.setpriority(os.PRIO_PROCESS, 0, 0)
            gate.wait_ready()
        of = {"policies": size}
        yield Row("closed after a deletion while it starts", "ms", tuple(waited), of)
        yield Row("processor time until then", "ms", tuple(used), of)


def _listens(gate: Gate) -> bool:
    """Return whether a socket in the namespace receives XFRM's notifications."""
    with gate.place.inside():
        lines = Path("/proc/thread-self/net/netlink").read_text().splitlines()[1:]
    return any(one.split()[1] == str(NETLINK_XFRM) and int(one.split()[3], 16) for one in lines)


def _match(number: int) -> Ternary:
    return ternary(ip_network((int(ip_address("10.255.0.0")) + number, 32)), src=ip_network(NEAR))


def _lay_out(gate: Gate, count: int) -> list[bytes]:
    """Make larval SAs, and a live entry for each; return the entries' keys."""
    live = []
    for number in range(count):
        spi = FIRST_SPI + number
        _state(gate, "allocspi", number, "mode", "tunnel", "min", hex(spi), "max", hex(spi))
        tag = sa_tag(SaId(ip_address(PEER), spi, ESP))
        live.append((_match(number), Entry(State.LIVE, id=tag, rank=number)))

    async def write() -> list[bytes]:
        data = Datapath(gate.pins)
        await data.take_over()
        await data.change(TableId.SPD, live)
        data.close()
        return [data.images[TableId.SPD].key(match) for match, _ in live]

    return asyncio.run(write())


def _state(gate: Gate, verb: str, number: int, *more: str) -> None:
    words = ["src", NEAR, "dst", PEER, "proto", "esp", *more]
    if verb == "allocspi":
        words += ["reqid", str(number + 1)]
    subprocess.run(["ip", "-n", gate.name, "xfrm", "state", verb, *words], check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip


def _wait_closed(pins: Pins, key: bytes) -> None:
    """Wait until an entry is not live any more."""
    deadline = time.monotonic() + PATIENCE
    while _is_live(pins, key):
        if time.monotonic() > deadline:
            raise TimeoutError("an entry stays live")
        time.sleep(0.0005)


def _is_live(pins: Pins, key: bytes) -> bool:
    with Maps(pins) as maps:
        entry = maps.entry(key)
    return entry is not None and entry.state is State.LIVE
