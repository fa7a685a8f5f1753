"""Flows that routing leads elsewhere: by mark, by device, through a VRF or a VTI; and exceptions.

Each first call is held, or refused and then let go, on real ESP; the capture sees every packet.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab
from tests.system.one_call import INNER_B, PORT, REFUSED, call, ip, load_route_based
from tests.system.under_exec import nothing_in_clear
from tests.until import wait_until

pytestmark = pytest.mark.second_guest

OTHER_SOURCE = "198.51.100.9"


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-paths") as lab:
        lab.warm_up(("tunnel",), (4,))
        lab.b.serve("tcp-server", PORT)
        yield lab


@pytest.fixture(scope="module")
def module_gate(module_lab: Lab, cache: Path) -> Iterator[Gated]:
    policy = f'[[policy]]\nname = "site"\nremote = ["{INNER_B}"]\n'
    with Gated(module_lab, policies=policy, cache=cache) as gate:
        yield gate


@pytest.fixture
def undo(lab: Lab) -> Iterator[list[str]]:
    """Commands of ip(8) that undo a test's own."""
    commands: list[str] = []
    yield commands
    for command in reversed(commands):
        lab.a.run(["ip", *command.split()])


def load(lab: Lab, name: str, **child_options: str) -> None:
    lab.load(ConnSpec(name, "tunnel", 4, start_action="trap", child_options=child_options))


def test_a_socket_bound_to_a_device_is_held_and_covered(lab: Lab, gate: Gated) -> None:
    load(lab, "device")
    with nothing_in_clear(lab, esp=True):
        assert call(lab, gate, device="eth0") == [None, "198.51.100.1"]


def test_a_device_without_a_route_is_refused(lab: Lab, gate: Gated, undo: list[str]) -> None:
    load(lab, "device")
    ip(lab, "link add nowhere type dummy", "link set nowhere up")
    undo.append("link del nowhere")
    ip(lab, "addr add 10.77.0.1/24 dev nowhere")
    with nothing_in_clear(lab, esp=False):
        assert call(lab, gate, device="nowhere", held="2s")[0] in REFUSED


def test_policy_routing_by_mark_chooses_the_source(lab: Lab, gate: Gated, undo: list[str]) -> None:
    load(lab, "marked")
    ip(
        lab,
        f"addr add {OTHER_SOURCE}/32 dev lo",
        "rule add fwmark 7 table 107 pref 100",
        f"route add {INNER_B} via 192.0.2.2 src {OTHER_SOURCE} table 107",
    )
    undo += [f"addr del {OTHER_SOURCE}/32 dev lo", "rule del fwmark 7 table 107 pref 100"]
    with nothing_in_clear(lab, esp=True):
        assert call(lab, gate, mark=7) == [None, OTHER_SOURCE]
        assert call(lab, gate) == [None, "198.51.100.1"]
        lab.let_tcp_close()
    ip(lab, f"route replace {INNER_B} via 192.0.2.2 src 192.0.2.4 table 107")
    undo.append("route flush table 107")
    with nothing_in_clear(lab, esp=False):
        wait_until(
            lambda: call(lab, gate, mark=7, held="1s")[0] in REFUSED,
            "the unprotected source is refused",
        )


def test_a_child_for_marked_sockets(lab: Lab, gate: Gated) -> None:
    """`mark_out`: the SA is for packets with the mark only."""
    load(lab, "marks", mark_out="9", mark_in="9")
    with nothing_in_clear(lab, esp=True):
        assert call(lab, gate, "udp", mark=9) == [None, "198.51.100.1"]
    with nothing_in_clear(lab, esp=False):
        assert call(lab, gate, "udp", held="2s")[0] in REFUSED


def test_a_vrf_chooses_the_source(lab: Lab, gate: Gated, undo: list[str]) -> None:
    """The datagram has no answer: replies arrive outside the VRF."""
    load(lab, "vrf")
    ip(
        lab,
        "link add red type vrf table 108",
        f"addr add {OTHER_SOURCE}/32 dev red",
        "link set red up",
        f"route add {INNER_B} via 192.0.2.2 dev eth0 table 108",
    )
    undo.append("link del red")
    with nothing_in_clear(lab, esp=True):
        assert call(lab, gate, "udp", device="red") == [None, OTHER_SOURCE]
    ip(lab, f"addr del {OTHER_SOURCE}/32 dev red", "addr add 10.88.0.1/32 dev red")
    with nothing_in_clear(lab, esp=False):
        wait_until(
            lambda: call(lab, gate, "udp", device="red", held="1s")[0] in REFUSED, "not covered"
        )


@pytest.mark.parametrize("source", ["", "198.51.100.1"])
def test_a_vti_looks_up_the_spd_again(lab: Lab, gate: Gated, undo: list[str], source: str) -> None:
    ip(
        lab,
        "rule del pref 220",  # strongSwan's own routes
        "link add vti1 type vti local 192.0.2.1 remote 192.0.2.2 key 42",
        "link set vti1 up",
        f"route replace {INNER_B} dev vti1 src 198.51.100.1",
    )
    undo += [
        "rule add pref 220 table 220",
        f"route replace {INNER_B} via 192.0.2.2 src 198.51.100.1",
        "link del vti1",
    ]
    lab.a.namespace.sysctl("ipv4/conf/vti1/disable_policy", "1")
    lab.a.namespace.sysctl("ipv4/conf/vti1/rp_filter", "0")
    load_route_based(lab, "vti", mark_in="42", mark_out="42")
    with nothing_in_clear(lab, esp=True):
        assert call(lab, gate, source=source) == [None, "198.51.100.1"]
    lab.let_tcp_close()  # else the other host repeats its FIN
    ip(lab, "link set vti1 down")
    with nothing_in_clear(lab, esp=False):
        wait_until(lambda: call(lab, gate, source=source, held="1s")[0] in REFUSED, "no way")


@pytest.fixture
def derived(lab: Lab, cache: Path) -> Iterator[Gated]:
    """A gate without policies of its own."""
    with Gated(lab, cache=cache) as gate:
        yield gate


def load_exception(lab: Lab) -> None:
    """Load a pass shunt for the local network, as the plugin bypass-lan does."""
    lan = "192.0.2.0/24"
    child = {"mode": "pass", "local_ts": [lan], "remote_ts": [lan], "start_action": "trap"}
    lab.a.charon.load({"lan": {"remote_addrs": ["127.0.0.1"], "children": {"lan": child}}})


def test_the_connections_own_exception_is_the_operators_word(lab: Lab, derived: Gated) -> None:
    """A full tunnel with a pass shunt for the local network: each first call goes its own way."""
    load_exception(lab)
    spec = ConnSpec("full", "tunnel", 4, start_action="trap", remote_ts=("0.0.0.0/0",))
    lab.load(spec)
    derived.wait_policy("full")
    neighbour = str(lab.b.bare[4])
    with lab.capture() as capture:
        assert call(lab, derived, to=neighbour, held="2s")[0] is None
        lab.let_tcp_close()  # else the next capture has the other host's FIN
        in_clear = capture.stop().clear
    assert any(packet.is_syn for packet in in_clear)
    with nothing_in_clear(lab, esp=True):
        assert call(lab, derived)[0] is None
        lab.let_tcp_close()
    reasons = derived.reasons()
    assert reasons["allow_passed"] > 0
    assert reasons["block_clear"] == 0
    why = derived.cli("why", f"{neighbour}:{PORT}", check=False).stdout
    assert "an exception of the connections" in why
    lab.a.charon.unload("lan")
    with nothing_in_clear(lab, esp=True):
        assert call(lab, derived, to=neighbour) == [None, "198.51.100.1"], "by the tunnel, too"


def test_a_configured_policy_is_stricter_than_an_exception(lab: Lab, cache: Path) -> None:
    policy = '[[policy]]\nname = "lan"\nremote = ["192.0.2.0/24"]\n'
    with Gated(lab, policies=policy, cache=cache) as gate, nothing_in_clear(lab, esp=False):
        load_exception(lab)
        called = call(lab, gate, to=str(lab.b.bare[4]), held="2s")
        assert called[0] in REFUSED
