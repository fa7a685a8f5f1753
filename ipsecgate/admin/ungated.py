"""Who is gated, and which open sockets belong to processes that are not.

Rule of this module: it changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ipsecgate.admin.loader import gated_ids
from ipsecgate.core.model.flow import Flow
from ipsecgate.edges.host import cgroups
from ipsecgate.paths import Paths

_CGROUPS = re.compile(r"\s*cgroups\s*=")


def connections(paths: Paths) -> Iterator[tuple[Flow, Path, bool]]:
    """Yield the connected sockets of this network namespace: flow, cgroup, and whether it is gated.

    Those whose cgroup is unknown or removed, and those to loopback, are left out. Raises: OSError.
    """
    # These take long to import, and other verbs do not need them.
    import asyncio  # noqa: PLC0415

    from ipsecgate.edges.kernel import sockets  # noqa: PLC0415

    gated, by_id = gated_ids(paths), cgroups.by_id()
    for sock in asyncio.run(sockets.connected()):
        if sock.cgroup in by_id and not sock.flow.daddr.is_loopback:
            yield sock.flow, by_id[sock.cgroup], sock.cgroup in gated


def target_of(cgroup: Path) -> str:
    """Return the target that names a cgroup or the unit or container around it, else its path."""
    known = cgroups.containers() if cgroups.container_in(cgroup) else {}
    around = (cgroup, *cgroup.parents)
    found = (one for path in around for one in cgroups.targets_of(path, known))
    return next((one for one in found if not one.endswith(".slice")), str(cgroup))


def short_name(cgroup: Path) -> str:
    """Return the name of the unit that a cgroup belongs to, else its path."""
    return cgroups.unit_in(cgroup) or str(cgroup)


def place(paths: Paths) -> str:
    """Return file and line of gate.cgroups; only the file if it is not there."""
    try:
        lines = paths.config.read_text(errors="replace").splitlines()
    except OSError:
        return str(paths.config)
    found = (number for number, line in enumerate(lines, 1) if _CGROUPS.match(line))
    return ":".join([str(paths.config), *map(str, list(found)[:1])])
