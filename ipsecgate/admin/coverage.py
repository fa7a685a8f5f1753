"""How far live SAs cover each policy, as the hooks' tables say.

A network of a policy is covered if a live SA covers some of it. Left out are a network that another
policy decides about, and this host's own address: neither ever needs an SA.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from ipaddress import ip_address, ip_network
from typing import TypedDict

from ipsecgate.admin.status_document import ConfiguredPolicy, Negotiation, Policy, Sa
from ipsecgate.core.gate.coverage import Coverage
from ipsecgate.core.model.flow import Network
from ipsecgate.core.tables.layout import Key, State
from ipsecgate.core.tables.table import Table, ternary
from ipsecgate.errors import GateError

PARTLY = "partly-covered"
COVERAGES = (
    Coverage.COVERED.value, PARTLY, Coverage.NEGOTIATING.value, Coverage.BACK_OFF.value,
    Coverage.UNCOVERED.value,
)  # fmt: skip
"""The coverages of a policy, the best first."""

_ADDRESS = (1 << 128) - 1
_NETWORK = Key(daddr=_ADDRESS, family=0xFF)  # the part of a key that is a network
_Network = tuple[Key, Key]  # its value and mask
_Live = dict[int, dict[_Network, int]]


def with_coverage(
    policies: Sequence[ConfiguredPolicy],
    negotiations: Sequence[Negotiation],
    sas: Sequence[Sa],
    table: Table | None,
    spd: Table | None,
) -> list[Policy]:
    """Return the policies with the state of their SAs. `table`, `spd`: those of the hooks."""
    live = _live(table, spd) if table is not None and spd is not None else {}
    lacking = _lacking(policies, table, live) if table is not None else {}
    children = _children(sas) if live else {}
    by_policy: dict[str, list[Negotiation]] = {}
    for one in negotiations:
        by_policy.setdefault(one["policy"], []).append(one)
    found: list[Policy] = []
    for place, policy in enumerate(policies):
        if policy["action"] != "protect":
            found.append(
                {**policy, "coverage": None, "uncovered": [], "children": [], **_NO_FAILURE}
            )
            continue
        own = by_policy.get(policy["name"], [])
        named = {children[tag] for tag in live.get(place, {}).values() if tag in children}
        uncovered = lacking.get(place, [])
        coverage = PARTLY if uncovered else _coverage(place in live, own)
        found.append(
            {
                **policy,
                "coverage": coverage,
                "uncovered": uncovered,
                "children": sorted(named.union(one["child"] for one in own)),
                **_last_failure(own),
            }
        )
    return found


class _Failure(TypedDict):
    """The part of a policy's document about its last failure."""

    last_error: str
    advice: str
    failed_at: float | None


_NO_FAILURE: _Failure = {"last_error": "", "advice": "", "failed_at": None}


def _last_failure(negotiations: Iterable[Negotiation]) -> _Failure:
    """Return the newest failure: an older one may no longer hold."""
    failed = [one for one in negotiations if one["last_error"]]
    if not failed:
        return _NO_FAILURE
    last = max(failed, key=lambda one: one["failed_at"] or 0.0)
    return {
        "last_error": last["last_error"],
        "advice": last["advice"],
        "failed_at": last["failed_at"],
    }


def _coverage(is_covered: bool, negotiations: Iterable[Negotiation]) -> str:
    if is_covered:
        return Coverage.COVERED.value
    states = {one["state"] for one in negotiations}
    pending = (Coverage.NEGOTIATING.value, Coverage.BACK_OFF.value)
    return next((state for state in pending if state in states), Coverage.UNCOVERED.value)


def _live(policies: Table, spd: Table) -> _Live:
    """Return the networks of which a live SA covers something, by the policies' places.

    Each with the tag of such an SA.
    """
    found: _Live = {}
    for live_mask, live_row in spd.rows.items():
        live = [(value, one.id) for value, one in live_row.items() if one.state is State.LIVE]
        for mask, row in policies.rows.items():
            common = mask.masked(live_mask)
            tags = {value.masked(common): tag for value, tag in live}
            network_mask = mask.masked(_NETWORK)
            for value, entry in row.items():
                tag = tags.get(value.masked(common))
                if tag is not None:
                    covered = found.setdefault(entry.id, {})
                    covered[value.masked(_NETWORK), network_mask] = tag
    return found


def _lacking(
    policies: Sequence[ConfiguredPolicy], table: Table, live: _Live
) -> dict[int, list[str]]:
    """Return the networks that no live SA covers, of those policies that have a covered one."""
    several = {
        at
        for at, policy in enumerate(policies)
        if at in live and policy["action"] == "protect" and len(policy["remote"]) > 1
    }
    lacking: dict[int, set[_Network]] = {}
    for mask, row in table.rows.items() if several else ():
        for value, entry in row.items():
            network = value.masked(_NETWORK), mask.masked(_NETWORK)
            lacks = entry.id in several and network not in live[entry.id]
            if lacks and _decides(table, value, network, entry.id):
                lacking.setdefault(entry.id, set()).add(network)
    found: dict[int, list[str]] = {}
    for at, networks in lacking.items():
        remote = map(ip_network, policies[at]["remote"])
        named = [net for net in remote if _key(net) in networks]
        if others := _without_own(named):
            found[at] = [str(net) for net in others]
    return found


def _key(network: Network) -> _Network:
    match = ternary(network)
    return match.value, match.mask


def _decides(table: Table, value: Key, network: _Network, place: int) -> bool:
    """Tell whether a policy decides about some flows to its network, by a few addresses in it."""
    host_bits = ~network[1].daddr & _ADDRESS
    for offset in (0, *(1 << bit for bit in range(host_bits.bit_length()))):
        entry = table.classify(value.joined(Key(daddr=offset)))
        if entry is not None and entry.id == place:
            return True
    return False


def _without_own(networks: Sequence[Network]) -> Sequence[Network]:
    """Return the networks without those that are only this host's own address."""
    if all(net.num_addresses > 1 for net in networks):
        return networks
    # These take long to import, and are seldom needed.
    import asyncio  # noqa: PLC0415

    from ipsecgate.edges.kernel import addresses  # noqa: PLC0415

    with suppress(OSError, GateError):
        own = asyncio.run(addresses.own())
        return [net for net in networks if net.num_addresses > 1 or net[0] not in own]
    return networks


def _children(sas: Iterable[Sa]) -> dict[int, str]:
    """Return the children's names by the tags that the hooks' tables have for their SAs."""
    from ipsecgate.core.model.ipsec import AH, ESP, SaId  # noqa: PLC0415 - takes 25 ms
    from ipsecgate.core.state.spd import sa_tag  # noqa: PLC0415

    found: dict[int, str] = {}
    for sa in sas:
        if sa["child"]:
            proto = AH if sa["protocol"] == "ah" else ESP
            found[sa_tag(SaId(ip_address(sa["peer"]), int(sa["spi"], 16), proto))] = sa["child"]
    return found
