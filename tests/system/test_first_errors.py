"""The errors that a user meets first: each names its cause and the next step where he looks.

Each is made for real, with two strongSwans and ESP; `status`, `why` and `events` are then read as
the user reads them. Those that need no peer are in tests/unit/test_first_errors.py.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from ipsecgate.core.model.flow import TCP
from ipsecgate.edges.host import control
from ipsecgate.lab.charon import HASTY
from ipsecgate.lab.connections import ConnSpec, connection
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import OTHER_PSK, Lab
from tests.until import wait_until

pytestmark = pytest.mark.second_guest

PORT = 7210
SITE = ConnSpec("site", "tunnel")
POLICY = '[[policy]]\nname = "site"\nremote = ["203.0.113.0/24"]\n'
# strongSwan's plugin for this PRF is not among those that the lab loads.
UNLOADED = "aes128-sha256-prfaesxcbc-modp2048"
NOBODY = "192.0.2.77"


@dataclass(frozen=True)
class Case:
    """What the user must read, and how the two sides differ from a connection that works.

    `ours`: keys of the connection, `our_child`: of its child. `theirs`: the same for the peer.
    """

    cause: str
    step: str
    ours: dict[str, Any] = field(default_factory=dict)
    our_child: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    their_child: dict[str, Any] = field(default_factory=dict)
    identity: bool = False  # whether it is about who the peer is


CASES = {
    "key": Case("another pre-shared key", "give both sides the same secret", identity=True),
    "ike": Case(
        "no IKE proposal in common",
        "compare `proposals`",
        ours={"proposals": ["aes256-sha512-modp2048"]},
    ),
    "esp": Case(
        "no ESP proposal in common",
        "compare `esp_proposals`",
        our_child={"esp_proposals": ["aes256-sha512"]},
    ),
    "selectors": Case(
        "none of our traffic selectors",
        "compare local_ts",
        their_child={"local_ts": ["10.9.0.0/16"]},
    ),
    "plugin": Case(
        "no plugin for the algorithm PRF_AES128_XCBC",
        "install libstrongswan-extra-plugins",
        ours={"proposals": [UNLOADED]},
        theirs={"proposals": [UNLOADED]},
    ),
    "name": Case(
        "the peer's address nosuch.invalid can't be resolved",
        "correct the name in remote_addrs",
        ours={"remote_addrs": ["nosuch.invalid"]},
    ),
    "down": Case("the peer ", "check that the peer is up", ours={"remote_addrs": [NOBODY]}),
}
UNKNOWN = Case("has no connection for us", "on the peer, load a connection")
EVERY = {**CASES, "unknown": UNKNOWN}
ADDRESSES = {name: ip_address(f"203.0.113.{at}") for at, name in enumerate(EVERY, 10)}
NOT_LOADED = ip_address("203.0.113.99")


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-first") as lab:
        lab.warm_up(("tunnel",), (4,))
        lab.a.charon.configure(HASTY)
        lab.b.serve("tcp-server", PORT)
        yield lab


@pytest.fixture(scope="module")
def module_gate(module_lab: Lab, cache: Path) -> Iterator[Gated]:
    with Gated(module_lab, cache=cache, policies=POLICY) as gate:
        yield gate


@dataclass
class Seen:
    """What the user sees once everything has failed: documents, and screens on one line."""

    negotiations: dict[str, dict[str, Any]]
    events: list[str]
    status: str


NOTHING = {"last_error": ""}


def load(lab: Lab, name: str, case: Case) -> None:
    """Load a case's connection on a, and its counterpart on b."""
    spec = ConnSpec(name, "tunnel")
    here = lab.a.end(spec, ())
    there = lab.b.end(spec, (f"{ADDRESSES[name]}/32",))
    sides = (
        (lab.a, connection(spec, here, there, "none"), case.ours, case.our_child),
        (lab.b, connection(spec, there, here, "none"), case.theirs, case.their_child),
    )
    for host, section, changed, child in sides:
        section[name].update(changed)
        section[name]["children"][name].update(child)
        host.charon.load(section)


@pytest.fixture(scope="module")
def seen(module_lab: Lab, module_gate: Gated) -> Seen:
    """Load every broken connection, call each once, and read the screens when all have failed."""
    lab, gate = module_lab, module_gate
    for name, case in CASES.items():
        load(lab, name, case)
    load(lab, "unknown", Case("", "", ours={"remote_addrs": [str(lab.b.bare[4])]}))
    with lab.b.charon.session() as session:
        owners = ["key@a.example", "key@b.example"]
        session.load_shared({"id": "key", "type": "IKE", "data": OTHER_PSK, "owners": owners})
    wait_until(lambda: len(gate.ask()["children"]) == len(EVERY), "not all are known")

    def failed() -> dict[str, dict[str, Any]]:
        found = gate.ask()["negotiations"]
        return {n["child"].split("/")[0]: n for n in found if n["last_error"]}

    # Four at a time: strongSwan reports the end of no more (edges/strongswan/negotiation.py).
    # On a busy machine, only the second attempt asks for the cause.
    for batch in (list(EVERY)[:4], list(EVERY)[4:]):

        def explained(names: list[str] = batch) -> bool:
            found = failed()
            left = [n for n in names if EVERY[n].cause not in found.get(n, NOTHING)["last_error"]]
            if left:
                call(lab, gate, *(str(ADDRESSES[name]) for name in left))
            return not left

        wait_until(explained, "not all have failed with their cause")
    call(lab, gate, str(NOT_LOADED))
    events = [r["text"] for r in json.loads(gate.cli("--json", "events").stdout)]
    return Seen(failed(), events, screen(gate, "status"))


CALLS = """
import socket, sys
for address in sys.argv[2:]:
    with socket.socket() as sock:
        sock.connect_ex((address, int(sys.argv[1])))
"""


def call(lab: Lab, gate: Gated, *addresses: str) -> None:
    """Connect from the gated cgroup to each of these, which are all refused."""
    command = [sys.executable, "-c", CALLS, str(PORT), *addresses]
    lab.a.run(command, cgroup=gate.cgroup)


def screen(gate: Gated, *words: str) -> str:
    """Return what a verb prints, on one line."""
    done = gate.lab.a.run(gate.argv(*words), check=False, env={"COLUMNS": "300"})
    return re.sub(r"\s+", " ", done.stdout)


def why(gate: Gated, address: object) -> dict[str, Any]:
    done = gate.cli("--json", "why", f"{address}:{PORT}", check=False)
    (document,) = json.loads(done.stdout)["flows"]
    found: dict[str, Any] = document
    return found


def decided(gate: Gated, address: object) -> dict[str, Any]:
    """Return the decision that `why` shows, without the CLI, which takes a second here."""
    flow = {"daddr": str(address), "proto": TCP, "dport": PORT, "saddr": None, "sport": 0}
    with control.connected(gate.paths.control, 60.0) as ask:
        found: dict[str, Any] = ask("why", **flow, mark=0, device=0, netns=0)["decision"]
    return found


@pytest.mark.parametrize("name", EVERY)
def test_a_failed_negotiation(seen: Seen, module_gate: Gated, name: str) -> None:
    case, negotiation = EVERY[name], seen.negotiations[name]
    assert case.cause in negotiation["last_error"]
    assert case.step in negotiation["advice"]
    assert any(f"{name}/{name}: " in t and case.cause in t and case.step in t for t in seen.events)
    decision = decided(module_gate, ADDRESSES[name])
    said = [step["text"] for step in decision["steps"] if step["step"] == "IKE"]
    assert case.cause in said[0]
    assert case.step in decision["advice"]
    expected = [f"connection {name} expects the peer to prove that it is {name}@b.example"]
    assert [text.partition(", by")[0] for text in said[1:]] == (expected if case.identity else [])


def test_the_status_says_of_each_failure_how_old_it_is_and_what_to_do(seen: Seen) -> None:
    shown = re.findall(
        r"connection (\w+), child \1: [\w-]+, \d+ attempts?, failed \d+ s ago", seen.status
    )
    assert len(shown) == 3, seen.status
    for name in shown:
        case = EVERY[name]
        after = seen.status.partition(f"connection {name}, child {name}: ")[2]
        assert after.index(case.cause) < after.index(f"next: {case.step}"), seen.status


def test_a_connection_that_is_not_loaded(seen: Seen, module_gate: Gated) -> None:
    document = why(module_gate, NOT_LOADED)
    assert "no loaded connection has the flow" in document["steps"][-1]["text"]
    assert "swanctl --load-conns" in document["advice"]
    told = [text for text in seen.events if "no loaded connection would protect" in text]
    assert any("swanctl --load-conns" in text for text in told)  # of many flows, once


MISFITS = {
    "misfit": {"children": {"misfit": {"mode": "tunnel", "local_ts": ["10.77.0.0/16"],
               "remote_ts": ["198.18.4.0/24", "2001:db8:4::/48"]}}},
    "mesh": {"remote_addrs": ["%any"], "children": {"mesh": {"mode": "transport"}}},
    "eap": {"local": {"auth": "eap-mschapv2", "id": "e"}},
}  # fmt: skip
MISFITTING_POLICIES = """
[[policy]]
name = "renamed"
remote = ["198.18.4.0/24"]
child = "gone"
[[policy]]
name = "wide"
remote = ["198.18.0.0/16"]
[[policy]]
name = "late"
remote = ["198.18.4.0/25"]
[[policy]]
name = "nowhere"
remote = ["198.19.0.0/16"]
"""


def test_check_names_what_does_not_fit(
    seen: Seen, module_lab: Lab, module_gate: Gated, tmp_path: Path
) -> None:
    """Each with what to do; the same in JSON and on the screen."""
    for name, changed in MISFITS.items():
        section = connection(
            ConnSpec(name, "tunnel"), module_lab.a.end(SITE, ()), module_lab.b.end(SITE, ()), "none"
        )
        section[name].update(changed)
        module_lab.a.charon.load(section)
    config = tmp_path / "ipsecgate.toml"
    config.write_text(
        module_gate.config.read_text().partition("[[policy]]")[0] + MISFITTING_POLICIES
    )
    done = module_gate.cli("--config", str(config), "--json", "check", check=False)
    findings = json.loads(done.stdout)
    assert all(f["hint"] for f in findings if f["state"] != "ok")
    told = {f"{f['state']} {f['name']}: {f['found']}" for f in findings}
    for said in (
        f"missing policies: policy renamed ({config}:5) needs the child gone",
        f"warning policies: policy wide ({config}:9): for all of its flows no loaded connection",
        f"warning policies: policy late ({config}:12) never applies: policy renamed",
        f"missing policies: policy nowhere ({config}:15): no loaded connection protects",
        "warning policies: no policy names IPv6 of misfit/misfit",
        "missing connections: name: its peer nosuch.invalid does not resolve",
        "missing connections: mesh/mesh names no peer and has no trap",
        "warning connections: misfit/misfit: this host has no address in 10.77.0.0/16",
        "missing plugins: eap uses EAP_MSCHAPV2, but strongSwan has not loaded eap-mschapv2",
    ):
        assert any(one.startswith(said) for one in told), (said, told)
    assert done.returncode == 1


def test_strongswan_that_does_not_run(module_lab: Lab, module_gate: Gated) -> None:
    lab, gate = module_lab, module_gate
    lab.a.charon.kill()
    said, step = "strongSwan is not running", "systemctl start strongswan"
    wait_until(lambda: said in gate.ask()["errors"][0]["text"], "status does not say so")
    document = why(gate, NOT_LOADED)
    assert said in document["steps"][-1]["text"]
    assert step in document["advice"]
    for verb in ("status", "events", "check"):
        assert step in screen(gate, verb).partition(said)[2], verb


def test_esp_that_is_filtered_on_the_way(module_lab: Lab, module_gate: Gated) -> None:
    lab, gate = module_lab, module_gate
    lab.reset()
    lab.load(SITE)
    wait_until(lambda: gate.ask()["children"] == ["site/site"], "the connection is not known")
    lab.a.charon.initiate(SITE.child_name)
    rule = ["INPUT", "-p", "esp", "-j", "DROP"]
    lab.b.run(["iptables-legacy", "-A", *rule])
    said, step = "packets left as ESP to 192.0.2.2, and none came back", "let IP protocol 50 pass"
    silenced = lab.a.client("tcp-client", lab.b.address(SITE), PORT, cgroup=gate.cgroup)
    wait_until(lambda: gate.ask()["warnings"], "status does not say so")
    document = why(gate, lab.b.address(SITE))
    assert document["allowed"], "an SA protects the flow: the gate has done its part"
    assert said in document["steps"][-1]["text"]
    assert step in document["advice"]
    for verb in ("status", "check"):
        assert step in screen(gate, verb).partition(said)[2], verb
    lab.b.run(["iptables-legacy", "-D", *rule])
    client = lab.a.client("tcp-client", lab.b.address(SITE), PORT, cgroup=gate.cgroup)
    assert client.result()["echoed"]
    silenced.result()  # the SYN that is sent again arrives, unless the client has given up
    wait_until(lambda: not gate.ask()["warnings"], "an answer ends the warning")
