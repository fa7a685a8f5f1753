"""`ipsecgate wait`, `up` and `down` on real hosts: IKE's own words, and what a capture shows."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipsecgate.admin.wait import Down, Waited
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab
from tests.system.caller import Caller
from tests.system.connections import load_connection
from tests.system.under_exec import PORT, nothing_in_clear
from tests.typed_document import mismatches
from tests.until import wait_until

pytestmark = pytest.mark.second_guest

PIPE = subprocess.PIPE


@pytest.fixture(scope="module")
def gate(cache: Path) -> Iterator[Gated]:
    with Lab("ipsecgate-test-wait") as lab:
        lab.warm_up()  # before there is a gate: it would remember those connections
        with Gated(lab, cache=cache) as made:
            lab.b.serve("tcp-server", PORT)
            yield made


@pytest.fixture(autouse=True)
def fresh(gate: Gated) -> None:
    gate.lab.reset()


def ask(gate: Gated, *words: str) -> tuple[int, Waited]:
    done = gate.cli("--json", *words, check=False)
    document = json.loads(done.stdout)
    assert mismatches(document, Waited) == []
    return done.returncode, document


def begin(gate: Gated, *words: str) -> subprocess.Popen[str]:
    return gate.lab.a.popen(gate.argv(*words), stdout=PIPE, stderr=PIPE)


def call(gate: Gated, spec: ConnSpec) -> str:
    """Return the error of a gated call to the peer, "" if it connects."""
    caller = Caller(gate.lab.a.namespace.path, gate.cgroup)
    try:
        return caller("tcp", str(gate.lab.b.address(spec)), PORT)
    finally:
        caller.close()


@pytest.mark.parametrize(("mode", "family"), [("tunnel", 4), ("transport", 6)])
def test_wait_negotiates_and_the_first_call_is_protected(
    gate: Gated, mode: str, family: int
) -> None:
    lab = gate.lab
    spec = load_connection(lab, gate, mode, family)
    host = str(lab.b.address(spec))
    target = f"[{host}]:{PORT}" if family == 6 else f"{host}:{PORT}"
    code, before = ask(gate, "wait", "--to", target, "--timeout", "300ms", "--no-negotiate")
    assert (code, before["timed_out"]) == (124, True)
    assert "was not asked for yet" in before["targets"][0]["cause"]
    assert not lab.a.established(), "watching negotiates nothing"

    done = gate.cli("wait", "--to", target, "--timeout", "30s")
    assert (done.stdout, done.stderr) == ("", "")
    assert lab.a.established() == (spec.name,)
    refused = gate.reasons()["refuse_uncovered"]
    with nothing_in_clear(lab, esp=True):
        assert call(gate, spec) in ("", "EINPROGRESS")
        lab.let_tcp_close()
    assert gate.reasons()["refuse_uncovered"] == refused
    code, after = ask(gate, "wait", "--policy", f"{spec.name}/{spec.name}", "--timeout", "0")
    assert (code, after["covered"], after["targets"][0]["state"]) == (0, True, "covered")


def test_a_wrong_key_is_the_cause_and_a_mended_one_ends_the_wait(gate: Gated) -> None:
    lab = gate.lab
    spec = load_connection(lab, gate, "tunnel")
    lab.break_psk()
    name = f"{spec.name}/{spec.name}"
    done = gate.cli("wait", "--policy", name, "--timeout", "3s", check=False)
    assert done.returncode == 124
    assert f"{name}: not covered after " in done.stderr
    assert "the peer refused our authentication" in done.stderr, "as `ipsecgate why` says it"
    assert done.stdout == ""
    code, document = ask(gate, "up", name, "--timeout", "1s")
    (target,) = document["targets"]
    assert (code, target["state"], target["child"]) == (124, "waiting", name)
    assert target["attempts"] >= 2, "a wait tries again"
    assert "the peer refused our authentication" in target["cause"]
    waiting = begin(gate, "wait", "--policy", name, "--timeout", "60s")
    time.sleep(0.5)
    assert waiting.poll() is None
    assert call(gate, spec) in ("EPERM", "EHOSTUNREACH")
    lab.mend_psk()
    assert waiting.communicate(timeout=70) == ("", "")
    assert waiting.returncode == 0
    assert call(gate, spec) in ("", "EINPROGRESS")


def test_up_and_down(gate: Gated) -> None:
    lab = gate.lab
    spec = load_connection(lab, gate, "tunnel")
    name = f"{spec.name}/{spec.name}"
    assert f"up: {spec.name} ({name}), after" in gate.cli("up", spec.name).stdout
    assert call(gate, spec) in ("", "EINPROGRESS")
    lab.let_tcp_close()
    (sa,) = gate.status()["sas"]

    with nothing_in_clear(lab, esp=False):
        done = gate.cli("--json", "down", name)
        document = json.loads(done.stdout)
        assert mismatches(document, Down) == []
        assert document["sas"] == [
            {"child": name, "spi": sa["spi"], "peer": str(lab.b.outer[4]), "ended": True}
        ]
        assert document["policies"] == [name]
        assert lab.a.established() == ()
        before = gate.reasons()["refuse_uncovered"]
        lab.b.charon.kill()  # so that nothing brings it up again
        assert call(gate, spec) == "EPERM", "refused at once, as the hooks' tables say"
        assert gate.reasons()["refuse_uncovered"] == before + 1
    assert gate.cli("down", name).stdout == f"nothing is up for {name}\n"


def test_a_controller_and_a_daemon_that_start_later(gate: Gated) -> None:
    """As at boot: first there is neither, then a controller without strongSwan, then both."""
    lab = gate.lab
    spec = load_connection(lab, gate, "tunnel")
    target = f"{lab.b.address(spec)}:{PORT}"
    gate.kill()
    lab.a.charon.kill()
    done = gate.cli("wait", "--to", target, "--timeout", "500ms", check=False)
    assert (done.returncode, "no controller answers" in done.stderr) == (3, True)
    waiting = begin(gate, "wait", "--to", target, "--timeout", "90s")
    time.sleep(0.5)
    gate.start()
    code, document = ask(gate, "wait", "--all", "--timeout", "300ms")
    assert (code, waiting.poll()) == (124, None)
    assert "vici" in document["targets"][0]["cause"].lower(), document
    lab.restart(lab.a)
    time.sleep(0.5)
    assert waiting.poll() is None, "no connection is loaded"
    lab.load(spec)
    assert waiting.communicate(timeout=100) == ("", "")
    assert waiting.returncode == 0
    assert call(gate, spec) in ("", "EINPROGRESS")


def test_many_waiters_disturb_nobody_and_leave_nothing(gate: Gated) -> None:
    """They are connections of one process here; the controller answers others meanwhile."""
    lab = gate.lab
    spec = load_connection(lab, gate, "tunnel")
    crowd = lab.a.popen(
        ["python3", "-S", "-c", CROWD, str(gate.paths.control), str(lab.b.address(spec))],
        stdin=PIPE, stdout=PIPE,
    )  # fmt: skip
    assert crowd.stdout is not None
    assert crowd.stdin is not None
    assert crowd.stdout.readline() == "waiting\n"
    answers = [gate.ask() for _ in range(5)]
    assert len({answer["pid"] for answer in answers}) == 1
    tasks = answers[-1]["tasks"]
    assert tasks >= CROWD_SIZE
    crowd.stdin.write("vanish\n")
    crowd.stdin.flush()
    assert crowd.stdout.readline() == "half are gone\n"
    wait_until(lambda: gate.ask()["tasks"] <= tasks - CROWD_SIZE, "they are not forgotten")
    assert gate.cli("up", spec.name).returncode == 0
    crowd.stdin.write("listen\n")
    crowd.stdin.flush()
    answered = json.loads(crowd.stdout.readline())
    assert answered == {"covered": CROWD_SIZE // 2}
    assert crowd.wait() == 0
    wait_until(lambda: gate.ask()["tasks"] <= tasks - 3 * CROWD_SIZE // 2, "tasks are left")


CROWD_SIZE = 100
CROWD = f"""
import json, socket, sys
path, host = sys.argv[1:]
crowd = []
for number in range({CROWD_SIZE}):
    one = socket.socket(socket.AF_UNIX)
    one.connect(path)
    flow = ["x", host, 6, number + 1]
    one.sendall(json.dumps({{"verb": "wait", "flows": [flow], "policies": [], "names": [],
        "every": False, "negotiate": False, "seen": None, "limit": 120}}).encode() + b"\\n")
    crowd.append(one)
print("waiting", flush=True)
sys.stdin.readline()
for one in crowd[::2]:
    one.close()
print("half are gone", flush=True)
sys.stdin.readline()
answers = [json.loads(one.makefile().readline()) for one in crowd[1::2]]
print(json.dumps({{"covered": sum(a["ok"]["covered"] for a in answers)}}), flush=True)
"""
