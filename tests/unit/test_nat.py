"""What the NAT rules of well-known tools do, from the kernel's own lists of them."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from ipsecgate.core.model.flow import TCP, UDP, Address, Network
from ipsecgate.core.model.nat import (
    AddressType,
    Anything,
    BaseChain,
    Bits,
    ChainName,
    Code,
    Device,
    Field,
    Hook,
    Load,
    Packet,
    Rule,
    Ruleset,
    Translate,
    Unclear,
    Untrack,
    Verdict,
    Within,
)
from ipsecgate.core.model.nat import Kind as NatKind
from ipsecgate.core.nat.mentions import Candidate, Mentions
from ipsecgate.core.nat.translation import Nat
from tests import nat_rules

RECORDED = nat_rules.recorded()
ETH0, DOCKER0 = Device(2, "eth0"), Device(3, "docker0")
HERE = ip_address("192.0.2.1")


def nat(name: str) -> Nat:
    return Nat(nat_rules.ruleset(RECORDED[name]))


def packet(saddr: str, daddr: str, proto: int = TCP, dport: int = 443, **more: object) -> Packet:
    made = Packet(
        ip_address(daddr), proto, ip_address(saddr), 0, dport, local=False, oif=ETH0,
        saddr_type=AddressType.UNICAST, daddr_type=AddressType.UNICAST, masquerade=HERE,
    )  # fmt: skip
    return replace(made, **more)  # type: ignore[arg-type]


def sources(name: str, asked: Packet) -> set[Address] | None:
    found = nat(name).sources(asked)
    return None if found is None else {one.low for one in found}


def destinations(name: str, asked: Packet) -> set[tuple[str, int]] | None:
    found = nat(name).destinations(asked)
    return None if found is None else {(str(one.low), one.ports[0]) for one in found}


def test_the_record_has_every_rule_set() -> None:
    assert RECORDED.keys() == nat_rules.RULES.keys()


@pytest.mark.parametrize("name", RECORDED)
def test_nothing_of_these_rules_is_unclear_but_chance(name: str) -> None:
    found = {
        expression.what
        for rules in nat(name).ruleset.chains.values()
        for rule in rules
        for expression in rule.expressions
        if isinstance(expression, Unclear | Anything)
    }
    assert found <= {"match statistic"}


@pytest.mark.parametrize("name", ["docker", "docker-legacy"])
def test_docker_masquerades_what_leaves_its_bridge(name: str) -> None:
    container = packet("172.17.0.2", "10.2.0.9")
    assert sources(name, container) == {HERE}
    assert sources(name, replace(container, oif=DOCKER0)) == {container.saddr}
    assert sources(name, replace(container, oif=None)) == {HERE, container.saddr}
    assert sources(name, packet("10.1.0.5", "10.2.0.9")) == {ip_address("10.1.0.5")}


@pytest.mark.parametrize("name", ["docker", "docker-legacy"])
def test_docker_publishes_ports_of_local_addresses(name: str) -> None:
    asked = packet("192.0.2.1", "192.0.2.1", dport=8080, local=True, daddr_type=AddressType.LOCAL)
    assert destinations(name, asked) == {("172.17.0.2", 80)}
    assert destinations(name, replace(asked, dport=8081)) == {("192.0.2.1", 8081)}
    assert destinations(name, replace(asked, daddr_type=AddressType.UNICAST)) == {
        ("192.0.2.1", 8080)
    }
    assert destinations(name, replace(asked, daddr_type=None)) == {
        ("172.17.0.2", 80), ("192.0.2.1", 8080),
    }  # fmt: skip


def test_netavark_masquerades_but_within_its_network_and_to_multicast() -> None:
    assert sources("netavark", packet("10.88.0.5", "10.2.0.9")) == {HERE}
    for other in ("10.88.0.6", "224.0.0.1"):
        assert sources("netavark", packet("10.88.0.5", other)) == {ip_address("10.88.0.5")}
    marked = packet("10.1.0.5", "10.2.0.9", mark=0x2000)
    assert sources("netavark", marked) == {HERE}
    assert sources("netavark", replace(marked, mark=None)) == {HERE, marked.saddr}


def test_a_network_is_judged_as_a_whole() -> None:
    """Of half the addresses nothing is known, so either may happen."""
    wide = packet("10.88.0.5", "10.2.0.0", bits=16)
    assert sources("netavark", wide) == {HERE}
    assert sources("netavark", replace(wide, bits=8, daddr=ip_address("10.0.0.0"))) == {
        HERE, wide.saddr,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["libvirt", "libvirt-legacy"])
@pytest.mark.parametrize("proto", [TCP, UDP, 0])
def test_libvirt_masquerades_to_high_ports(name: str, proto: int) -> None:
    guest = packet("192.168.122.9", "10.2.0.9", proto)
    assert sources(name, guest) == {HERE}
    found = nat(name).sources(replace(guest, proto=TCP))
    assert found is not None
    assert {one.ports for one in found} == {(1024, 65535)}
    neighbour = replace(guest, daddr=ip_address("192.168.122.1"))
    assert sources(name, neighbour) == {guest.saddr}


@pytest.mark.parametrize("name", ["kube-proxy", "kube-proxy-legacy", "kube-proxy-nft"])
def test_kube_proxy_chooses_a_backend_and_masquerades_for_others(name: str) -> None:
    host = packet("192.0.2.1", "10.96.0.10", UDP, 53, local=True)
    rules = nat(name)
    found = rules.destinations(host)
    assert found is not None
    assert {(str(one.low), one.ports) for one in found} == {
        ("10.244.0.3", (53, 53)), ("10.244.0.4", (53, 53)),
    }  # fmt: skip
    assert {one.mark for one in found} == {0x4000}, "for the chain of POSTROUTING"
    marked = replace(host, daddr=ip_address("10.244.0.3"), mark=0x4000)
    assert sources(name, marked) == {HERE}
    assert sources(name, replace(marked, mark=0)) == {host.saddr}
    pod = replace(host, saddr=ip_address("10.244.0.7"), local=False)
    assert {one.mark for one in rules.destinations(pod) or ()} == {0}
    other = rules.destinations(replace(host, dport=54))
    assert other is not None
    assert [one.rule for one in other] == [""]


@pytest.mark.parametrize("name", ["spared", "spared-legacy"])
def test_what_ipsec_protects_may_be_spared(name: str) -> None:
    asked = packet("10.1.0.5", "10.2.0.9", local=True)
    assert sources(name, replace(asked, ipsec=True)) == {asked.saddr}
    assert sources(name, replace(asked, ipsec=False)) == {HERE}
    assert sources(name, asked) == {asked.saddr, HERE}


def test_firewalld_masquerades_in_a_zone() -> None:
    asked = packet("10.1.0.5", "10.2.0.9")
    assert sources("firewalld", asked) == {HERE}
    assert sources("firewalld", replace(asked, oif=DOCKER0)) == {asked.saddr}
    six = packet("2001:db8::5", "2001:db8::9")
    assert sources("firewalld", six) == {six.saddr}


def test_a_set_with_intervals() -> None:
    asked = packet("192.168.3.255", "10.2.0.9", ipsec=False)
    assert sources("by-hand", asked) == {ip_address("192.0.2.7")}
    assert sources("by-hand", replace(asked, saddr=ip_address("192.168.4.0"))) == {
        ip_address("192.168.4.0")
    }
    assert sources("by-hand", replace(asked, ipsec=True)) == {asked.saddr}


# --- what rules name ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kube-proxy", "kube-proxy-legacy", "kube-proxy-nft"])
def test_the_services_of_kube_proxy_are_found(name: str) -> None:
    found = Mentions(nat(name).ruleset, Hook.OUTPUT, 4).services
    assert found is not None
    assert {replace(one, target=None) for one in found} == {
        Candidate(ip_network("10.96.0.10/32"), UDP, (53, 53))
    }
    ends = {int(ip_address(text)) for text in ("10.244.0.3", "10.244.0.4")}
    assert {one.target for one in found} == {(end, end) for end in ends}


def test_the_destinations_that_rules_distinguish_are_found() -> None:
    found = Mentions(nat("netavark").ruleset, Hook.POSTROUTING, 4).networks
    assert found == {ip_network("10.88.0.0/16"), ip_network("224.0.0.0/4")}
    assert Mentions(nat("netavark").ruleset, Hook.POSTROUTING, 6).networks == set()


@pytest.mark.parametrize(
    ("load", "compared", "named"),
    [
        (Load(0, Field.PROTO, 1), 4, set()),
        (Load(0, Field.NETWORK, 4, 16), 4, {ip_network("0.0.0.0/32")}),
        (Load(0, Field.NETWORK, 4, 16), 8, None),
    ],
)
def test_more_bytes_than_were_loaded_name_nothing(
    load: Load, compared: int, named: set[Network] | None
) -> None:
    rule = Rule((load, Within(0, compared, ((0, 0),)), MASQUERADE))
    ruleset = Ruleset((BASE,), {(TABLE, "post"): (rule,)})
    assert Mentions(ruleset, Hook.POSTROUTING, 4).networks == named


@pytest.mark.parametrize(
    ("mask", "compared", "named"),
    [
        (b"\xff\xff", 4, None),
        (b"\xff\0\0\0", 2, {ip_network("10.0.0.0/8")}),
        (b"\xff\xff\xff\0", 2, {ip_network("10.0.0.0/16")}),
    ],
)
def test_a_mask_or_a_comparison_of_fewer_bytes_names_no_less(
    mask: bytes, compared: int, named: set[Network] | None
) -> None:
    low = 10 << 8 * (compared - 1)
    masked = Bits(0, 0, mask, bytes(len(mask)))
    rule = Rule((Load(0, Field.NETWORK, 4, 16), masked, Within(0, compared, ((low, low),))))
    ruleset = Ruleset((BASE,), {(TABLE, "post"): (rule,)})
    assert Mentions(ruleset, Hook.POSTROUTING, 4).networks == named


# --- what is not understood --------------------------------------------------------------

TABLE = (2, "t")
BASE = BaseChain(TABLE, "post", Hook.POSTROUTING, 100, nat=True)
ACCEPT = Verdict(Code.ACCEPT)
MASQUERADE = Translate(NatKind.MASQUERADE)


def of(*rules: tuple[object, ...], more: tuple[object, ...] = ()) -> Nat:
    chains = {(TABLE, "post"): tuple(Rule(rule) for rule in rules)}  # type: ignore[arg-type]
    bases = [BASE]
    if more:
        bases.append(BaseChain(TABLE, "raw", Hook.OUTPUT, -300, nat=False))
        chains[TABLE, "raw"] = (Rule(more),)  # type: ignore[arg-type]
    return Nat(Ruleset(tuple(bases), chains))


ASKED = packet("10.1.0.5", "10.2.0.9")


def ends(rules: Nat) -> set[Address] | None:
    found = rules.sources(ASKED)
    return None if found is None else {one.low for one in found}


def test_a_match_that_is_not_understood_may_match_or_not() -> None:
    assert ends(of((Unclear("x"), MASQUERADE))) == {HERE, ASKED.saddr}
    assert ends(of((Unclear("x"), ACCEPT), (MASQUERADE,))) == {HERE, ASKED.saddr}


def test_a_target_that_is_not_understood_makes_all_unknown() -> None:
    assert ends(of((Anything("x"),))) is None
    assert ends(of((ACCEPT,), (Anything("x"),))) == {ASKED.saddr}


def test_a_connection_that_may_be_untracked_may_stay_as_it_is() -> None:
    assert ends(of((MASQUERADE,))) == {HERE}
    assert ends(of((MASQUERADE,), more=(Untrack(),))) == {HERE, ASKED.saddr}


def test_a_masquerade_without_a_known_address_is_unknown() -> None:
    assert of((MASQUERADE,)).sources(replace(ASKED, masquerade=None)) is None


def test_chains_that_never_end_are_unknown() -> None:
    assert ends(of((Verdict(Code.JUMP, "post"),))) is None


def test_chains_of_one_priority_may_come_in_any_order() -> None:
    other = BaseChain((2, "u"), "post", Hook.POSTROUTING, 100, nat=True)
    chains: dict[ChainName, tuple[Rule, ...]] = {
        (TABLE, "post"): (Rule((MASQUERADE,)),),
        ((2, "u"), "post"): (Rule((ACCEPT,)),),
    }
    assert ends(Nat(Ruleset((BASE, other), chains))) == {HERE}


def test_without_a_source_there_is_no_answer() -> None:
    with pytest.raises(ValueError, match="not known"):
        of().sources(replace(ASKED, saddr=None))
