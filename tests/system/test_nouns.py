"""`status`, the nouns, their schemas, and a change looked at before it is made: on real hosts."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipsecgate.admin.documents import DOCUMENTS
from ipsecgate.lab import traffic
from ipsecgate.lab.endpoints import Client
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab
from tests.schemas import wrong
from tests.system.connections import load_connection
from tests.system.fd_store import FdStore
from tests.system.under_exec import PORT, client, start, stopped, wait_held
from tests.until import wait_until

pytestmark = pytest.mark.second_guest

STAY = """
import socket, sys, time
with socket.create_connection((sys.argv[1], int(sys.argv[2]))):
    print("connected", flush=True)
    time.sleep(300)
"""


@pytest.fixture(scope="module")
def gate(cache: Path) -> Iterator[Gated]:
    with Lab("ipsecgate-test-nouns") as lab, Gated(lab, cache=cache) as made:
        lab.b.serve("tcp-server", PORT)
        yield made


def ask(gate: Gated, name: str, *words: str, code: int = 0, schema: str = "") -> Any:
    """Return what a verb prints, which must be as its shipped schema says."""
    done = gate.cli("--json", name, *words, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    document = json.loads(done.stdout if done.stdout else done.stderr)
    assert wrong(document, DOCUMENTS[schema or name]) == []
    return document


def outbound_spis(lab: Lab) -> set[str]:
    """Return the SPIs of host a's outbound SAs, as the kernel has them."""
    listing = subprocess.run(
        ["ip", "-n", lab.a.namespace.name, "xfrm", "state"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = re.findall(
        r"^src (\S+) dst \S+\n\tproto esp spi 0x([0-9a-f]{8})", listing, re.MULTILINE
    )
    own = {str(address) for address in lab.a.outer.values()}
    return {spi for source, spi in found if source in own}


def configure(gate: Gated, policies: str, gated: str = "") -> None:
    text = gate.config.read_text().partition("\n[[policy]]")[0]
    if gated:
        text = re.sub(r"^cgroups = .*$", f"cgroups = {gated}", text, flags=re.MULTILINE)
    gate.config.write_text(f"{text}\n{policies}")


def written(name: str, remote: object, *more: str) -> str:
    lines = ("[[policy]]", f'name = "{name}"', f'remote = ["{remote}"]', *more)
    return "\n".join((*lines, ""))


def test_the_nouns_with_and_without_a_controller(gate: Gated) -> None:
    gate.kill()
    with FdStore() as store:
        store.start(gate)
        _with_store(gate, store)


def _with_store(gate: Gated, store: FdStore) -> None:
    lab = gate.lab
    covered, uncovered = (
        load_connection(lab, gate, "tunnel"),
        load_connection(lab, gate, "transport"),
    )
    web, db = lab.b.address(covered), lab.b.address(uncovered)
    configure(gate, written("web", f"{web}/32", 'protocol = "tcp"') + written("db", f"{db}/32"))
    missing = json.dumps([str(gate.cgroup), "unit:never-there"])
    configure(gate, gate.config.read_text().partition("\n\n")[2], missing)
    gate.cli("reload")
    assert client(lab, gate, "tcp-client", covered)["echoed"]
    argv = [sys.executable, "-c", STAY, str(web), str(PORT)]
    connected = lab.a.popen(argv, cgroup=gate.cgroup, stdout=subprocess.PIPE)
    try:
        assert connected.stdout
        assert connected.stdout.readline() == "connected\n"
        _the_nouns(gate, store, covered, uncovered)
        _a_change(gate, web, db)
    finally:
        connected.kill()
        connected.wait()


def _the_nouns(gate: Gated, store: FdStore, covered: ConnSpec, uncovered: ConnSpec) -> None:
    lab = gate.lab
    web, db = str(lab.b.address(covered)), str(lab.b.address(uncovered))
    target = ("--to", db, "--port", str(PORT), "--limit", "250")
    with stopped(lab):  # a controller gives up on the negotiation after 30 s
        process = start(lab, gate, traffic.command("tcp-client", *target), "--hold", "300s")
        wait_held(gate)
        wait_until(store.is_given, "the listener was not stored")
        status = ask(gate, "status", code=1)
        (hold,) = status["holds"]
        assert hold["flow"] == f"tcp {db}:{PORT}"
        assert hold["child"] == f"{uncovered.name}/{uncovered.child_name}"
        policies = {one["name"]: one for one in status["policies"]}
        coverage = {name: one["coverage"] for name, one in policies.items()}
        assert coverage == {"web": "covered", "db": "negotiating"}
        line = gate.config.read_text().splitlines().index('name = "db"')
        assert policies["db"]["source"] == f"{gate.config}:{line}"
        assert (policies["web"]["protocol"], policies["db"]["protocol"]) == ("tcp", "any")
        assert [one["advice"] for one in status["problems"]] == [
            "start the service that lives there, or remove it from gate.cgroups"
        ]
        _without_controller(gate, hold["pid"], {sa["spi"] for sa in status["sas"]})
        store.start(gate)
    gate.cli("status", "--wait", "--timeout", "60")
    assert Client(process).result()["echoed"], "the successor answers the held call"
    lab.a.charon.terminate(uncovered.name)
    wait_until(lambda: len(ask(gate, "sas")["sas"]) == 1, "the controller has not noticed")
    with stopped(lab):
        refused = traffic.command("tcp-client", "--to", db, "--port", "81", "--retry", "none")
        lab.a.run(refused, cgroup=gate.cgroup, check=False)
        _flows(ask(gate, "flows"), web, db)
        screen = gate.cli("status", check=False).stdout
        assert f"next: `ipsecgate why {db}:81`" in screen
    document = ask(gate, "cgroups")
    (cgroup,) = document["cgroups"]
    assert (cgroup["cgroup"], cgroup["by"]) == (str(gate.cgroup), str(gate.cgroup))
    assert cgroup["missing"] == [] == cgroup["others"]
    assert cgroup["processes"] >= 1
    assert [one["target"] for one in document["awaited"]] == ["unit:never-there"]


def _flows(document: Any, web: str, db: str) -> None:
    (connection,) = document["connections"]
    assert (connection["flow"], connection["policy"]) == (f"tcp {web}:{PORT}", "web")
    assert connection["state"] == "allow_covered"
    refused = {one["flow"]: one for one in document["refused"]}
    assert (refused[f"tcp {db}:81"]["policy"], refused[f"tcp {db}:81"]["state"]) == (
        "db", "refuse_uncovered",
    )  # fmt: skip
    decisions = {one["flow"]: one["reason"] for one in document["decisions"]}
    assert decisions.get(f"tcp {web}:{PORT}", "allow_covered") == "allow_covered"
    assert f"tcp {db}:{PORT}" not in decisions


def _without_controller(gate: Gated, held: int, spis: set[str]) -> None:
    """Everything that pins, kernel and configuration say is as before, and says who is missing."""
    gate.kill(signal.SIGKILL)
    status = ask(gate, "status", code=1)
    assert not status["controller"]["alive"]
    assert {sa["spi"] for sa in status["sas"]} == spis == outbound_spis(gate.lab)
    coverage = {one["name"]: one["coverage"] for one in status["policies"]}
    assert coverage == {"web": "covered", "db": "uncovered"}
    (hold,) = ask(gate, "holds")["holds"]
    assert (hold["pid"], hold["flow"]) == (held, None)
    assert hold["comm"]
    assert 0 < hold["limit"] <= 300
    (connection,) = ask(gate, "flows")["connections"]
    assert (connection["policy"], connection["state"]) == ("web", "allow_covered")
    (cgroup,) = ask(gate, "cgroups")["cgroups"]
    assert cgroup["by"] == str(gate.cgroup)
    assert gate.cli("sas").stdout.startswith("The controller is not running")
    late = ask(gate, "status", "--wait", "--timeout", "0.3", code=124, schema="error")
    assert "the controller is not running" in late["error"]
    assert "systemctl start ipsecgate" in late["hint"]
    assert ask(gate, "reload", "--dry-run", code=3, schema="error")


def _a_change(gate: Gated, web: object, db: object) -> None:
    candidate = gate.config.with_name("candidate.toml")
    table = gate.config.read_text().partition("\n[[policy]]")[0]
    before = gate.ask("configuration")

    def check(policies: str, head: str = table, code: int = 1) -> Any:
        candidate.write_text(f"{head}\n{policies}")
        words = ("--check", str(candidate))
        return ask(gate, "policies", *words, code=code, schema="difference")

    same = written("both", f"{db}/32") + written("web", f"{web}/32", 'protocol = "tcp"')
    document = check(same, code=0)
    assert document["policies"] == [] == document["touched"], "the order has no effect here"

    document = check(written("db", f"{db}/32"))
    (change,) = document["policies"]
    assert (change["kind"], change["remote"]) == ("opens", [f"{web}/32"])
    assert (change["before"], change["after"], change["protocol"]) == ("protect", "allow", "tcp")
    touched = {(one["what"], one["kind"]) for one in document["touched"]}
    assert touched == {("connection", "opens"), ("sa", "opens")}
    document = check(same, re.sub(r"^cgroups = .*$", "", table, flags=re.MULTILINE))
    kinds = {(one["before"], one["kind"]) for one in document["settings"]}
    assert kinds == {(str(gate.cgroup), "opens"), ("unit:never-there", "opens")}
    assert [one["what"] for one in document["touched"]] == ["connection"]

    candidate.write_text(f"{table}\n{written('db', 'nonsense')}")
    error = ask(gate, "policies", "--check", str(candidate), code=2, schema="error")["error"]
    assert f"{candidate}: policy[1].remote: 'nonsense'" in error

    kept = gate.config.read_text()
    gate.config.write_text(kept.replace("[gate]", '[gate]\nsa_source = "vici"'))
    error = ask(gate, "reload", "--dry-run", code=2, schema="error")["error"]
    assert "gate.sa_source: cannot change" in error
    gate.config.write_text(kept)
    ask(gate, "reload", "--dry-run", schema="difference")
    assert gate.ask("configuration") == before, "nothing of this changed anything"


def test_other_documents_are_as_their_schemas_say(gate: Gated) -> None:
    lab = gate.lab
    configure(gate, "")
    gate.cli("reload")
    spec = load_connection(lab, gate, "tunnel", family=6)
    command = traffic.command(
        "tcp-client", "--to", str(lab.b.address(spec)), "--port", "81", "--retry", "none"
    )
    lab.b.charon.kill()
    lab.a.run(command, cgroup=gate.cgroup, check=False)
    wait_until(
        lambda: {one["kind"] for one in ask(gate, "events")} >= {"log", "refused"}, "not recorded"
    )
    ask(gate, "why", code=1)
    ask(gate, "check")
    derived = [one for one in ask(gate, "policies")["policies"] if one["derived"]]
    assert f"connection {spec.name}/{spec.child_name}" in {one["source"] for one in derived}
