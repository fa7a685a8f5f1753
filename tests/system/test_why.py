"""`ipsecgate why` on real hosts: before, while and after an SA protects a flow."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipsecgate.admin.why import Why
from ipsecgate.lab import traffic
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab
from tests.system.connections import load_connection
from tests.system.under_exec import PORT, client
from tests.typed_document import mismatches
from tests.until import wait_until


@pytest.fixture(scope="module")
def gate(cache: Path) -> Iterator[Gated]:
    with Lab("ipsecgate-test-why") as lab, Gated(lab, cache=cache) as made:
        lab.b.serve("tcp-server", PORT)
        yield made


@pytest.fixture(autouse=True)
def fresh(gate: Gated) -> None:
    gate.lab.reset()


def ask(gate: Gated, *words: str) -> tuple[int, Why]:
    done = gate.cli("--json", "why", *words, check=False)
    assert done.returncode in (0, 1), done.stderr
    (document,) = json.loads(done.stdout)["flows"]
    assert mismatches(document, Why) == []
    return done.returncode, document


def texts(document: Why, step: str) -> str:
    return "; ".join(each["text"] for each in document["steps"] if each["step"] == step)


def test_the_life_of_a_flow(gate: Gated) -> None:
    lab = gate.lab
    spec = load_connection(lab, gate, "tunnel")
    address = str(lab.b.address(spec))
    target = f"{address}:{PORT}"

    code, before = ask(gate, target)
    assert (code, before["reason"], before["error"]) == (1, "refuse_uncovered", "EPERM")
    assert before["gated"] is None, "no caller is named"
    assert "calls of other processes are not checked" in texts(before, "caller")
    assert "was not asked for yet" in texts(before, "IKE")
    assert not lab.a.established(), "asking negotiates nothing"
    assert gate.reasons()["refuse_uncovered"] == 0, "and sends nothing"

    assert client(lab, gate, "tcp-client", spec)["echoed"]
    code, covered = ask(gate, target)
    assert (code, covered["reason"], covered["error"]) == (0, "allow_covered", None)
    assert "live, and protects the flow" in texts(covered, "SA")
    spi = re.match("[0-9a-f]{8}", texts(covered, "SA"))
    assert spi
    assert spi[0] in {sa["spi"] for sa in gate.status()["sas"]}
    assert target in gate.cli("why", target).stdout

    subprocess.run(["ip", "-n", lab.a.namespace.name, "xfrm", "state", "flush"], check=True)
    wait_until(lambda: ask(gate, target)[0] == 1, "the loss of the SA was not noticed")
    lab.a.charon.terminate(spec.name)


def test_the_caller(gate: Gated) -> None:
    """Not gated, gated, and gated in another network namespace."""
    lab = gate.lab
    spec = load_connection(lab, gate, "tunnel")
    target = f"{lab.b.address(spec)}:{PORT}"
    outside = lab.a.popen(["sleep", "60"], cgroup=lab.cgroup(f"{gate.instance}-outside"))
    inside = lab.a.popen(["sleep", "60"], cgroup=gate.cgroup)
    beside = lab.cgroup(f"{gate.instance}/app/elsewhere")
    elsewhere = lab.b.popen(["sleep", "60"], cgroup=beside)
    try:
        code, document = ask(gate, target, "--pid", str(outside.pid))
        assert (code, document["reason"], document["gated"]) == (0, "not_gated", False)
        assert f"to gate.cgroups ({gate.config}:" in document["advice"]
        assert "ipsecgate attach" in document["advice"]
        for words in (("--pid", str(inside.pid)), ("--cgroup", str(gate.cgroup))):
            code, document = ask(gate, target, *words)
            assert (code, document["reason"]) == (1, "refuse_uncovered")
            assert f"{gate.cgroup}, gated" in texts(document, "caller")
        # Host b is that namespace, so its own address never leaves it.
        beyond = (f"203.0.113.77:{PORT}", "--pid", str(elsewhere.pid))
        wait_until(lambda: ask(gate, *beyond)[1]["reason"] == "refuse_outside", "not known")
        code, document = ask(gate, *beyond)
        assert code == 1
        assert texts(document, "source") == "its namespace has no route to this destination"
        code, document = ask(gate, target, *beyond[1:])
        assert (code, document["reason"]) == (0, "allow_exempt")
    finally:
        for process in (outside, inside, elsewhere):
            process.kill()
            process.wait()


def test_the_last_refusal(gate: Gated) -> None:
    lab = gate.lab
    spec = load_connection(lab, gate, "transport")
    lab.b.charon.kill()
    command = traffic.command("tcp-client", "--to", str(lab.b.address(spec)), "--port", str(PORT))
    lab.a.run(command, cgroup=gate.cgroup, check=False)

    def last() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(gate.cli("--json", "why", check=False).stdout)
        return found

    wait_until(lambda: last()["last"]["daddr"] == str(lab.b.address(spec)), "not recorded")
    document = last()
    assert document["last"]["kind"] == "refused"
    assert document["flows"][0]["reason"] == "refuse_uncovered"
    assert spec.name in texts(document["flows"][0], "IKE")
    screen = gate.cli("why", check=False).stdout
    assert screen.startswith("Last refusal: ")


def test_without_a_controller(gate: Gated) -> None:
    """The hooks' maps have the answer: they decide by what the controller left them."""
    lab = gate.lab
    spec = load_connection(lab, gate, "tunnel")
    wide = ConnSpec("wide", "tunnel", remote_ts=("198.18.0.0/15",))
    lab.load(wide)
    gate.wait_policy(wide.name)
    assert client(lab, gate, "tcp-client", spec)["echoed"]
    target, source = f"{lab.b.address(spec)}:{PORT}", str(lab.a.address(spec))
    gate.kill()
    code, document = ask(gate, target, "--from", source)
    assert (code, document["reason"], document["controller"]) == (0, "allow_covered", False)
    code, document = ask(gate, target, "--from", "192.0.2.77")
    assert (code, document["reason"]) == (1, "refuse_uncovered")
    code, document = ask(gate, target)
    assert (code, document["reason"]) == (0, "allow_covered"), "of an unbound socket"
    assert texts(document, "source") == f"{source}, chosen by routing"
    assert texts(document, "policy").startswith(f"{spec.name}/")
    command = traffic.command("tcp-client", "--to", str(lab.b.address(spec)), "--port", str(PORT))
    assert json.loads(lab.a.run(command, cgroup=gate.cgroup).stdout)["echoed"], "the hooks do that"
    code, document = ask(gate, f"198.18.0.9:{PORT}")
    assert (code, document["reason"]) == (1, "refuse_no_source")
    assert "--from" in texts(document, "source")
    code, document = ask(gate, f"198.18.0.9:{PORT}", "--from", source)
    assert (code, document["reason"]) == (1, "refuse_uncovered")
    code, document = ask(gate, target, "--from", str(lab.b.address(spec)))
    assert (code, document["reason"]) == (0, "allow_exempt"), "the host's own address"
    assert gate.cli("why", check=False).returncode == 3
    gate.start()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["10.2.0.5"], "is not HOST:PORT"),
        (["10.2.0.5:0"], "is not HOST:PORT"),
        (["10.2.0.5:70000"], "is not HOST:PORT"),
        (["[nonsense]:80"], "is not an IPv4 or IPv6 address"),
        (["10.2.0.5:80", "--from", "2001:db8::1"], "of another address family"),
        (["10.2.0.5:80", "--pid", "4194303"], "there is no process"),
        (["10.2.0.5:80", "--pid", "1", "--cgroup", "/"], "only one of"),
        (["10.2.0.5:80", "--container", "nosuch"], "container:nosuch"),
    ],
)
def test_bad_input_is_named(gate: Gated, words: list[str], said: str) -> None:
    done = gate.cli("why", *words, check=False)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())
