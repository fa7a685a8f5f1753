"""The paths of another namespace's flows: `core.nat.forwarded`, with rules as iptables has them."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from ipsecgate.core.model.flow import FlowPath, parse_address
from ipsecgate.core.model.namespace import DeviceAddress, Link, WayOut
from ipsecgate.core.model.nat import (
    BaseChain,
    ChainName,
    Code,
    Constant,
    Expression,
    Field,
    Hook,
    Kind,
    Load,
    Rule,
    Ruleset,
    SetMark,
    Translate,
    Verdict,
    Within,
)
from ipsecgate.core.model.prefixes import LongestPrefix
from ipsecgate.core.nat.forwarded import Forwarding
from ipsecgate.core.nat.translation import Nat

TABLE = (2, "nat")
LINKS = {9: Link(9, "cni0", "bridge"), 2: Link(2, "eth0", "")}
OWN, HOST = parse_address("10.88.0.5"), parse_address("192.0.2.1")
ADDRESSES = (DeviceAddress(2, HOST, ip_network("192.0.2.0/24")),)
WAY = WayOut(OWN, 9, 2, parse_address("192.0.2.254"))
REMOTE = ip_network("10.0.0.0/8")
NONE = Nat(Ruleset())
MASQUERADE = Rule((Translate(Kind.MASQUERADE),))
ACCEPT = Verdict(Code.ACCEPT)


def to(network: str) -> tuple[Expression, ...]:
    """Match a destination, as `-d` does."""
    made = ip_network(network)
    return Load(0, Field.NETWORK, 4, 16), Within(0, 4, ((int(made[0]), int(made[-1])),))


def rules(*chain: Rule, hook: Hook = Hook.POSTROUTING, nat: bool = True) -> Nat:
    name: ChainName = (TABLE, "chain")
    return Nat(Ruleset((BaseChain(TABLE, "chain", hook, 100, nat=nat),), {name: chain}))


def path(
    *, here: Nat | None = NONE, there: Nat | None = NONE, way: WayOut = WAY, at: str = "10.2.0.9"
) -> FlowPath:
    found = Forwarding(there, here, LINKS, ADDRESSES).paths(REMOTE, way)
    return next(LongestPrefix(found).containing(parse_address(at)))[1]


def test_without_rules_a_flow_keeps_its_source() -> None:
    assert path() == FlowPath(OWN)


def test_masquerade_gives_it_the_hosts() -> None:
    assert path(here=rules(MASQUERADE)) == FlowPath(OWN, translated=HOST)


def test_a_rule_for_a_part_divides_the_network() -> None:
    """As every container runtime has it: what stays among containers is not masqueraded."""
    here = rules(Rule((*to("10.88.0.0/16"), ACCEPT)), MASQUERADE)
    assert path(here=here) == FlowPath(OWN, translated=HOST)
    assert path(here=here, at="10.88.0.9") == FlowPath(OWN)
    assert path(here=here, at="10.89.0.9") == FlowPath(OWN, translated=HOST)


def test_a_network_is_not_divided_without_end() -> None:
    many = [Rule((*to(f"10.{number}.0.1/32"), ACCEPT)) for number in range(64)]
    found = list(Forwarding(NONE, rules(*many, MASQUERADE), LINKS, ADDRESSES).paths(REMOTE, WAY))
    assert sum(network.num_addresses for network, _ in found) == REMOTE.num_addresses
    assert len(found) <= 65
    assert any("one of several sources" in path.outside for _, path in found)


def test_a_protected_flow_behind_a_rule_for_unprotected_ones_keeps_its_source() -> None:
    """-m policy --dir out --pol none -j MASQUERADE."""
    plain = Load(0, Field.IPSEC, 1), Within(0, 1, ((0, 0),))
    assert path(here=rules(Rule((*plain, *MASQUERADE.expressions)))) == FlowPath(OWN)


PORT = Constant(4, (8443).to_bytes(2, "big"))


@pytest.mark.parametrize(
    "rule",
    [
        Rule((Constant(0, bytes((10, 3, 0, 7))), Translate(Kind.DNAT, (0, 0)))),
        Rule((PORT, Translate(Kind.DNAT, ports=(4, 4)))),
        Rule((SetMark(None),)),
    ],
)
def test_what_may_go_elsewhere_is_refused(rule: Rule) -> None:
    found = path(here=rules(rule, hook=Hook.PREROUTING))
    assert found.source is None
    assert "rules of this host may translate its destination" in found.outside


@pytest.mark.parametrize("hook", [Hook.OUTPUT, Hook.POSTROUTING])
def test_rules_inside_the_namespace(hook: Hook) -> None:
    """A sidecar, for instance, redirects what a container sends."""
    kind = Kind.REDIRECT if hook is Hook.OUTPUT else Kind.MASQUERADE
    found = path(there=rules(Rule((Translate(kind),)), hook=hook))
    assert found.source is None
    assert "rules of its namespace may translate" in found.outside
    elsewhere = Rule((*to("127.0.0.11/32"), Translate(kind)))  # Docker's resolver
    assert path(there=rules(elsewhere, hook=hook)) == FlowPath(OWN)


def test_rules_that_cannot_be_read() -> None:
    for found in (path(here=None), path(there=None)):
        assert found.source is None
        assert "cannot be read" in found.outside


def test_the_host_floor_blocks_what_is_still_to_be_translated() -> None:
    for rule, path in ((MASQUERADE, FlowPath(None)), (Rule((ACCEPT,)), FlowPath(OWN))):
        forwarding = Forwarding(NONE, rules(rule), LINKS, ADDRESSES, floor=True)
        ((_, found),) = forwarding.paths(REMOTE, WAY)
        assert found.source == path.source
        assert ("the host floor" in found.outside) is (path.source is None)


def test_around_the_host_and_to_the_host() -> None:
    assert path(way=WayOut(None, reason="around")) == FlowPath(None, outside="around")
    assert path(way=WayOut(HOST), here=rules(MASQUERADE)) == FlowPath(HOST)
