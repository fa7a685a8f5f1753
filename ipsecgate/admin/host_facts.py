"""What `check` gathers of a host for `core.check` to judge. Changes nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress

from ipsecgate.admin.loader import pins_of
from ipsecgate.core.check.connections import Loaded
from ipsecgate.core.check.finding import Finding
from ipsecgate.core.check.machine import Clock, Limit, check_units
from ipsecgate.core.check.policies import PeerAddresses
from ipsecgate.core.codec.vici import is_wildcard, literal_addresses
from ipsecgate.core.model.flow import Address
from ipsecgate.core.tables.layout import TableId
from ipsecgate.core.tables.rule_table import COARSE_ENTRIES, COARSE_MASKS, ENTRY_LIMIT, MASK_LIMIT
from ipsecgate.edges.bpf import bytecode
from ipsecgate.edges.bpf.maps import Maps
from ipsecgate.edges.host import cgroups, control, names, units
from ipsecgate.edges.host import clock as clocks
from ipsecgate.edges.host import limits as counts
from ipsecgate.edges.kernel import addresses as kernel_addresses
from ipsecgate.edges.kernel import sas
from ipsecgate.errors import GateError
from ipsecgate.paths import Paths

WATCHES_EACH = 2  # inotify watches for each cgroup: its folder and its cgroup.events


def addresses() -> frozenset[Address]:
    """Return this host's addresses. Raises: OSError, DecodeError."""
    return asyncio.run(kernel_addresses.own())


def peers(loaded: Loaded) -> tuple[PeerAddresses, dict[str, str]]:
    """Return the addresses of each connection's peer, and why some names do not resolve."""
    written = {
        name
        for one in loaded.connections
        for name in one.remotes
        if not literal_addresses((name,)) and not is_wildcard((name,))
    }
    found, failed = names.resolve(written)
    by_connection: dict[str, frozenset[Address]] = {}
    for one in loaded.connections:
        literal = frozenset(net[0] for net in literal_addresses(one.remotes))
        by_connection[one.name] = literal.union(*(found.get(n, frozenset()) for n in one.remotes))
    return by_connection, failed


def clock(*, uses_certificates: bool) -> Clock:
    """Return the state of the machine's clocks."""
    installed = 0
    with suppress(OSError, GateError):  # no XFRM, or not root: other checks say so
        installed = asyncio.run(sas.youngest())
    return Clock(
        time.time(),
        clocks.is_synchronised(),
        clocks.hardware_clock(),
        installed,
        uses_certificates,
    )


def limits(paths: Paths) -> list[Limit]:
    """Return the limits that the gate may reach."""
    return [*_watches(), *_descriptors(paths), *_tables(paths)]


def _watches() -> Iterator[Limit]:
    most = counts.inotify_watches()
    if most is not None:
        yield Limit(
            "inotify watches",
            WATCHES_EACH * sum(1 for _ in cgroups.walk()),
            most,
            f"`sysctl fs.inotify.max_user_watches={2 * most}`, and the same in /etc/sysctl.d",
            "beyond it, new cgroups are noticed only every 2 s",
        )


def _descriptors(paths: Paths) -> Iterator[Limit]:
    with suppress(GateError):  # no controller runs
        pid = int(control.ask(paths.control, "status")["pid"])
        found = counts.descriptors(pid)
        if found is not None:
            yield Limit(
                "descriptors of the controller",
                *found,
                "raise LimitNOFILE: `systemctl edit ipsecgate`",
                "beyond it, held calls and containers wait",
            )


def _tables(paths: Paths) -> Iterator[Limit]:
    hint = "use fewer different prefix lengths, protocols and port ranges"
    effect = "beyond it, what does not fit is refused"
    with suppress(FileNotFoundError), Maps(pins_of(paths)) as maps:
        for what, number in (("policy", TableId.POLICY), ("SPD", TableId.SPD)):
            table = maps.table(number)
            if table is not None:
                masks, entries = MASK_LIMIT - COARSE_MASKS, ENTRY_LIMIT - COARSE_ENTRIES
                yield Limit(f"{what} masks", len(table.rows), masks, hint, effect)
                yield Limit(f"{what} entries", table.size, entries, hint, effect)


def check_installed(paths: Paths) -> list[Finding]:
    """Judge the installed units, and the pinned hooks beside this version's compiled ones."""
    old: set[str] = set()
    pins = pins_of(paths)
    if pins.loaded and bytecode.cached(paths.cache).is_file():
        old = pins.current.differing(bytecode.get(paths.cache))
    return check_units(units.units(), old)
