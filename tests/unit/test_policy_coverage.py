"""Which networks of a policy live SAs cover, by the hooks' tables."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from ipsecgate.admin.coverage import with_coverage
from ipsecgate.admin.policy_document import policy_document
from ipsecgate.core.model.ipsec import ESP, Action, SaId
from ipsecgate.core.model.policy import Policy
from ipsecgate.core.state.spd import sa_tag
from ipsecgate.core.tables.layout import Entry, State
from ipsecgate.core.tables.policy_rules import matches, rule_of
from ipsecgate.core.tables.table import Rule, Table, compile_table, ternary
from tests.unit.test_difference import policy

SITE, SITE6, OTHER = "10.2.0.0/16", "2001:db8:2::/48", "10.9.0.0/24"
SA = SaId(ip_address("192.0.2.2"), 0xC0FFEE01, ESP)
SAS: list[Any] = [
    {"spi": "c0ffee01", "protocol": "esp", "peer": "192.0.2.2", "child": "net/net"},
]


def tables(policies: list[Policy], *live: str) -> tuple[Table, Table]:
    rules = [
        rule_of(one, place, match) for place, one in enumerate(policies) for match in matches(one)
    ]
    entry = Entry(State.LIVE, id=sa_tag(SA))
    spd = [Rule(ternary(ip_network(net)), entry) for net in live]
    return compile_table(rules), compile_table(spd)


def judged(policies: list[Policy], *live: str, negotiations: list[Any] = []) -> list[Any]:  # noqa: B006
    documents = [policy_document(one) for one in policies]
    return with_coverage(documents, negotiations, SAS, *tables(policies, *live))


def test_a_policy_is_partly_covered_and_names_what_is_missing() -> None:
    both = [policy("db", SITE, SITE6)]
    (found,) = judged(both, SITE, SITE6)
    assert (found["coverage"], found["uncovered"]) == ("covered", [])
    (found,) = judged(both, SITE)
    assert (found["coverage"], found["uncovered"]) == ("partly-covered", [SITE6])
    assert found["children"] == ["net/net"]
    (found,) = judged(both)
    assert (found["coverage"], found["uncovered"]) == ("uncovered", [])


@pytest.mark.parametrize("live", ["10.2.9.0/24", "10.0.0.0/8"])
def test_an_sa_for_some_of_a_network_counts(live: str) -> None:
    (found,) = judged([policy("db", SITE, OTHER)], live, OTHER)
    assert found["coverage"] == "covered"


def test_a_network_about_which_another_policy_decides_is_not_missing() -> None:
    first = policy("lan", OTHER)
    for earlier, coverage in ((OTHER, "covered"), ("10.9.0.0/25", "partly-covered")):
        policies = [policy("lan", earlier), policy("db", SITE, OTHER)]
        assert judged(policies, SITE)[1]["coverage"] == coverage
    assert judged([first], SITE)[0]["coverage"] == "uncovered"


def test_the_own_address_is_not_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def own() -> frozenset[Any]:
        return frozenset({ip_address("10.2.0.1")})

    monkeypatch.setattr("ipsecgate.edges.kernel.addresses.own", own)
    mesh = [policy("mesh", "10.2.0.1/32", "10.2.0.2/32", "10.2.0.3/32")]
    (found,) = judged(mesh, "10.2.0.2/32")
    assert found["uncovered"] == ["10.2.0.3/32"]
    (found,) = judged(mesh, "10.2.0.2/32", "10.2.0.3/32")
    assert found["coverage"] == "covered"


def asked(child: str, error: str = "", advice: str = "", at: float | None = None) -> Any:
    return {
        "policy": "db", "child": child, "state": "back-off", "last_error": error,
        "advice": advice, "failed_at": at,
    }  # fmt: skip


def test_what_was_asked_for_has_its_state_and_its_newest_error() -> None:
    """Of two gateways, one failed an hour ago: what it said may no longer hold."""
    older, newer = (
        asked("gw/a", "no answer", "wait", 100.0),
        asked("gw/b", "no key", "add it", 3700.0),
    )
    (found,) = judged([policy("db", SITE)], negotiations=[older, asked("gw/c"), newer])
    assert (found["coverage"], found["last_error"]) == ("back-off", "no key")
    assert (found["advice"], found["failed_at"]) == ("add it", 3700.0)
    assert found["children"] == ["gw/a", "gw/b", "gw/c"]
    (found,) = judged([policy("db", SITE)], negotiations=[asked("gw/c")])
    assert (found["last_error"], found["advice"], found["failed_at"]) == ("", "", None)


def test_an_exemption_has_no_coverage() -> None:
    exempt = [policy("lan", SITE, OTHER, action=Action.BYPASS)]
    (found,) = judged(exempt, SITE)
    assert (found["coverage"], found["uncovered"], found["children"]) == (None, [], [])
