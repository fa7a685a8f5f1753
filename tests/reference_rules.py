"""The rules of the SPD table made from scratch, for the tests and the oracle to compare with.

The controller keeps the same rules up to date policy by policy: `ipsecgate.core.state.spd_rules`.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, groupby

from ipsecgate.core.model.ipsec import Sa, SpdEntry
from ipsecgate.core.state.kernel_state import KernelState
from ipsecgate.core.state.spd import (
    Negotiated,
    applies,
    rules_of,
    shared_rules,
    unrestricted,
    whole_entry,
)
from ipsecgate.core.tables.table import Rule


def rules_from_scratch(
    policies: Iterable[SpdEntry], sas: Iterable[Sa], negotiated: Negotiated = unrestricted
) -> list[Rule]:
    """Return the kernel's answer, live or dead, for every flow: rules, the best rank first."""
    by_reqid: dict[int, list[Sa]] = {}
    for sa in sas:
        by_reqid.setdefault(sa.reqid, []).append(sa)
    applicable = sorted((p for p in policies if applies(p)), key=lambda p: p.priority)
    rules: list[Rule] = []
    for _, group in groupby(applicable, key=lambda p: p.priority):
        tied = [(p, rules_of(p, lambda reqid: by_reqid.get(reqid, ()), negotiated)) for p in group]
        for (a, its), (b, others) in combinations(tied, 2):
            rules += shared_rules(a, whole_entry(its), b, whole_entry(others))
        rules += (rule for _, its in tied for rule in its)
    return sorted(rules, key=lambda rule: rule.entry.rank)


def kernel_rules(state: KernelState) -> list[Rule]:
    """Return what the kernel would do with each flow, using only confirmed SAs."""
    return rules_from_scratch(state.policies.values(), state.confirmed_sas())


def hook_rules(state: KernelState) -> list[Rule]:
    """Return all the hooks' rules: the kernel's, within the negotiated selectors."""
    policies = state.decisive_policies.values()
    return rules_from_scratch(policies, state.confirmed_sas(), state.negotiated)
