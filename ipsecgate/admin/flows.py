"""The flows of gated processes: what the hooks' maps remember, and the sockets that are open.

    connections   from sock_diag: the connected sockets of gated cgroups, judged by the tables
    refused       from the map `recent`: each flow once, with the time of its last refusal
    decisions     from the map `decisions`: what was let go since the tables last changed

What a UDP socket remembers (the map `sockets`) is left out: the kernel shows it only to one who has
the socket open. It is a copy of a decision that is valid for the same generation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ipsecgate.admin import offline
from ipsecgate.admin.documents import Connection, Flows
from ipsecgate.admin.judge import Judge
from ipsecgate.admin.loader import gated_ids, pins_of
from ipsecgate.admin.status import ask_controller, controller_of, refusals
from ipsecgate.admin.status_document import ConfiguredPolicy, GateState
from ipsecgate.core.codec.sockdiag import ListedSocket
from ipsecgate.edges.bpf.maps import Maps
from ipsecgate.edges.host import cgroups, processes
from ipsecgate.edges.host.config import Config
from ipsecgate.paths import Paths


def flows_of(paths: Paths, read_config: Callable[[], Config]) -> Flows:
    """Return the document. Raises: FileNotFoundError if nothing is loaded; OSError."""
    answer = ask_controller(paths)
    with Maps(pins_of(paths)) as maps:
        gate: GateState = answer or offline.state(paths, read_config, None)
        policies = gate["policies"]
        judge = Judge.of(maps)
        return {
            "controller": controller_of(answer),
            "connections": _connections(paths, judge, policies),
            "refused": refusals(judge, maps.refusals(), gate),
            "decisions": [
                {
                    "flow": str(flow),
                    "source": None if flow.saddr is None else str(flow.saddr),
                    "reason": reason.name.lower(),
                }
                for flow, reason in maps.decisions().items()
            ],
        }


def connections(paths: Paths) -> list[tuple[ListedSocket, Path]]:
    """Return the connected sockets of gated cgroups in this network namespace, and their cgroups.

    Raises: OSError.
    """
    # These take long to import, and other verbs do not need them.
    import asyncio  # noqa: PLC0415

    from ipsecgate.edges.kernel import sockets  # noqa: PLC0415

    gated, by_id = gated_ids(paths), cgroups.by_id()
    return [
        (sock, by_id.get(sock.cgroup, Path()))
        for sock in asyncio.run(sockets.connected())
        if sock.cgroup is not None and sock.cgroup in gated and not sock.flow.daddr.is_loopback
    ]


def _connections(paths: Paths, judge: Judge, policies: list[ConfiguredPolicy]) -> list[Connection]:
    found = connections(paths)
    there = {pid for cgroup in {cgroup for _, cgroup in found} for pid in _processes(cgroup)}
    owners = {inode: pid for pid in sorted(there) for inode in processes.sockets_of(pid)}
    names = [policy["name"] for policy in policies]
    made: list[Connection] = []
    for sock, cgroup in found:
        flow, pid = sock.flow, owners.get(sock.inode)
        now = judge.judge(flow)
        host = f"[{flow.saddr}]" if flow.saddr and flow.saddr.version == 6 else str(flow.saddr)
        made.append(
            {
                "flow": str(flow),
                "source": f"{host}:{flow.sport}",
                "pid": pid,
                "comm": None if pid is None else processes.name_of(pid),
                "cgroup": str(cgroup),
                "policy": now.name_in(names),
                "state": now.reason.name.lower(),
            }
        )
    return made


def _processes(cgroup: Path) -> list[int]:
    with suppress(OSError):  # it has been removed
        return list(cgroups.processes(cgroup))
    return []
