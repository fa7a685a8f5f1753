"""Reloads under load, on two hosts with real IKE and ESP: no moment of a wrong verdict."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipsecgate.errors import UsageError
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab
from tests.system.caller import called_again, hammering

PORT = 7140
RELOADS, CALLS = 30, 7


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-reload") as lab:
        lab.warm_up()
        lab.b.serve("tcp-server", PORT)
        yield lab


def test_reloads_under_load_neither_refuse_covered_flows_nor_leak(lab: Lab, cache: Path) -> None:
    covered, uncovered = ConnSpec("covered", "tunnel", 4), ConnSpec("uncovered", "tunnel", 6)
    there, nowhere = lab.b.address(covered), lab.b.address(uncovered)
    network = ".".join(str(there).split(".")[:2]) + ".0.0/16"
    db = f'[[policy]]\nname = "db"\nremote = ["{network}"]\n'
    six = f'[[policy]]\nname = "six"\nremote = ["{nowhere}/128"]\nchild = "none"\n'
    away = '[[policy]]\nname = "away"\nremote = ["192.0.2.0/24", "198.51.100.0/24"]\n'
    bypass = f'{away}action = "bypass"\n'
    narrow = f'[[policy]]\nname = "host"\nremote = ["{there}/32"]\nprotocol = "tcp"\n'
    variants = [
        db + six,
        bypass + six + db,
        six + away + narrow + db,
        f'{six}{narrow}[[policy]]\nname = "rest"\nremote = ["{network}"]\naction = "discard"\n',
        db.replace('"db"', '"renamed"') + six,
    ]
    with Gated(lab, policies=db + six, cache=cache) as gate:
        head = gate.config.read_text().removesuffix(db + six)
        lab.load(covered)
        gate.wait_policy(covered.name)
        client = lab.a.client("tcp-client", there, PORT, cgroup=gate.cgroup).result()
        assert client["error"] is None
        space = lab.a.namespace.path
        with lab.capture() as capture:
            with contextlib.ExitStack() as hammers:
                results = [
                    hammers.enter_context(hammering(space, gate.cgroup, "tcp", str(to), PORT))
                    for to in (there, there, nowhere)
                ]
                for number in range(RELOADS):
                    default = "deny" if number % 4 == 3 else "allow"
                    text = head.replace("[gate]\n", f'[gate]\ndefault = "{default}"\n')
                    gate.config.write_text(text + variants[number % len(variants)])
                    gate.ask("reload")
                    for each in results:
                        called_again(each, CALLS)
                    if number % 10 == 9:
                        gate.config.write_text(f"{text}{db}colour = 1\n")
                        with pytest.raises(UsageError, match="colour"):
                            gate.ask("reload")
            seen = capture.stop()
        assert {*results[0], *results[1]} == {"EINPROGRESS"}, "covered all the time"
        assert set(results[2]) <= {"EPERM", "EHOSTUNREACH"}, "uncovered all the time"
        assert not [packet for packet in seen.clear if packet.sender == "a"]
        assert seen.esp


def test_jumps_of_the_clock_neither_refuse_nor_leak(lab: Lab, cache: Path) -> None:
    """Our timers use the monotonic clock. The kernel's lifetimes do not: SAs may expire."""
    spec = ConnSpec("clock", "tunnel", 4)
    with Gated(lab, cache=cache) as gate:
        lab.load(spec)
        gate.wait_policy(spec.name)
        began, clock = time.monotonic(), time.time()
        try:
            with lab.capture() as capture:
                for jump in (0, 86400, -2 * 86400, 86400):
                    time.clock_settime(time.CLOCK_REALTIME, time.time() + jump)
                    for _ in range(2):
                        client = lab.a.client(
                            "tcp-client", lab.b.address(spec), PORT,
                            "--retry", "EPERM,EHOSTUNREACH", cgroup=gate.cgroup,
                        )  # fmt: skip
                        report = client.result()
                        assert report["error"] is None, (jump, gate.log.read_text())
                seen = capture.stop()
        finally:
            time.clock_settime(time.CLOCK_REALTIME, clock + time.monotonic() - began)
        assert not [packet for packet in seen.clear if packet.sender == "a"]
        assert seen.esp
