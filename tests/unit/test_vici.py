"""The meaning of VICI messages: selectors, configurations, SAs, events, causes of failure."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest

from ipsecgate.core.codec.causes import RULES, failure_cause
from ipsecgate.core.codec.vici import (
    child_configs,
    child_rekey,
    child_sas,
    child_updown,
    ike_updown,
    is_userspace_esp,
)
from ipsecgate.core.codec.vici_sections import ViciError
from ipsecgate.core.codec.vici_selectors import selectors
from ipsecgate.core.model.events import ChildDown, ChildUp, IkeDown, IkeUp
from ipsecgate.core.model.flow import TrafficSelector
from ipsecgate.core.model.ipsec import ChildConfig, ChildName, ChildSa, Mode
from tests.unit.vici_messages import CHILD, HOSTS, NAMES, SA, conn, ike_sa, ts

PEER = ip_network("192.0.2.2")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("10.2.0.0/16", [ts("10.2.0.0/16")]),
        ("192.0.2.2/32[tcp/https]", [ts("192.0.2.2/32", 6, (443, 443))]),
        ("192.0.2.2/32[tcp/iso-tsap]", [ts("192.0.2.2/32", 6, (102, 102))]),
        ("192.0.2.2/32[tcp/8443]", [ts("192.0.2.2/32", 6, (8443, 8443))]),
        ("192.0.2.2/32[udp/5300-5307]", [ts("192.0.2.2/32", 17, (5300, 5307))]),
        ("10.0.0.0/8[17]", [ts("10.0.0.0/8", 17)]),
        ("10.0.0.0/8[udp]", [ts("10.0.0.0/8", 17)]),
        ("10.0.0.0/8[0/domain]", [ts("10.0.0.0/8", 0, (53, 53))]),
        ("10.0.0.0/8[tcp/OPAQUE]", [ts("10.0.0.0/8", 6, (65535, 0))]),
        ("10.0.0.0/8[icmp/8]", [ts("10.0.0.0/8", 1, (0x800, 0x800))]),
        ("10.0.0.0/8[icmp/3(4)]", [ts("10.0.0.0/8", 1, (0x304, 0x304))]),
        ("::/0[ipv6-icmp/1-4(255)]", [ts("::/0", 58, (0x100, 0x4FF))]),
        ("2001:db8::/48[tcp/443]", [ts("2001:db8::/48", 6, (443, 443))]),
        ("10.2.0.1", [ts("10.2.0.1/32")]),
        ("10.0.0.1..10.0.0.2", [ts("10.0.0.1/32"), ts("10.0.0.2/32")]),
        ("2001:db8::..2001:db8::3[tcp]", [ts("2001:db8::/126", 6)]),
        ("dynamic", [ts("192.0.2.2/32")]),
        ("dynamic[tcp/5432]", [ts("192.0.2.2/32", 6, (5432, 5432))]),
    ],
)
def test_a_traffic_selector_is_parsed(written: str, expected: list[TrafficSelector]) -> None:
    assert selectors([written], (PEER,), NAMES) == tuple(expected)


@pytest.mark.parametrize(
    "written",
    [
        *("", "10.2.0.0/33", "everything", "10.0.0.2..10.0.0.1", "10.0.0.1..::1"),
        *("10.0.0.0/8[nosuch]", "10.0.0.0/8[tcp/nosuch]", "10.0.0.0/8[tcp", "10.0.0.0/8[]"),
        *("10.0.0.0/8[256]", "10.0.0.0/8[tcp/65536]", "10.0.0.0/8[tcp/90-80]", "::1%eth0"),
        *("10.0.0.0/8[icmp/256]", "10.0.0.0/8[icmp/4-3]", f"10.0.0.0/8[{'9' * 5000}]"),
        *("10.0.0.0/8[tcp/\u0663]", "10.0.0.0/8[\u0663]"),
    ],
)
def test_an_invalid_traffic_selector_is_an_error(written: str) -> None:
    with pytest.raises(ViciError, match="VICI: traffic selector") as caught:
        selectors([written], (), NAMES)
    assert caught.value.hint


def test_a_child_configuration_is_parsed() -> None:
    assert list(child_configs(conn(), NAMES)) == [
        ChildConfig(ChildName("gw", "net"), Mode.TUNNEL, (ts("10.1.0.0/16"),), (ts("10.2.0.0/16"),))
    ]
    assert list(child_configs(conn(children={}), NAMES)) == []


@pytest.mark.parametrize(
    ("addresses", "networks"),
    [
        ([b"192.0.2.1"], ["192.0.2.1/32"]),
        ([b"192.0.2.1", b"2001:db8::1"], ["192.0.2.1/32", "2001:db8::1/128"]),
        ([b"::ffff:192.0.2.1"], ["192.0.2.1/32"]),
        ([b"%any"], []),
        ([b"gw.example.org", b"192.0.2.0/24", b"192.0.2.1-192.0.2.9"], []),
        ([], []),
    ],
)
def test_dynamic_is_the_ike_address_if_there_is_one(
    addresses: list[bytes], networks: list[str]
) -> None:
    child = {"mode": b"TRANSPORT", "local-ts": [b"dynamic"], "remote-ts": [b"dynamic"]}
    (config,) = child_configs(conn(local_addrs=addresses, children={"c": child}), NAMES)
    assert config.mode is Mode.TRANSPORT
    assert config.local == tuple(ts(net) for net in networks)
    assert config.remote == (ts("192.0.2.2/32"),)


@pytest.mark.parametrize("mode", [b"PASS", b"DROP"])
def test_a_shunt_is_not_a_child_configuration(mode: bytes) -> None:
    shunt = {"mode": mode, "local-ts": [b"10.1.0.0/16"], "remote-ts": [b"10.3.0.0/16"]}
    assert list(child_configs(conn(children={"shunt": shunt}), NAMES)) == []


@pytest.mark.parametrize("child", [{}, {"mode": b"SOMETHING"}, {"mode": [b"TUNNEL"]}])
def test_a_child_without_a_mode_is_an_error(child: dict[str, Any]) -> None:
    with pytest.raises(ViciError):
        list(child_configs(conn(children={"c": child}), NAMES))


@pytest.mark.parametrize(
    ("state", "found"),
    [
        *((state, [SA]) for state in ("INSTALLED", "REKEYING", "REKEYED")),
        *((state, []) for state in ("CREATED", "ROUTED", "INSTALLING", "DELETING", "DELETED")),
    ],
)
def test_only_installed_children_are_listed(state: str, found: list[ChildSa]) -> None:
    assert list(child_sas(ike_sa(state=state.encode()), NAMES)) == found


@pytest.mark.parametrize(
    ("plugins", "userland"),
    [
        ("random nonce kernel-netlink socket-default vici", False),
        ("random nonce kernel-libipsec kernel-netlink socket-default vici", True),
        ("random nonce kernel-netlink kernel-libipsec socket-default vici", False),
        ("kernel-pfkey kernel-libipsec kernel-netlink vici", False),
        ("random vici", False),
    ],
)
def test_the_first_kernel_plugin_does_esp(plugins: str, userland: bool) -> None:
    assert is_userspace_esp({"plugins": [name.encode() for name in plugins.split()]}) is userland
    assert not is_userspace_esp({"uptime": {}})


def test_a_child_without_spis_is_left_out() -> None:
    message = ike_sa(state=b"UPDATING")
    del message["gw"]["child-sas"]["net-3"]["spi-out"]
    assert list(child_sas(message, NAMES)) == []
    assert list(child_sas({"gw": {"remote-host": b"192.0.2.2", "child-sas": {}}}, NAMES)) == []


@pytest.mark.parametrize(
    "broken",
    [
        *({"spi-in": spi} for spi in (b"xyz", b"-1", b"1_0", b"0x1", b" 1", b"123456789")),
        *({"reqid": reqid} for reqid in (b"", b"4294967296", b"-1", b"9" * 5000)),
        *({"remote-ts": ts} for ts in (b"10.0.0.0/8", {"x": b""})),
        {"name": [b"net"]},
        {"protocol": b"IPCOMP"},
    ],
)
def test_a_malformed_child_is_an_error(broken: dict[str, Any]) -> None:
    with pytest.raises(ViciError):
        list(child_sas(ike_sa(**broken), NAMES))


@pytest.mark.parametrize("odd", [b"", [b"x"]])
def test_a_value_where_a_section_should_be_is_an_error(odd: Any) -> None:
    """Each once raised another error, which silently ended the reading of events."""
    sa = {**HOSTS, "uniqueid": b"7"}
    for message in (
        {"gw": {**sa, "child-sas": odd}},
        {"gw": {**sa, "child-sas": {"net": {"new": odd, "old": CHILD}}}},
        {"gw": {**sa, "child-sas": {"net": {"new": CHILD}}}},
    ):
        with pytest.raises(ViciError):
            list(child_rekey(message, NAMES))
    with pytest.raises(ViciError):
        list(child_configs(conn(children=odd), NAMES))
    with pytest.raises(ViciError):
        list(ike_updown({"gw": {**sa, "uniqueid": b"yes"}}))
    with pytest.raises(ViciError):
        is_userspace_esp({"plugins": b"kernel-libipsec"})


def test_events_are_parsed() -> None:
    assert list(child_updown({"up": b"yes", **ike_sa()}, NAMES)) == [ChildUp(SA)]
    assert list(child_updown(ike_sa(state=b"DELETED"), NAMES)) == [ChildDown(SA)]
    assert list(ike_updown({"up": b"yes", **ike_sa()})) == [IkeUp("gw", 7)]
    assert list(ike_updown(ike_sa())) == [IkeDown("gw", 7)]


def test_a_rekeyed_child_comes_up_before_the_old_one_goes_down() -> None:
    message = ike_sa()
    new = {**CHILD, "spi-out": b"0000cafe"}
    message["gw"]["child-sas"] = {"net": {"old": CHILD, "new": new}}
    up, down = child_rekey(message, NAMES)
    assert isinstance(up, ChildUp)
    assert up.sa.spi_out == 0xCAFE
    assert down == ChildDown(SA)


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        (["received AUTHENTICATION_FAILED notify error"], "refused our authentication: keys"),
        (
            [
                "authentication of 'shop.example' (myself) with pre-shared key",
                "establishing CHILD_SA net",
                "received AUTHENTICATION_FAILED notify error",
            ],
            "the peer refused our authentication as shop.example: keys and identities",
        ),
        (["no shared key found for 'a' - 'b'"], "no shared key is loaded for 'a' - 'b'"),
        (["tried 1 shared key for 'a' - 'b', but MAC mismatched"], "another pre-shared key"),
        (["received NO_PROPOSAL_CHOSEN notify error"], "no IKE proposal in common"),
        (
            [
                "received NO_PROPOSAL_CHOSEN notify, no CHILD_SA built",
                "failed to establish CHILD_SA, keeping IKE_SA",
            ],
            "no ESP proposal in common",
        ),
        (["received TS_UNACCEPTABLE notify, no CHILD_SA built"], "none of our traffic selectors"),
        (["received FAILED_CP_REQUIRED notify, no CHILD_SA built"], "answered FAILED_CP_REQUIRED"),
        (["unable to resolve gw.example, initiate aborted"], "gw.example can't be resolved"),
        (
            ["giving up after 5 retransmits", "establishing IKE_SA failed, peer not responding"],
            "did not answer (5 retransmits)",
        ),
        (["unable to resolve %any, initiate aborted"], "names no peer"),
        (["configured DH group CURVE_25519 not supported"], "key exchange CURVE_25519"),
        (
            ["PSEUDO_RANDOM_FUNCTION PRF_AES128_XCBC not supported!", "key derivation failed"],
            "no plugin for the algorithm PRF_AES128_XCBC",
        ),
        (["ENCRYPTION_ALGORITHM AES_CBC (key size 128) not supported!"], "algorithm AES_CBC"),
        (["received netlink error: Function not implemented (38)"], "the kernel refused the SA"),
        (["something new", "and its consequence"], "and its consequence"),
    ],
)
def test_the_cause_of_a_failure_is_found_in_the_log(lines: list[str], cause: str) -> None:
    before = ["initiating IKE_SA gw[1] to 192.0.2.2", "peer supports MOBIKE"]
    found = failure_cause([*before, *lines])
    assert found is not None
    assert cause in found.text
    assert bool(found.advice) is (lines[0] != "something new")
    assert found.unresolved == ("gw.example" if "gw.example" in cause else "")
    assert "\\" not in str(found), "every group is filled in"


def test_each_rule_says_what_to_do() -> None:
    assert all(rule.advice for rule in RULES)
    assert {rule.words for rule in RULES if rule.unresolved} == {
        r"the peer's address \1 can't be resolved"
    }


@pytest.mark.parametrize(
    "line",
    [
        "no shared key found for 'a' - 'b'",
        "tried 1 shared key for 'a' - 'b', but MAC mismatched",
        "received AUTHENTICATION_FAILED notify error",
        "no trusted RSA public key found for 'b'",
        "constraint check failed: identity 'b' required",
    ],
)
def test_a_cause_of_identity_is_marked(line: str) -> None:
    found, other = failure_cause([line]), failure_cause(["received TS_UNACCEPTABLE notify"])
    assert found is not None
    assert other is not None
    assert (found.is_identity, other.is_identity) == (True, False)


def test_without_a_log_there_is_no_cause() -> None:
    assert failure_cause([]) is None


@pytest.mark.parametrize(
    ("addresses", "mode", "wildcard"),
    [
        (["%any"], "TRANSPORT", True),
        (["%any4", "10.0.0.0/8", "10.1.0.1-10.1.0.9", "2001:db8::/32"], "TRANSPORT", True),
        (["%any"], "TUNNEL", False),
        (["10.0.0.0/8", "192.0.2.2"], "TRANSPORT", False),
        (["cafe-bad.example"], "TRANSPORT", False),
        (["cafe-bad"], "TRANSPORT", False),
    ],
)
def test_a_transport_child_whose_connection_names_no_host_is_a_wildcard(
    addresses: list[str], mode: str, wildcard: bool
) -> None:
    child = {"mode": mode.encode(), "local-ts": [b"dynamic"], "remote-ts": [b"10.0.0.0/8"]}
    message = conn(remote_addrs=[a.encode() for a in addresses], children={"net": child})
    (config,) = child_configs(message, NAMES)
    assert config.wildcard is wildcard


PSK, KEY, EAP = b"pre-shared key", b"public key", b"EAP"


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        ({"remote-1": {"class": PSK, "id": b"b.example"}}, ("b.example", "pre-shared key")),
        ({"remote-1": {"class": KEY}}, ("", "public key")),
        ({"remote-1": {"class": KEY, "id": b"%any"}}, ("", "public key")),
        (
            {"remote-1": {"class": KEY, "id": b"b"}, "remote-2": {"class": EAP, "id": b"c"}},
            ("b, c", "public key, EAP"),
        ),
        ({"local-1": {"class": PSK, "id": b"a.example"}}, ("", "")),
        ({"remote-1": {"class": [b"x"], "id": {}}}, ("", "")),
    ],
)
def test_the_identity_that_the_peer_must_prove(sides: Any, expected: tuple[str, str]) -> None:
    (config,) = child_configs(conn(**sides), NAMES)
    assert (config.peer_id, config.peer_auth) == expected
