"""The end of CHILD_SAs that an operator asks for: `ipsecgate down`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

from ipsecgate.admin.wait import Down, EndedSa
from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate import readiness
from ipsecgate.core.gate.gate import Gate
from ipsecgate.core.model.flow import Network
from ipsecgate.core.model.ipsec import Action, ChildSa
from ipsecgate.core.model.prefixes import PrefixSet, as_prefix
from ipsecgate.errors import GateError, UsageError

PAUSE = 0.05  # seconds between two looks at the CHILD_SAs


async def down(
    gate: Gate,
    execute: Callable[[do.IkeCommand], Awaitable[None]],
    name: str,
    limit: float,
    is_writing: Callable[[], bool],
) -> Down:
    """End the CHILD_SAs of the policy or child `name`; return when they are gone.

    Or after `limit` seconds: a peer that is silent does not confirm it. `is_writing`: whether the
    hooks' tables are being written. Raises: UsageError, GateError.
    """
    if gate.ike.problem is not None:
        text = f"no SA was ended: {gate.ike.problem.text}"
        raise GateError(text, hint=gate.ike.problem.advice)
    found = readiness.child_sas(gate, name)
    if not found and not readiness.is_known(gate, name):
        raise UsageError(
            f"no policy and no loaded child is named {name}",
            hint="`ipsecgate status` lists the policies, `swanctl --list-conns` the children",
        )
    policies = [
        policy
        for policy in gate.policies
        if policy.action is Action.PROTECT and _concern(found, policy.remote)
    ]
    for sa in found:
        await execute(do.Terminate(sa.name, sa.unique))
    deadline = time.monotonic() + limit
    while (is_writing() or _left(gate, found)) and time.monotonic() < deadline:
        await asyncio.sleep(PAUSE)
    left = _left(gate, found)
    return Down(
        sas=[
            EndedSa(
                child=str(sa.name),
                spi=f"{sa.spi_out:08x}",
                peer=str(sa.remote_host),
                ended=sa not in left,
            )
            for sa in found
        ],
        policies=[policy.name for policy in policies],
        starts=[policy.name for policy in policies if policy.start],
    )


def _concern(found: Iterable[ChildSa], remote: Iterable[Network]) -> bool:
    networks = PrefixSet(remote)
    return any(networks.overlaps(as_prefix(one.network)) for sa in found for one in sa.remote)


def _left(gate: Gate, found: Sequence[ChildSa]) -> list[ChildSa]:
    """Return which of these CHILD_SAs are still there."""
    there, source = set(gate.protection.established()), gate.protection.source
    return [sa for sa in found if sa in there and not source.is_missing(sa)]
