"""What is known without a controller: by configuration, pins, kernel, and inspectors' files."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing, suppress

from ipsecgate.admin.policy_document import policy_document
from ipsecgate.admin.problem_document import Problem
from ipsecgate.admin.status_document import GateState, HeldCall
from ipsecgate.admin.status_document import Sa as SaDocument
from ipsecgate.core.model.ipsec import AH, Sa
from ipsecgate.core.model.policy import Policy, SaSource, derived_policies, in_force
from ipsecgate.core.tables.layout import State
from ipsecgate.core.tables.table import Table
from ipsecgate.edges.host import processes, saved_state
from ipsecgate.edges.host.config import Config
from ipsecgate.errors import GateError
from ipsecgate.paths import Paths


def sa_source(source: SaSource) -> str | None:
    """Return where SAs come from, None until strongSwan's answer shows it."""
    return None if source is SaSource.AUTO else source.value


def sa_document(sa: Sa, child: str | None = None) -> SaDocument:
    """Return an SA of the kernel's as the documents have it."""
    return {
        "spi": f"{sa.id.spi:08x}",
        "protocol": "ah" if sa.id.proto == AH else "esp",
        "reqid": sa.reqid,
        "peer": str(sa.id.daddr),
        "child": child,
        "since": sa.installed_at,
        "until": sa.deadline or None,
    }


def state(paths: Paths, read_config: Callable[[], Config], spd: Table | None) -> GateState:
    """Return the configured or remembered policies, and the SAs by which the hooks let flows go.

    `spd`: the hooks' table. A broken configuration becomes an error.
    """
    config, errors = Config(), list[Problem]()
    derived: tuple[Policy, ...] = ()
    try:
        derived = derived_policies(saved_state.load_children(paths.remembered))
        config = read_config()
    except GateError as error:
        advice = error.hint or "mend the file, then start the controller"
        errors.append({"text": str(error), "advice": advice})
    policies = in_force(config.settings.policies, derived)
    return {
        "errors": errors,
        "sa_source": sa_source(config.settings.sa_source),
        "policies": [policy_document(policy) for policy in policies],
        "negotiations": [],
        "sas": _live_sas(spd, errors),
        "held": 0,
        "holds": _held_calls(paths),
        "namespaces": [],
        "negotiated": [],
        "refused_by_policy": [],
        "refused_by_cgroup": [],
        "time_to_covered": [],
        "warnings": [],
        "drift": None,
    }


def _live_sas(spd: Table | None, errors: list[Problem]) -> list[SaDocument]:
    """Return the kernel's SAs that make an entry live; an entry has a tag of its SA."""
    entries = spd.entries() if spd is not None else ()
    tags = {entry.id for _, entry in entries if entry.state is State.LIVE}
    if not tags:
        return []
    # These take long to import, and are not needed while a controller runs.
    import asyncio  # noqa: PLC0415

    from ipsecgate.core.state.spd import sa_tag  # noqa: PLC0415
    from ipsecgate.edges.kernel import xfrm  # noqa: PLC0415

    try:
        found = asyncio.run(xfrm.dump_sas())
    except (GateError, OSError) as error:
        hint = getattr(error, "hint", "")
        errors.append({"text": f"cannot read the SAs: {error}", "advice": hint})
        return []
    return [sa_document(sa) for sa in found if sa_tag(sa.id) in tags]


def _held_calls(paths: Paths) -> list[HeldCall]:
    """Return the calls that wait for a controller's answer; only their own memory has the flow.

    They wait if a service manager keeps their listener. If none does, the kernel has ended them,
    and the files are left over.
    """
    from ipsecgate.edges.holding.call_file import CallFile  # noqa: PLC0415

    found: list[HeldCall] = []
    now = time.monotonic()
    files = sorted(paths.holds.iterdir()) if paths.holds.is_dir() else []
    for path in files:
        with suppress(OSError, ValueError), closing(CallFile.open_existing(path)) as calls:
            found += [
                {
                    "pid": call.pid,
                    "flow": None,
                    "daddr": None,
                    "proto": None,
                    "dport": None,
                    "since": None,
                    "limit": max(0.0, calls.deadline(place) - now),
                    "child": None,
                    "policy": None,
                }
                for place, call in calls.calls()
                if calls.deadline(place) and processes.waits_for_supervisor(call.pid)
            ]
    return found
