"""The flows of gated processes: what the hooks' maps remember, and the sockets that are open.

    connections   from sock_diag: the connected sockets of gated cgroups, judged by the tables
    refused       from the map `recent`: each flow once, with the time of its last refusal
    decisions     from the map `decisions`: what was let go since the tables last changed

What a UDP socket remembers (the map `sockets`) is left out: the kernel shows it only to one who has
the socket open. It is a copy of a decision that is valid for the same generation.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ipsecgate.admin import offline
from ipsecgate.admin.documents import Connection, Flows
from ipsecgate.admin.judge import Judge
from ipsecgate.admin.loader import gated_ids, pins_of
from ipsecgate.admin.status import ask_controller, controller_of, refusals
from ipsecgate.admin.status_document import ConfiguredPolicy
from ipsecgate.core.model.flow import Flow
from ipsecgate.edges.bpf.maps import Maps
from ipsecgate.edges.host import cgroups
from ipsecgate.edges.host.config import Config
from ipsecgate.paths import Paths


def flows_of(paths: Paths, read_config: Callable[[], Config]) -> Flows:
    """Return the document. Raises: FileNotFoundError if nothing is loaded; OSError."""
    answer = ask_controller(paths)
    with Maps(pins_of(paths)) as maps:
        policies = (answer or offline.state(paths, read_config, None))["policies"]
        judge = Judge.of(maps)
        return {
            "controller": controller_of(answer),
            "connections": [
                _connection(flow, cgroup, judge, policies) for flow, cgroup in connections(paths)
            ],
            "refused": refusals(judge, maps.refusals(), policies),
            "decisions": [
                {
                    "flow": str(flow),
                    "source": None if flow.saddr is None else str(flow.saddr),
                    "reason": reason.name.lower(),
                }
                for flow, reason in maps.decisions().items()
            ],
        }


def connections(paths: Paths) -> list[tuple[Flow, Path]]:
    """Return the connected sockets of gated cgroups in this network namespace, and their cgroups.

    Raises: OSError.
    """
    # These take long to import, and other verbs do not need them.
    import asyncio  # noqa: PLC0415

    from ipsecgate.edges.kernel import sockets  # noqa: PLC0415

    gated, by_id = gated_ids(paths), cgroups.by_id()
    return [
        (sock.flow, by_id.get(sock.cgroup, Path()))
        for sock in asyncio.run(sockets.connected())
        if sock.cgroup is not None and sock.cgroup in gated and not sock.flow.daddr.is_loopback
    ]


def _connection(
    flow: Flow, cgroup: Path, judge: Judge, policies: list[ConfiguredPolicy]
) -> Connection:
    place = judge.place(flow)
    host = f"[{flow.saddr}]" if flow.saddr and flow.saddr.version == 6 else str(flow.saddr)
    return {
        "flow": str(flow),
        "source": f"{host}:{flow.sport}",
        "cgroup": str(cgroup),
        "policy": policies[place]["name"] if place is not None and place < len(policies) else None,
        "state": judge.judge(flow).name.lower(),
    }
