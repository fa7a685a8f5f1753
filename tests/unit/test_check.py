"""The judgement of `ipsecgate check`, over plain data: no host is looked at."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from rich.console import Console

from ipsecgate.cli.check import screen, summary
from ipsecgate.core.check.connections import (
    Connection,
    Loaded,
    check_connections,
    check_plugins,
)
from ipsecgate.core.check.finding import Finding, State, exit_code, missing, ok, warning
from ipsecgate.core.check.machine import (
    Clock,
    Limit,
    Unit,
    check_clock,
    check_limits,
    check_units,
)
from ipsecgate.core.check.policies import check_policies, reach
from ipsecgate.core.check.proposals import lacking, needs
from ipsecgate.core.check.ungated import SHOWN, check_ungated
from ipsecgate.core.codec.swanctl import proposals
from ipsecgate.core.model.flow import TCP, UDP, Flow, TrafficSelector
from ipsecgate.core.model.ipsec import Action, ChildConfig, ChildName, Mode
from ipsecgate.core.model.policy import Policy

HERE, SITE, SITE6 = "10.1.0.0/16", "10.2.0.0/16", "2001:db8:2::/48"


def ts(
    *networks: str, proto: int = 0, ports: tuple[int, int] = (0, 65535)
) -> list[TrafficSelector]:
    return [TrafficSelector(ip_network(net), proto, ports) for net in networks]


def child(
    name: str = "gw/net", remote: Iterable[TrafficSelector] = (), local: str = HERE, **more: Any
) -> ChildConfig:
    ike, _, own = name.partition("/")
    here = tuple(ts(local)) if local else ()
    return ChildConfig(ChildName(ike, own), Mode.TUNNEL, here, tuple(remote), **more)


def policy(name: str, *remote: str, **more: object) -> Policy:
    nets = tuple(map(ip_network, remote))
    return Policy(name, nets, origin=f"/etc/x.toml:{name}", **more)  # type: ignore[arg-type]


DB, WEB = {"proto": TCP, "ports": (5432, 5432)}, {"proto": TCP, "ports": (443, 443)}


def bypass(name: str, *remote: str, **more: object) -> Policy:
    return policy(name, *remote, action=Action.BYPASS, **more)


def problems(findings: Iterable[Finding]) -> list[tuple[str, str]]:
    """Return state and text of what is not ok; each must say what to do."""
    wrong = [one for one in findings if one.state is not State.OK]
    assert all(one.hint and "\n" not in one.hint for one in wrong)
    return [(one.state.value, one.found) for one in wrong]


NET = child(remote=ts(SITE))


def judged(*policies: Policy, children: Iterable[ChildConfig] = (NET,), deny: bool = False) -> str:
    return "; ".join(
        f"{state}: {text}"
        for state, text in problems(check_policies(policies, list(children), {}, deny=deny))
    )


def test_a_connection_of_a_process_that_is_not_gated() -> None:
    known = [bypass("dns", "10.2.0.53/32", proto=UDP), policy("db", SITE, **DB)]
    found = [
        (Flow(ip_address("10.2.0.5"), TCP, 5432), "unit:webshop-worker"),
        (Flow(ip_address("10.2.0.6"), TCP, 5432), "unit:webshop-worker"),
        (Flow(ip_address("10.2.0.5"), TCP, 80), "unit:browser"),
        (Flow(ip_address("10.2.0.53"), UDP, 53), "unit:resolver"),
        (Flow(ip_address("192.0.2.5"), TCP, 5432), "unit:other"),
    ]
    (one,) = check_ungated(known, found)
    assert (one.state, one.found) == (
        State.WARNING,
        "unit:webshop-worker is not gated, and has a connection to tcp 10.2.0.5:5432, which policy "
        "db (/etc/x.toml:db) protects: the gate does not check its calls",
    )
    assert one.hint.startswith('add "unit:webshop-worker" to gate.cgroups, then `ipsecgate reload`')
    assert [each.state for each in check_ungated(known, found[2:])] == [State.OK]
    (root,) = check_ungated(known, [(found[0][0], "")])
    assert root.found.startswith("a process in the root cgroup is not gated")
    assert root.hint == "start it as a systemd service, and gate that"
    many = [(found[0][0], f"unit:{number}") for number in range(SHOWN + 3)]
    assert check_ungated(known, many)[-1].found.startswith("3 more")


# --- policies and connections -----------------------------------------------------------------


def test_policies_that_fit_are_ok() -> None:
    fits = [policy("db", "10.2.3.0/24", proto=TCP, ports=(5432, 5432)), policy("all", SITE)]
    assert judged(*fits) == ""
    assert [one.state for one in check_policies(fits, [NET], {})] == [State.OK]
    assert judged(policy("named", SITE, child="net")) == ""
    assert judged(policy("named", SITE, child="gw/net")) == ""
    assert judged() == "", "derived policies always fit"


def test_a_child_that_no_connection_has() -> None:
    said = judged(policy("db", SITE, child="old-net"))
    assert said.startswith("missing: policy db (/etc/x.toml:db) needs the child old-net")


def test_a_child_that_is_misspelt() -> None:
    missed, *_ = check_policies([policy("db", SITE, child="nett")], [NET], {})
    assert missed.hint.startswith("did you mean net? Then correct `child`")


def test_a_child_whose_selector_is_its_peers_address() -> None:
    """It names a host, or no peer at all, so VICI shows no address."""
    unknown = [child("mesh/all", local="", wildcard=True)]
    assert judged(policy("mesh", SITE, child="all"), children=unknown) == ""
    assert judged(policy("mesh", SITE), children=unknown).startswith("missing")


def test_a_network_that_no_connection_protects() -> None:
    assert judged(policy("db", SITE, "10.9.0.0/16")).startswith(
        "missing: policy db (/etc/x.toml:db): no loaded connection protects 10.9.0.0/16"
    )
    named = judged(policy("db", "10.9.0.0/16", child="net"))
    assert "the child net does not protect 10.9.0.0/16" in named
    assert judged(policy("db", SITE), children=()).startswith("missing")


def test_a_network_that_is_protected_in_part() -> None:
    said = judged(policy("wide", "10.2.0.0/15"))
    assert said.startswith("warning: policy wide")
    assert "10.3.0.0/16" in said
    assert "10.2.0.0/16" not in said
    only_tcp = [child(remote=ts(SITE, proto=TCP))]
    assert judged(policy("web", SITE, proto=TCP), children=only_tcp) == ""
    assert judged(policy("any", SITE), children=only_tcp).startswith("warning")
    assert judged(policy("dns", SITE, proto=UDP), children=only_tcp).startswith("missing")


def test_selectors_that_only_together_cover_a_network() -> None:
    halves = [child("a/1", ts("10.2.0.0/17")), child("b/2", ts("10.2.128.0/17"))]
    assert judged(policy("both", SITE), children=halves) == ""
    assert "10.2.128.0/17" in judged(policy("both", SITE), children=halves[:1])


@pytest.mark.parametrize(
    ("networks", "left"),
    [
        (["10.2.0.0/24"], ["10.2.1.0/24", "10.2.2.0/23"]),
        (["10.2.3.0/24"], ["10.2.0.0/23", "10.2.2.0/24"]),
        (["10.2.1.0/24", "10.2.1.0/25"], ["10.2.0.0/24", "10.2.2.0/23"]),
        (["10.0.0.0/8"], []),
        (["2001:db8::/32"], ["10.2.0.0/22"]),
        ([], ["10.2.0.0/22"]),
    ],
)
def test_what_selectors_leave_of_a_network(networks: list[str], left: list[str]) -> None:
    network = ip_network("10.2.0.0/22")
    found = reach(policy("p", "10.2.0.0/22"), network, ts(*networks))
    assert [str(net) for net in found.left] == left


def test_the_last_address_of_all_is_no_special_case() -> None:
    everything = ip_network("::/0")
    assert reach(policy("p", "::/0"), everything, ts("::/0")).left == ()
    assert reach(policy("p", "::/0"), everything, ts("::/1")).left == (ip_network("8000::/1"),)


def test_a_policy_that_never_applies() -> None:
    said = judged(policy("all", "10.0.0.0/8", action=Action.BYPASS), policy("db", SITE))
    assert said.startswith("warning: policy db (/etc/x.toml:db) never applies: policy all")
    assert "lets all of its flows leave unprotected" in said
    assert judged(policy("db", SITE), policy("rest", "10.2.0.0/15", action=Action.DISCARD)) == ""
    other = policy("web", "10.2.1.0/24", proto=TCP)
    assert judged(other, policy("db", SITE)) == "", "the wider one comes later"
    assert judged(policy("udp", SITE, proto=UDP), policy("db", SITE)) == ""


def test_an_exception_that_takes_more_than_somebody_thought_of() -> None:
    findings = check_policies(
        [
            bypass("monitoring", "10.2.0.0/24"),
            bypass("resolver", "10.2.0.53/32", proto=UDP, ports=(53, 53)),
            policy("db", SITE, **DB),
        ],
        [NET],
        {},
    )
    first, second = findings
    assert first.state is second.state is State.WARNING
    assert first.found == (
        "policy monitoring (/etc/x.toml:monitoring) comes before policy db (/etc/x.toml:db) and "
        "lets tcp 5432 to 10.2.0.0/24 leave unprotected"
    )
    assert first.hint.startswith("move monitoring after db, or give it a port")
    assert second.found.startswith("policy resolver (/etc/x.toml:resolver) never applies")
    assert second.hint == "remove resolver: nothing changes without it"


@pytest.mark.parametrize(
    "first",
    [
        bypass("dns", "10.2.0.53/32", proto=UDP, ports=(53, 53)),  # fewer ports than `db`, or none
        bypass("web", "10.0.0.0/8", **WEB),
        bypass("replica", "10.2.0.7/32", **DB),  # the same ports, and a part of the network
        bypass("elsewhere", "10.9.0.0/16"),
    ],
)
@pytest.mark.parametrize("protected", [policy("db", SITE, **DB), policy("ports", SITE, proto=TCP)])
def test_an_exception_that_somebody_chose(first: Policy, protected: Policy) -> None:
    assert judged(first, protected) == ""


def test_exceptions_are_listed() -> None:
    (found,) = check_policies([bypass("replica", "10.2.0.7/32", **DB), policy("db", SITE, **DB)],
                              [NET], {})  # fmt: skip
    said = "exceptions: replica lets tcp 5432 to 10.2.0.7/32 leave unprotected, before db"
    assert (found.state, said in found.found) == (State.OK, True)


def test_a_whole_network_of_several_that_is_taken() -> None:
    both = [child(remote=ts(SITE, "10.3.0.0/16"))]
    said = judged(bypass("old", "10.3.0.0/16", **DB), policy("db", SITE, "10.3.0.0/16", **DB),
                  children=both)  # fmt: skip
    assert "lets tcp 5432 to 10.3.0.0/16 leave unprotected" in said
    said = judged(policy("all", "10.2.0.0/24", action=Action.DISCARD), policy("db", SITE, **DB))
    assert "discards tcp 5432 to 10.2.0.0/24" in said


def test_what_an_even_earlier_policy_protects_is_not_taken() -> None:
    first = policy("near", "10.2.0.0/24", **DB)
    assert judged(first, bypass("monitoring", "10.2.0.0/24"), policy("db", SITE, **DB)) == ""
    assert judged(policy("db", SITE, **DB), bypass("monitoring", "10.2.0.0/24")) == ""


def test_ipv6_that_was_forgotten() -> None:
    both = [child(remote=ts(SITE, SITE6))]
    said = judged(policy("db", SITE), children=both)
    assert said.startswith("warning: no policy names IPv6 of gw/net")
    assert SITE6 in said
    assert "IPv4" in judged(policy("db", SITE6), children=both)
    assert judged(policy("db", SITE, SITE6), children=both) == ""
    assert (
        judged(policy("db", SITE), policy("six", SITE6, action=Action.DISCARD), children=both) == ""
    )
    assert judged(policy("db", SITE), children=both, deny=True) == "", "it is refused"
    other = [NET, child("other/net", ts("10.8.0.0/16", "2001:db8:8::/48"))]
    assert judged(policy("db", SITE), children=other) == "", "none of its policies name that one"


def test_the_other_address_of_a_peer() -> None:
    peers = {"gw": frozenset(map(ip_address, ("192.0.2.2", "2001:db8::2")))}
    host = child(remote=ts("192.0.2.2/32"))
    ((state, said),) = problems(check_policies([], [host], peers))
    assert (state, "2001:db8::2" in said) == ("warning", True)
    whole = child(remote=ts("192.0.2.2/32", "2001:db8::/32"))
    assert problems(check_policies([], [whole], peers)) == []
    assert problems(check_policies([], [NET], peers)) == [], "it protects what is behind the peer"


# --- connections ------------------------------------------------------------------------------

LOADED = Loaded("charon 5.9", connections=(Connection("gw", ("192.0.2.2",)),), children=(NET,))
HOST = frozenset([ip_address("10.1.0.7")])


def faults(loaded: Loaded, unresolved: dict[str, str] | None = None) -> list[tuple[str, str]]:
    return problems(check_connections(loaded, HOST, unresolved or {}))


def test_connections_that_are_well() -> None:
    assert faults(LOADED) == []
    assert faults(replace(LOADED, connections=(), children=())) == [
        ("warning", "strongSwan has loaded no connection")
    ]


def test_a_peer_whose_name_does_not_resolve() -> None:
    loaded = replace(LOADED, connections=(Connection("gw", ("gw.example",)),))
    ((state, said),) = faults(loaded, {"gw.example": "Name or service not known"})
    assert state == "missing"
    assert said == "gw: its peer gw.example does not resolve: Name or service not known"


def test_children_with_the_same_selectors() -> None:
    twin = child("other/net", ts(SITE))
    ((state, said),) = faults(replace(LOADED, children=(NET, twin)))
    assert state == "warning"
    assert said.startswith("gw/net, other/net have the same traffic selectors")
    apart = child("other/net", ts(SITE), local="10.0.0.0/8")
    assert faults(replace(LOADED, children=(NET, apart))) == []


def test_a_source_that_no_selector_has() -> None:
    ((state, said),) = faults(
        replace(LOADED, children=(child(remote=ts(SITE), local="10.7.0.0/16"),))
    )
    assert state == "warning"
    assert "no address in 10.7.0.0/16" in said
    assert faults(replace(LOADED, children=(child(remote=ts(SITE), local=""),))) == []


def test_a_wildcard_without_a_trap() -> None:
    mesh = child("mesh/all", ts(SITE), wildcard=True)
    ((state, said),) = faults(replace(LOADED, children=(mesh,)))
    assert state == "missing"
    assert said.startswith("mesh/all names no peer and has no trap")
    assert faults(replace(LOADED, children=(mesh,), traps=frozenset({"mesh/all"}))) == []


def test_plugins_that_a_connection_needs() -> None:
    have = {"encryption": {"AES_CBC"}, "integrity": {"HMAC_SHA2_256_128"},
            "prf": {"PRF_HMAC_SHA2_256"}, "dh": {"MODP_2048"}}  # fmt: skip
    gw = Connection("gw", proposals=("aes128-sha256-modp2048", "aes128-sha256-x25519"))
    loaded = replace(LOADED, connections=(gw,), algorithms=have)
    ((state, said),) = problems(check_plugins(loaded))
    assert state == "missing"
    assert said == "gw proposes aes128-sha256-x25519, but no plugin of strongSwan's has CURVE_25519"
    road = Connection(
        "road", classes=frozenset({"EAP"}), eap=frozenset({"EAP_MSCHAPV2", "EAP_IDENTITY"})
    )
    loaded = replace(LOADED, connections=(road,), plugins=frozenset({"eap-identity"}))
    ((state, said),) = problems(check_plugins(loaded))
    assert "has not loaded eap-mschapv2" in said
    certified = Connection("cert", classes=frozenset({"public key"}))
    loaded = replace(LOADED, connections=(certified,))
    assert loaded.uses_certificates
    assert len(problems(check_plugins(loaded))) == 1
    assert problems(check_plugins(replace(loaded, plugins=frozenset({"x509"})))) == []


@pytest.mark.parametrize(
    ("proposal", "names"),
    [
        ("aes256-sha384-ecp384", "AES_CBC ECP_384 HMAC_SHA2_384_192 PRF_HMAC_SHA2_384"),
        ("aes128gcm16-prfsha256-x25519", "AES_GCM_16 PRF_HMAC_SHA2_256 CURVE_25519"),
        ("aes256ccm96-sha256-modp3072", "AES_CCM_12 MODP_3072 PRF_HMAC_SHA2_256"),
        (
            "chacha20poly1305-prfsha512-curve448-ke1_mlkem768",
            "CHACHA20_POLY1305 PRF_HMAC_SHA2_512 CURVE_448 ML_KEM_768",
        ),
        ("default", ""),
        ("something-new", ""),
    ],
)
def test_the_algorithms_of_a_proposal(proposal: str, names: str) -> None:
    assert [name for _, name in needs(proposal)] == names.split()
    assert lacking(proposal, {}) == [], "nothing is known of what is loaded"
    assert lacking(proposal, {"other": {"X"}}) == names.split()


def test_the_proposals_in_swanctl_conf() -> None:
    text = """
    # proposals = commented
    connections {
      gw { # a peer
        proposals = aes128-sha256-x25519, default   # first choice
        remote_addrs = "gw.example"
        children {
          net { esp_proposals = aes128
                proposals = no-such-key }
        }
      }
      other : gw {
        local { auth = psk }
        proposals = "aes256-sha512-ecp521"
      }
      bare { }
    }
    secrets { ike-1 { secret = "a } b # c" } }
    """
    assert proposals(text) == {
        "gw": ("aes128-sha256-x25519", "default"),
        "other": ("aes256-sha512-ecp521",),
    }
    assert proposals("}}} connections {") == {}


# --- the machine ------------------------------------------------------------------------------

NOON = Clock(1_700_000_000.0, synchronised=True, rtc=1_700_000_001.0, installed=1_699_999_000)


def test_the_clock() -> None:
    assert problems(check_clock(NOON)) == []
    assert "2023-11-14 22:13:20 UTC, synchronised" in check_clock(NOON)[0].found
    ((_, said),) = problems(check_clock(replace(NOON, installed=1_700_003_600)))
    assert "set back by at least 3600 s" in said
    unsynchronised = replace(NOON, synchronised=False)
    assert problems(check_clock(unsynchronised)) == [], "nothing depends on it"
    ((_, said),) = problems(check_clock(replace(unsynchronised, uses_certificates=True)))
    assert "is not synchronised, but connections use certificates" in said
    ((_, said),) = problems(check_clock(replace(NOON, rtc=1_600_000_000.0)))
    assert "the hardware clock differs by 100000000 s" in said
    assert problems(check_clock(replace(NOON, rtc=None, synchronised=None))) == []


def test_limits() -> None:
    limit = Limit("inotify watches", 80, 100, "raise it", "beyond it, …")
    assert problems(check_limits([limit])) == []
    assert check_limits([limit])[0].found == "80 of 100 inotify watches"
    assert problems(check_limits([replace(limit, used=81)])) == [
        ("warning", "81 of 100 inotify watches; beyond it, …")
    ]


UNIT = Unit("ipsecgate.service", text="[Unit]\n", shipped="[Unit]\n", state="enabled")


def test_units() -> None:
    by_choice = replace(UNIT, name="ipsecgate-metrics.service", state="disabled")
    assert problems(check_units([UNIT, by_choice], ())) == []
    for changed, text in (
        (replace(UNIT, text="[Unit]\nDescription=old\n"), "differs from this version's"),
        (replace(UNIT, needs_reload=True), "systemd has not read the present"),
        (replace(UNIT, state="disabled"), "is not enabled"),
        (replace(UNIT, text=None), "none is installed"),
    ):
        ((state, said),) = problems(check_units([changed], ()))
        assert state == "warning"
        assert text in said
    ((_, said),) = problems(check_units([UNIT], {"egress", "connect4"}))
    assert said == "the pinned hooks are another version's: connect4, egress"


def test_the_exit_code_is_that_of_what_is_missing() -> None:
    assert exit_code([ok("a", ""), warning("b", "", "do")]) == 0
    assert exit_code([missing("a", "", "do"), warning("b", "", "do")]) == 1
    assert exit_code([missing("a", "", "do"), missing("b", "", "do", 4)]) == 4


def test_what_needs_a_look_is_read_last_and_counted() -> None:
    found = [missing("a", "gone", "fetch it"), ok("b", "fine"), warning("c", "hm", "look")]
    drawn = io.StringIO()
    Console(file=drawn, width=80, highlight=False).print(screen(found))
    lines = [line.split() for line in drawn.getvalue().splitlines()]
    assert [line[0] for line in lines if line][:5] == ["ok", "warning", "next:", "missing", "next:"]
    assert lines[-1] == ["1", "missing,", "1", "warning", "(above),", "1", "ok."]
    assert summary([ok("b", "fine")]).plain == "Nothing is missing: 1 ok."
