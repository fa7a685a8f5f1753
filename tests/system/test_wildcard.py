"""Wildcard connections: `remote_addrs = %any` in transport mode, one SA for each peer.

VICI cannot name the peer, and the kernel's ACQUIRE can. Both addresses of host b are peers here;
a third one belongs to nobody.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import pytest

from ipsecgate.core.model.flow import Address
from ipsecgate.lab import traffic
from ipsecgate.lab.charon import HASTY
from ipsecgate.lab.connections import ESP_PROPOSAL, IKE_PROPOSAL
from ipsecgate.lab.endpoints import Client, Report
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import FAMILIES, Lab
from tests.system.under_exec import PORT, nothing_in_clear, start
from tests.until import wait_until

pytestmark = pytest.mark.second_guest

NETWORKS = {4: "192.0.2.0/24", 6: "2001:db8::/64"}
# The trap would catch neighbour discovery, too, and no IKE packet would find its peer.
NEIGHBOURS = ["::/0[ipv6-icmp/135]", "::/0[ipv6-icmp/136]"]
NEIGHBOUR_DISCOVERY = {
    "neighbours": {
        "mode": "pass",
        "local_ts": NEIGHBOURS,
        "remote_ts": NEIGHBOURS,
        "start_action": "trap",
    }
}
NOBODY = {4: ip_address("192.0.2.77"), 6: ip_address("2001:db8::77")}


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-wildcard") as lab:
        lab.warm_up(modes=("transport",))
        lab.b.serve("tcp-server", PORT)
        yield lab


def load_mesh(lab: Lab, gate: Gated, family: int, start_action: str = "trap") -> str:
    """Load the same wildcard on both hosts; only host a traps."""
    name = f"mesh-{family}"
    for host, action in ((lab.b, "none"), (lab.a, start_action)):
        host.charon.load({name: mesh(family, action)})
    wait_until(lambda: f"{name}/{name}" in gate.ask()["children"], "the gate does not know it")
    return name


def mesh(family: int, start_action: str) -> dict[str, Any]:
    child = {
        "mode": "transport",
        "remote_ts": [NETWORKS[family]],
        "esp_proposals": [ESP_PROPOSAL],
        "start_action": start_action,
    }
    proof = {"auth": "psk", "id": "mesh"}
    return {
        "version": "2",
        "local_addrs": ["%any"],
        "remote_addrs": ["%any4" if family == 4 else "%any6"],
        "proposals": [IKE_PROPOSAL],
        "local": proof,
        "remote": proof,
        "children": {f"mesh-{family}": child, **(NEIGHBOUR_DISCOVERY if family == 6 else {})},
    }


def held(lab: Lab, gate: Gated, role: str, to: Address, *options: str) -> Report:
    command = traffic.command(role, "--to", str(to), "--port", str(PORT), *options)
    return Client(start(lab, gate, command, "--udp")).result()


def peers(lab: Lab) -> list[str]:
    """The peers with which strongSwan on host a has an installed CHILD_SA."""
    with lab.a.charon.session() as session:
        return sorted(
            sa["remote-host"].decode()
            for each in session.list_sas()
            for sa in each.values()
            for child in sa["child-sas"].values()
            if child["state"] == b"INSTALLED"
        )


def negotiations(gate: Gated) -> dict[str, dict[str, Any]]:
    return {n["child"]: n for n in gate.ask()["negotiations"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_peer_gets_its_own_sa_and_the_first_call_waits_for_it(
    lab: Lab, gate: Gated, family: int
) -> None:
    name = load_mesh(lab, gate, family)
    lab.set_delay(25)
    for to in (lab.b.outer[family], lab.b.bare[family]):
        with nothing_in_clear(lab, esp=True):
            report = held(lab, gate, "tcp-client", to)
        assert (report["error"], report["echoed"], report["attempts"]) == (None, True, 1)
        assert negotiations(gate)[f"{name}/{name} to {to}"]["state"] == "covered"
    assert peers(lab) == sorted(map(str, (lab.b.outer[family], lab.b.bare[family])))


def test_a_datagram_waits_for_its_peer_s_sa(lab: Lab, gate: Gated) -> None:
    load_mesh(lab, gate, 4)
    with lab.b.serve("udp-server", PORT) as server, nothing_in_clear(lab, esp=True):
        report = held(lab, gate, "udp-client", lab.b.outer[4], "--count", "3")
        assert server.report(3, 1.0)["distinct"] == 3
    assert (report["errnos"], report["attempts"]) == ({}, 3)


def test_a_call_that_is_not_held_is_refused_until_the_sa_is_there(lab: Lab, gate: Gated) -> None:
    load_mesh(lab, gate, 4)
    with nothing_in_clear(lab, esp=True):
        client = lab.a.client("tcp-client", lab.b.outer[4], PORT, cgroup=gate.cgroup)
        report = client.result()
    assert (report["error"], report["echoed"]) == (None, True)
    assert report["errnos"].keys() == {"EPERM"}


def test_a_silent_peer_fails_alone(lab: Lab, gate: Gated) -> None:
    """Its calls end with EHOSTUNREACH and the cause; the other peers are not affected."""
    name = load_mesh(lab, gate, 4)
    lab.a.charon.configure(HASTY)
    try:
        with nothing_in_clear(lab, esp=False):
            report = held(lab, gate, "tcp-client", NOBODY[4])
        assert report["error"] == "EHOSTUNREACH"
        failed = negotiations(gate)[f"{name}/{name} to {NOBODY[4]}"]
        assert "did not answer" in failed["last_error"]
        with nothing_in_clear(lab, esp=True):
            assert held(lab, gate, "tcp-client", lab.b.outer[4])["error"] is None
        assert peers(lab) == [str(lab.b.outer[4])]
    finally:
        lab.a.charon.configure("")


def test_a_wrong_key_is_named_soon(lab: Lab, gate: Gated) -> None:
    name = load_mesh(lab, gate, 4)
    lab.break_psk()
    with nothing_in_clear(lab, esp=False):
        report = held(lab, gate, "tcp-client", lab.b.outer[4])
    assert report["error"] == "EHOSTUNREACH"
    failed = negotiations(gate)[f"{name}/{name} to {lab.b.outer[4]}"]
    assert "keys and identities must agree" in failed["last_error"]


def test_without_a_trap_the_call_fails_and_the_cause_says_what_to_do(lab: Lab, gate: Gated) -> None:
    """No trap names the peer, so strongSwan could not be asked; no packet leaves either."""
    name = load_mesh(lab, gate, 4, start_action="none")
    with nothing_in_clear(lab, esp=False):
        report = held(lab, gate, "tcp-client", lab.b.outer[4])
    assert report["error"] == "EHOSTUNREACH"
    why = json.loads(gate.cli("--json", "why", f"{lab.b.outer[4]}:{PORT}", check=False).stdout)
    assert f"set `start_action = trap` for {name}/{name}" in json.dumps(why)
    assert peers(lab) == []


def test_a_deleted_sa_closes_only_its_own_peer(lab: Lab, gate: Gated) -> None:
    name = load_mesh(lab, gate, 4)
    kept, deleted = lab.b.outer[4], lab.b.bare[4]
    for to in (kept, deleted):
        assert held(lab, gate, "tcp-client", to)["error"] is None
    lab.let_tcp_close()  # host b has no gate
    with lab.a.charon.session() as session:
        unique = next(
            sa["uniqueid"]
            for each in session.list_sas({"ike": name})
            for sa in each.values()
            if sa["remote-host"].decode() == str(deleted)
        )
        list(session.terminate({"ike-id": unique, "timeout": "5000"}))

    def state(peer: Address) -> str:
        return str(negotiations(gate)[f"{name}/{name} to {peer}"]["state"])

    wait_until(lambda: state(deleted) == "uncovered", "it is still open")
    assert state(kept) == "covered"
    with nothing_in_clear(lab, esp=True):
        report = held(lab, gate, "tcp-client", deleted)
    assert (report["error"], report["attempts"]) == (None, 1)
