"""Reloads under a hammer, on two hosts with real IKE and real ESP: no window either way."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from ipsecgate.errors import UsageError
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab
from tests.system.caller import Caller
from tests.system.life import until

PORT = 7140
RELOADS, CALLS = 30, 5


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-reload") as lab:
        lab.warm_up()
        lab.b.serve("tcp-server", PORT)
        yield lab


def hammer(caller: Caller, address: str, ended: threading.Event, told: Counter[str]) -> None:
    while not ended.is_set():
        told[caller("tcp", address, PORT)] += 1


def all_called(told: Sequence[Counter[str]], enough: Sequence[int]) -> bool:
    return all(counts.total() >= n for counts, n in zip(told, enough, strict=True))


def test_under_a_hammer_nothing_covered_is_refused_and_nothing_leaves_in_clear(
    lab: Lab, cache: Path
) -> None:
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
        callers = [Caller(lab.a.namespace.path, gate.cgroup) for _ in range(3)]
        for caller in callers:
            caller("tcp", str(there), PORT)  # it takes a while to start
        told: list[Counter[str]] = [Counter() for _ in callers]
        ended = threading.Event()
        threads = [
            threading.Thread(target=hammer, args=(caller, str(address), ended, counts))
            for caller, address, counts in zip(callers, (there, there, nowhere), told, strict=True)
        ]
        with lab.capture() as capture:
            for thread in threads:
                thread.start()
            for number in range(RELOADS):
                default = "deny" if number % 4 == 3 else "allow"
                text = head.replace("[gate]\n", f'[gate]\ndefault = "{default}"\n')
                gate.config.write_text(text + variants[number % len(variants)])
                gate.ask("reload")
                enough = [counts.total() + CALLS for counts in told]
                until(partial(all_called, told, enough), "nobody calls")
                if number % 10 == 9:
                    gate.config.write_text(f"{text}{db}colour = 1\n")
                    with pytest.raises(UsageError, match="colour"):
                        gate.ask("reload")
            ended.set()
            for thread in threads:
                thread.join()
            seen = capture.stop()
        for caller in callers:
            caller.close()
        assert set(told[0]) | set(told[1]) == {"EINPROGRESS"}, "covered all the time"
        assert set(told[2]) <= {"EPERM", "EHOSTUNREACH"}, "uncovered all the time"
        assert not seen.clear
        assert seen.esp


def test_the_clock_jumps(lab: Lab, cache: Path) -> None:
    """Timers are the monotonic clock's. The kernel's lifetimes are not: what ends is made anew."""
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
        assert not seen.clear
        assert seen.esp
